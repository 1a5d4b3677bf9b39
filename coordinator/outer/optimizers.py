"""Outer optimizers: which vectors each keeps beside Θ, and one step of each on a chunk.

A rule's scalars are fixed before the pass, so every chunk gets the same step and the chunks may run in any
order. What a step needs beyond the rule (how many arrivals, how many steps so far) is counted in the state,
which is in checkpoints and is replayed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.outer import kernels
from coordinator.outer.rules import Correction, Merge
from shared.codecs import Dense
from shared.codecs.kernels import F32, U8

Optimizer = Literal["nesterov", "sgd", "delayed-nesterov", "adam"]

SLOTS: dict[Optimizer, tuple[str, ...]] = {
    "nesterov": ("momentum",),
    "sgd": (),
    "delayed-nesterov": ("momentum", "accumulated"),
    "adam": ("momentum", "variance"),
}
"""The vectors of fragment.size fp32 elements that an optimizer keeps, zero at first."""

_NONE = np.empty(0, dtype=np.float32)
_KINDS: dict[Optimizer, int] = {
    "nesterov": kernels.NESTEROV,
    "sgd": kernels.SGD,
    "delayed-nesterov": kernels.DELAYED,
    "adam": kernels.ADAM,
}


@dataclass(frozen=True)
class Sections:
    """The raw bytes of one chunk from several contributions in one dense codec, and what each weighs.

    `kind` and `cut` are the codec's (its payload begins at `cut`); `raws` uint8 (contributions, bytes or more),
    `weights` fp32 (contributions,).
    """

    kind: int
    cut: int
    raws: U8
    weights: F32


NOTHING = Sections(0, 0, np.empty((0, 0), dtype=np.uint8), _NONE)


@dataclass(frozen=True)
class Update:
    """A step whose scalars are fixed: which optimizer, and fp32 (parts, kernels.SCALARS)."""

    kind: int
    scalars: F32

    def __call__(
        self,
        sections: Sections,
        delta: F32,
        master: F32,
        slots: Sequence[F32],
        published: F32,
        codec: Dense,
        out: U8,
    ) -> float:
        """Steps a chunk of Θ and of the slots by `delta` (empty: zero) plus the weighted sum of `sections`, and Θ̂ by
        the delta that is published, which is encoded into `out` (codec.size(…),). Returns Σ Δ².

        Raises ValueError where a value is not finite; the chunk is of no use then.
        """
        first, second, *_ = (*slots, _NONE, _NONE)
        split = codec.split(out, master.size)
        flaw, squares = kernels.step(
            self.kind,
            self.scalars,
            codec.kind,
            codec.step,
            sections.kind,
            sections.cut,
            sections.raws,
            sections.weights,
            delta,
            master,
            first,
            second,
            published,
            *split,
        )
        codec.require_sound(flaw)
        return float(squares)


@dataclass(frozen=True)
class OuterRule:
    """What an outer step does, as the journal records it with each round: a replay must do the same.

    `share` is the part of a full round that this one is worth (see `core.rounds.share`): Nesterov, SGD and Adam then
    take that part of a step, and Nesterov's momentum decays by that part (Adam's moments are averages over rounds, of
    whatever size). `period` and `delay_c` are N and c of Delayed Nesterov, which has its own way of it; `momentum` is
    μ, β or β₁, `beta2` and `epsilon` are Adam's. `grid_step` is the delta's least grid step (see shared.codecs.grid).
    """

    optimizer: Optimizer
    lr: float
    momentum: float
    codec: str
    zstd_level: int
    merge: Merge = "mean"
    correction: Correction = "none"
    share: float = 1.0
    period: int = 1
    delay_c: float = 0.0
    beta2: float = 0.99
    epsilon: float = 1e-8
    grid_step: float = 0.0


def update_of(rule: OuterRule, count: int, arrivals: int) -> tuple[Update, int]:
    """The step of a round that holds `arrivals` contributions, and the count after it.

    `count` is what the state has counted: of Adam its steps, of Delayed Nesterov the arrivals since the momentum was
    updated. A round of several contributions stands for as many arrivals of their mean.
    """
    if rule.optimizer == "nesterov":
        mu, share = rule.momentum, rule.share
        return _update(rule, [(rule.lr, share, mu**share, _mix(mu, share))]), 0
    if rule.optimizer == "sgd":
        return _update(rule, [(rule.lr * rule.share,)]), 0
    if rule.optimizer == "adam":
        steps = count + 1
        corrections = (1 - rule.momentum**steps, 1 - rule.beta2**steps)
        scalars = (rule.lr * rule.share, rule.momentum, rule.beta2, rule.epsilon, *corrections)
        return _update(rule, [scalars]), steps
    parts, count = _delayed(rule, count, arrivals)
    return _update(rule, parts), count


def _update(rule: OuterRule, parts: list[tuple[float, ...]]) -> Update:
    padded = [(*part, *(0.0,) * (kernels.SCALARS - len(part))) for part in parts]
    return Update(_KINDS[rule.optimizer], np.array(padded, dtype=np.float32))


def _mix(momentum: float, share: float) -> float:
    """How much of the momentum a part of a step takes, so that the parts of a round move Θ as far as the whole: μ for a
    whole one; for less, what makes a steady gradient's Σ Δ(1 + μ/(1 − μ)) the same."""
    return momentum if share == 1.0 else momentum * (1 - momentum**share) / (1 - momentum)


def _delayed(rule: OuterRule, count: int, arrivals: int) -> tuple[list[tuple[float, ...]], int]:
    """Delayed Nesterov on `arrivals` arrivals of one gradient: up to the momentum's update, over it, and on."""
    period = max(1, rule.period)
    parts: list[tuple[float, ...]] = []
    while arrivals > 0:
        # (The count can stand above a period that was lowered meanwhile.)
        taken = min(arrivals, max(1, period - count))
        if count + taken >= period:
            # What the arrivals before this one have not taken of the momentum. The mean is over what was collected:
            # that is N, or more where sites left and N was lowered meanwhile.
            mix, beta, inverse, keep = (
                max(0.0, 1 - rule.delay_c * count) * rule.momentum,
                rule.momentum,
                1 / (count + taken),
                0.0,
            )
            count = 0
        else:
            mix, beta, inverse, keep = taken * rule.delay_c * rule.momentum, 1.0, 0.0, 1.0
            count += taken
        parts.append((rule.lr, taken / period, taken, mix, beta, inverse, keep))
        arrivals -= taken
    return parts, count
