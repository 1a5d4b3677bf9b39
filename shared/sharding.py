"""How the fragments of a run are dealt among several coordinators, for models past one machine.

Coordinators share nothing: each is a run of its own over the fragments that it owns, and numbers them from 0. With n
coordinators, fragment p of the whole run is fragment p div n of coordinator p mod n. Dealt out in turn, coordinators
have equal numbers of fragments (but for one), and a site's cycle, which takes fragment after fragment, calls at each
of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from shared.errors import ConfigError
from shared.fragments import Fragment, Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """What coordinator `index` (from 0) of `count` owns."""

    index: int
    count: int

    def of(self, items: Sequence[T]) -> list[T]:
        """Of one item for each fragment of the whole run, those of this coordinator."""
        return list(items[self.index :: self.count])

    def of_layout(self, layout: Layout) -> Layout:
        """This coordinator's fragments of the whole layout, as it numbers them."""
        return Layout(tuple(Fragment(q, fragment.tensors) for q, fragment in enumerate(self.of(layout.fragments))))

    def whole(self, fragment: int) -> int:
        """Which fragment of the whole run this coordinator's `fragment` is."""
        return fragment * self.count + self.index


WHOLE = Slice(0, 1)


def home(fragment: int, count: int) -> tuple[int, int]:
    """(coordinator, its own number for it) of a fragment of the whole run, with `count` coordinators."""
    return fragment % count, fragment // count


def interleave(slices: Sequence[Sequence[T]]) -> list[T]:
    """One item for each fragment of the whole run, from those of all coordinators in their order."""
    homes = (home(p, len(slices)) for p in range(sum(map(len, slices))))
    return [slices[coordinator][fragment] for coordinator, fragment in homes]


def slice_of(coordinators: Sequence[str], shard: int | None) -> Slice:
    """What `isthmus coordinator serve --shard` says with these `[run] coordinators`. Raises ConfigError."""
    count = len(coordinators)
    if shard is None:
        if count:
            raise ConfigError(
                f"--shard is missing: [run] coordinators has {count} entries; say which of them this one is, from 0 "
                f"to {count - 1}"
            )
        return WHOLE
    if not count:
        raise ConfigError(f"--shard {shard} without [run] coordinators: drop it, or name there all coordinators' URLs")
    if not 0 <= shard < count:
        raise ConfigError(f"--shard {shard} is none of the {count} [run] coordinators; use 0 to {count - 1}")
    return Slice(shard, count)
