"""A site's device groups, and what to do with several: average their gradients in each step, or train one model each.

Averaged, they are one learner of the run: each step waits for the slowest group and for the exchange of gradients
through the host. Apart, each is a learner of its own, which waits for nobody; but a run of more learners comes to a
higher loss for the same tokens (+0.2% to +0.7% from one learner to two, arXiv 2503.09799).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from site_agent.core.shares import deal, seconds

Mode = Literal["average", "learners"]
WORTH_WAITING = 0.85
"""Averaging serves better while it keeps this share of the groups' speeds. Loss falls with about the twentieth power of
tokens, so 15% fewer are +0.8%: what one more learner costs, at most."""
CLOSE = 0.05
SLUG = 32


@dataclass(frozen=True)
class Rank:
    """What a process says of itself: the host that it is on, its device's make and name, bytes of memory that are
    free, and what it is to compute in."""

    host: str
    make: str
    device: str
    free: int
    precision: str


@dataclass(frozen=True)
class Group:
    """Ranks with equal devices, in order."""

    name: str
    ranks: tuple[int, ...]


def groups_of(ranks: Sequence[Rank], named: Sequence[str] = ()) -> list[Group]:
    """Ranks whose devices have the same make and name, in the order of their first ranks. `named`: a name for each
    rank from its own config, where it has one: it sets a rank apart, with those of its make that have the same."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for rank, one in enumerate(ranks):
        name = named[rank] if named else ""
        kinds.setdefault((one.make, name, "" if name else one.device), []).append(rank)
    groups: list[Group] = []
    for (make, name, device), members in kinds.items():
        slug = _free_slug(name or slug_of(f"{make} {device}"), {group.name for group in groups})
        groups.append(Group(slug, tuple(members)))
    return groups


def _free_slug(slug: str, taken: Collection[str]) -> str:
    """The first of slug, slug-2, slug-3 … that nobody has."""
    free, number = slug, 1
    while free in taken:
        number += 1
        end = f"-{number}"
        free = slug[: SLUG - len(end)].rstrip("-") + end
    return free


def slug_of(device: str) -> str:
    """A device's name as part of a participant's: letters a-z, digits and dashes."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return words[:SLUG].strip("-") or "device"


@dataclass(frozen=True)
class Verdict:
    """Which of the two serves better, and what speaks for it. Speeds are sequences per second: `together` with
    averaging, `apart` the sum of the groups'."""

    mode: Mode
    together: float
    apart: float
    why: str


def judge(
    batch: int, groups: Sequence[Group], speeds: Sequence[float], exchange_seconds: float, rest_seconds: float = 0.0
) -> Verdict:
    """Whether groups of these speeds (sequences per second) had better average their gradients, which takes
    `exchange_seconds` a step, or be learners of their own, each with a batch of as many sequences. `rest_seconds` are
    what a step takes besides, whatever its batch: the optimizer, above all."""
    shares = deal(batch, speeds)
    step = seconds(shares, speeds) + exchange_seconds + rest_seconds
    together, apart = batch / step, sum(batch / (batch / speed + rest_seconds) for speed in speeds)
    share = together / apart
    idle = [group.name for group, part in zip(groups, shares, strict=True) if not part]
    loss = "one more learner costs up to 0.7% of the loss, as 15% fewer tokens would"
    if idle:
        why = f"a batch of {batch} sequences leaves nothing for {', '.join(idle)}"
        return Verdict("learners", together, apart, why)
    waits = (
        f"averaged they keep {share:.0%} of their speed, with {exchange_seconds:.3g} s of {step:.3g} s for the exchange"
    )
    close = ""
    if abs(share - WORTH_WAITING) < CLOSE:
        close = f"; {WORTH_WAITING:.0%}, from where averaging serves better, is close: [devices] mixed can say which"
    return Verdict("average" if share >= WORTH_WAITING else "learners", together, apart, f"{waits}; {loss}{close}")
