"""What the courier tells the learner, and what the learner says of itself to be told on.

Fragments go by their numbers in the whole run, however many coordinators have parts of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.protocol import DataReport, Orders
from site_agent.contribution import Anchor
from site_agent.core.alignment import How


@dataclass(frozen=True)
class Accepted:
    """The coordinator has the contribution; `delivered`: the one that was encoded last, or put in its place."""

    fragment: int
    version: int
    delivered: bool


@dataclass(frozen=True)
class ArrivedAnchor:
    """A version is here. `jumped`: by a snapshot, and not by the deltas of those before."""

    fragment: int
    anchor: Anchor
    how: How
    jumped: bool = False


@dataclass(frozen=True)
class Ordered:
    """New orders came with a heartbeat."""

    orders: Orders


@dataclass(frozen=True)
class Failed:
    """The courier cannot go on, and so cannot the agent."""

    error: BaseException


@dataclass(frozen=True)
class Stop:
    """Somebody asked this program to stop (signal number)."""

    signal: int


@dataclass(frozen=True)
class Touch:
    """A coordinator answers again, or not any more: `silent` are the fragments of those that do not."""

    silent: frozenset[int]


@dataclass(frozen=True)
class Report:
    """What the agent says of itself with each heartbeat; see shared.protocol.Heartbeat. `starved`: it waits for
    data."""

    state: Literal["preparing", "ready", "training"]
    steps: int = 0
    tokens: int = 0
    step_seconds: float = 0.0
    overlap_seconds: float = 0.0
    sync_seconds: float = 0.0
    training_share: float = 0.0
    loss: float | None = None
    data: DataReport | None = None
    starved: bool = False


Event = Accepted | ArrivedAnchor | Ordered | Touch | Failed | Stop
