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
from dataclasses import dataclass, replace

Key = tuple[int, int]
"""(epoch, shard)"""


@dataclass(frozen=True)
class Entry:
    """A shard that is not fully trained in its epoch, and was leased before. `site` None: it came back.

    `number` orders the leases of a site; `positions` are sequences, one for each fragment.
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
class Change:
    """Entries as they become (`done`: these are fully trained, and no entry is kept), and how far the shards that were
    never leased have been dealt out: `dealt` of the shards of `epoch`."""

    entries: tuple[Entry, ...]
    done: tuple[Key, ...]
    epoch: int
    dealt: int


class Leases:
    """The leases of one manifest; `sizes` are the sequences of each shard."""

    def __init__(self, sizes: Sequence[int], fragments: int, seed: int) -> None:
        self.sizes, self.fragments, self.seed = list(sizes), fragments, seed
        self.entries: dict[Key, Entry] = {}
        self.epoch, self.dealt, self.next_number = 0, 0, 0
        self._order = self._shuffled(0)

    def restore(self, entries: Iterable[Entry], epoch: int, dealt: int) -> None:
        """As the journal has it."""
        self.entries = {entry.key: entry for entry in entries}
        self.next_number = max((entry.number + 1 for entry in self.entries.values()), default=0)
        self.epoch, self.dealt, self._order = epoch, dealt, self._shuffled(epoch)

    def held_by(self, site: str) -> list[Entry]:
        """The site's leases in the order in which it got them."""
        return sorted((e for e in self.entries.values() if e.site == site), key=lambda e: e.number)

    def withdrawn(self, site: str, holding: Iterable[Key]) -> list[Key]:
        """Which of those that a site takes for its own are not, and are not done either."""
        return [key for key in holding if key in self.entries and self.entries[key].site != site]

    # -- plans

    def plan_grants(self, site: str, ahead: int, finished: Iterable[Key]) -> Change | None:
        """More shards for a site that wants `ahead` that it has not `finished` training; None where it has them."""
        trained = set(finished)
        missing = ahead - sum(entry.key not in trained for entry in self.held_by(site))
        if missing <= 0:
            return None
        back = sorted(e.key for e in self.entries.values() if e.site is None)[:missing]
        number, epoch, dealt, order = self.next_number, self.epoch, self.dealt, self._order
        granted = [replace(self.entries[key], site=site, number=number + n) for n, key in enumerate(back)]
        while len(granted) < missing:
            if dealt == len(order):
                epoch, dealt = epoch + 1, 0
                order = self._shuffled(epoch)
            granted.append(Entry(epoch, order[dealt], number + len(granted), site, (0,) * self.fragments))
            dealt += 1
        return Change(tuple(granted), (), epoch, dealt)

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
        return Change(tuple(entries), tuple(done), self.epoch, self.dealt) if entries or done else None

    def plan_return(self, sites: Iterable[str]) -> Change | None:
        """The shards of these sites come back, from where they are in the whole model; None where they have none."""
        gone = set(sites)
        entries = [
            replace(entry, site=None, positions=(entry.position,) * self.fragments)
            for entry in self.entries.values()
            if entry.site in gone
        ]
        return Change(tuple(entries), (), self.epoch, self.dealt) if entries else None

    def make(self, change: Change) -> None:
        """A planned change, once it is written."""
        for entry in change.entries:
            self.entries[entry.key] = entry
            self.next_number = max(self.next_number, entry.number + 1)
        for key in change.done:
            del self.entries[key]
        if change.epoch != self.epoch:
            self._order = self._shuffled(change.epoch)
        self.epoch, self.dealt = change.epoch, change.dealt

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.sizes)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
