"""Outer optimizers: which vectors each keeps beside Θ, and one step of each on a chunk.

A rule's scalars are fixed before the pass, so every chunk gets the same step and the chunks may run in any
order. What a step needs beyond the rule (how many arrivals, how many steps so far) is counted in the state,
which is in checkpoints and is replayed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.outer import kernels
from coordinator.outer.rules import Correction, Merge
from shared.codecs.kernels import F32

Optimizer = Literal["nesterov", "sgd", "delayed-nesterov", "adam"]

SLOTS: dict[Optimizer, tuple[str, ...]] = {
    "nesterov": ("momentum",),
    "sgd": (),
    "delayed-nesterov": ("momentum", "accumulated"),
    "adam": ("momentum", "variance"),
}
"""The vectors of fragment.size fp32 elements that an optimizer keeps, zero at first."""

Update = Callable[[F32, F32, Sequence[F32], F32, F32], None]
"""(Δ, Θ, slots, Θ̂, out) of one chunk: steps Θ and the slots in place, and writes Θ − Θ̂ to `out`."""


@dataclass(frozen=True)
class OuterRule:
    """What an outer step does, as the journal records it with each round: a replay must do the same.

    `share` is the part of a full round that this one is worth (see `core.rounds.share`): Nesterov, SGD and Adam then
    take that part of a step, and Nesterov's momentum decays by that part (Adam's moments are averages over rounds, of
    whatever size). `period` and `delay_c` are N and c of Delayed Nesterov, which has its own way of it; `momentum` is
    μ, β or β₁, `beta2` and `epsilon` are Adam's.
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


def update_of(rule: OuterRule, count: int, arrivals: int) -> tuple[Update, int]:
    """The step of a round that holds `arrivals` contributions, and the count after it.

    `count` is what the state has counted: of Adam its steps, of Delayed Nesterov the arrivals since the momentum was
    updated. A round of several contributions stands for as many arrivals of their mean.
    """
    f32 = np.float32
    lr, mu = f32(rule.lr), f32(rule.momentum)
    if rule.optimizer == "nesterov":
        scaled = (lr, f32(rule.share), f32(rule.momentum**rule.share), f32(_mix(rule.momentum, rule.share)))
        return lambda delta, master, slots, published, out: kernels.nesterov(
            delta, master, slots[0], published, *scaled, out
        ), 0
    if rule.optimizer in ("sgd", "adam"):
        lr = f32(rule.lr * rule.share)
    if rule.optimizer == "sgd":
        return lambda delta, master, slots, published, out: kernels.sgd(delta, master, published, lr, out), 0
    if rule.optimizer == "adam":
        steps = count + 1
        scalars = (
            lr,
            mu,
            f32(rule.beta2),
            f32(rule.epsilon),
            f32(1 - rule.momentum**steps),
            f32(1 - rule.beta2**steps),
        )
        return lambda delta, master, slots, published, out: kernels.adam(
            delta, master, slots[0], slots[1], published, *scalars, out
        ), steps
    return _delayed(rule, count, arrivals)


def _mix(momentum: float, share: float) -> float:
    """How much of the momentum a part of a step takes, so that the parts of a round move Θ as far as the whole: μ for a
    whole one; for less, what makes a steady gradient's Σ Δ(1 + μ/(1 − μ)) the same."""
    return momentum if share == 1.0 else momentum * (1 - momentum**share) / (1 - momentum)


def _delayed(rule: OuterRule, count: int, arrivals: int) -> tuple[Update, int]:
    """Delayed Nesterov on `arrivals` arrivals of one gradient: up to the momentum's update, over it, and on."""
    f32, period = np.float32, max(1, rule.period)
    parts: list[tuple[np.float32, ...]] = []
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
        parts.append(tuple(map(f32, (rule.lr, taken / period, taken, mix, beta, inverse, keep))))
        arrivals -= taken

    def update(delta: F32, master: F32, slots: Sequence[F32], published: F32, out: F32) -> None:
        for lr, share, many, mix, beta, inverse, keep in parts:
            kernels.delayed(
                delta, master, slots[0], slots[1], published, lr, share, many, mix, beta, inverse, keep, out
            )

    return update, count
