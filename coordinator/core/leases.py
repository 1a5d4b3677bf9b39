"""Who trains which part of the data: shards of a manifest, each leased to one site at a time, each once an epoch.

A shard's sequences are trained in one order that every site knows, so a position says all. A shard has a position for
each fragment: what a site has trained is in the model as far as *every* fragment's contributions hold it. A shard that
comes back is leased again from the least of them: nothing is left out, and what some fragments hold beyond it is
trained again.

Nothing here has a clock or a disk. Each change is first planned (the entries as they would be), written by the caller,
and then made.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

Key = tuple[int, int]
"""(epoch, shard)"""
RETURNED = 1000
"""Of so many leases that came back it is known that they did, in case their site does as well."""


@dataclass(frozen=True)
class Entry:
    """A shard that is not fully trained in its epoch, and was leased before. `site` None: it came back.

    `number` is the lease's own, and higher than those of all before; `positions` are sequences, one for each fragment.
    """

    epoch: int
    shard: int
    number: int
    site: str | None
    positions: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.epoch, self.shard

    @property
    def position(self) -> int:
        """Up to here it is in the whole model."""
        return min(self.positions)


@dataclass(frozen=True)
class Dealt:
    """How far the shards have been dealt out: `shards` of those of `epoch`, in leases below `next_number`; and the
    numbers of those that came back last."""

    epoch: int = 0
    shards: int = 0
    next_number: int = 0
    returned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Change:
    """Entries as they become; `done`: these are fully trained, and no entry is kept."""

    dealt: Dealt
    entries: tuple[Entry, ...]
    done: tuple[Key, ...] = field(default=())


class Leases:
    """The leases of one manifest; `sizes` are the sequences of each shard."""

    def __init__(self, sizes: Sequence[int], fragments: int, seed: int) -> None:
        self.sizes, self.fragments, self.seed = list(sizes), fragments, seed
        self.entries: dict[Key, Entry] = {}
        self.dealt = Dealt()

    def restore(self, entries: Iterable[Entry], dealt: Dealt) -> None:
        """As the journal has it."""
        self.entries, self.dealt = {entry.key: entry for entry in entries}, dealt

    def held_by(self, site: str) -> list[Entry]:
        """The site's leases in the order in which it got them."""
        return sorted((e for e in self.entries.values() if e.site == site), key=lambda e: e.number)

    def withdrawn(self, holding: Iterable[int]) -> list[int]:
        """Which of the leases that a site takes for its own came back. (A lease that is done has not: a site that was
        killed may have to train it again, as it did.)"""
        return [number for number in holding if number in self.dealt.returned]

    # -- plans

    def plan_grants(self, site: str, ahead: int, finished: Iterable[int]) -> Change | None:
        """More shards for a site that wants `ahead` that it has not `finished` training, by number; None where it has
        them."""
        trained = set(finished)
        missing = ahead - sum(entry.number not in trained for entry in self.held_by(site))
        if missing <= 0:
            return None
        back = sorted(e.key for e in self.entries.values() if e.site is None)[:missing]
        number, epoch, shards = self.dealt.next_number, self.dealt.epoch, self.dealt.shards
        granted = [replace(self.entries[key], site=site, number=number + n) for n, key in enumerate(back)]
        order = self.order(epoch)
        while len(granted) < missing:
            if shards == len(order):
                epoch, shards = epoch + 1, 0
                order = self.order(epoch)
            granted.append(Entry(epoch, order[shards], number + len(granted), site, (0,) * self.fragments))
            shards += 1
        return Change(Dealt(epoch, shards, number + missing, self.dealt.returned), tuple(granted))

    def plan_progress(self, site: str, fragment: int, progress: Iterable[tuple[int, int, int]]) -> Change | None:
        """An accepted contribution of the fragment holds (epoch, shard) up to a position; None where that is no news.
        Only what the site holds counts, and no position goes back."""
        entries, done = [], []
        for epoch, shard, position in progress:
            entry = self.entries.get((epoch, shard))
            if entry is None or entry.site != site or position <= entry.positions[fragment]:
                continue
            positions = list(entry.positions)
            positions[fragment] = min(position, self.sizes[shard])
            if min(positions) >= self.sizes[shard]:
                done.append(entry.key)
            else:
                entries.append(replace(entry, positions=tuple(positions)))
        return Change(self.dealt, tuple(entries), tuple(done)) if entries or done else None

    def plan_return(self, sites: Iterable[str]) -> Change | None:
        """The shards of these sites come back, from where they are in the whole model; None where they have none."""
        gone = set(sites)
        lost = [entry for entry in self.entries.values() if entry.site in gone]
        if not lost:
            return None
        entries = tuple(replace(entry, site=None, positions=(entry.position,) * self.fragments) for entry in lost)
        returned = (*self.dealt.returned, *sorted(entry.number for entry in lost))[-RETURNED:]
        return Change(replace(self.dealt, returned=returned), entries)

    def make(self, change: Change) -> None:
        """A planned change, once it is written."""
        for entry in change.entries:
            self.entries[entry.key] = entry
        for key in change.done:
            del self.entries[key]
        self.dealt = change.dealt

    def order(self, epoch: int) -> list[int]:
        """In which the shards of an epoch are dealt out."""
        order = list(range(len(self.sizes)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
