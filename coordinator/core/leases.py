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
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

Key = tuple[int, int]
"""(epoch, shard)"""
MOST_HELD = 1 << 11
RETURNED = 1 << 12
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
    """Entries as they become; `done`: these are fully trained, and no entry is kept. `dealt` None: as it was."""

    dealt: Dealt | None
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
        """Which of the leases that a site takes for its own came back, as far as that is known (`RETURNED`). (A lease
        that is done has not: a site that was killed may have to train it again, as it did.)"""
        returned = set(self.dealt.returned)
        return [number for number in holding if number in returned]

    # -- plans

    def plan_grants(self, site: str, missing: int, newest: int, known: Iterable[int]) -> Change | None:
        """More shards for a site that lacks so many sequences; None where it has what it wants. It has seen leases up
        to the number `newest`, and has those `known`: later ones are on their way to it and count, and what it has lost
        (or never had: one of us was put back to an earlier time) it is leased anew."""
        mine, has = self.held_by(site), set(known)
        missing -= sum(self._rest(entry) for entry in mine if entry.number > newest)
        anew = [entry for entry in mine if entry.number <= newest and entry.number not in has]
        back = deque(sorted((e for e in self.entries.values() if e.site is None), key=lambda e: e.key))
        number, epoch, shards = max(self.dealt.next_number, newest + 1), self.dealt.epoch, self.dealt.shards
        granted: list[Entry] = []
        order, room = self.order(epoch), MOST_HELD - len(mine) + len(anew)
        while anew or (missing > 0 and len(granted) < room):
            if anew:
                entry = anew.pop(0)
            elif back:
                entry = back.popleft()
            else:
                if shards == len(order):
                    epoch, shards = epoch + 1, 0
                    order = self.order(epoch)
                entry = Entry(epoch, order[shards], 0, site, (0,) * self.fragments)
                shards += 1
            start = (entry.position,) * self.fragments
            granted.append(replace(entry, site=site, number=number + len(granted), positions=start))
            missing -= self._rest(entry)
        if not granted:
            return None
        return Change(Dealt(epoch, shards, number + len(granted), self.dealt.returned), tuple(granted))

    def _rest(self, entry: Entry) -> int:
        """Sequences that are not in the whole model."""
        return self.sizes[entry.shard] - entry.position

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
        return Change(None, tuple(entries), tuple(done)) if entries or done else None

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
        self.dealt = change.dealt or self.dealt

    def order(self, epoch: int) -> list[int]:
        """In which the shards of an epoch are dealt out."""
        order = list(range(len(self.sizes)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
