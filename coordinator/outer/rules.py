"""How contributions become one pseudo-gradient: corrections and merges, tensor by tensor, as coefficients.

Every rule here is linear in the contributions once a few scalars per tensor are known (their norms, and their
angle to the momentum). So the rules are pure functions of these scalars, and the pass over the tensors is the
same for all of them: Σ aᵢΔᵢ + b·m, and for RDA a length that the sum is brought to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Merge = Literal["mean", "rda"]
Correction = Literal["none", "heloco"]

TINY = 1e-12
"""φ(x) = x / max(‖x‖, TINY), so that a zero vector has no direction instead of NaN."""

HELOCO_PASS, HELOCO_MOMENTUM, HELOCO_BEND, HELOCO_MOST = 0.2, 3.0, 0.5, 0.5


@dataclass(frozen=True)
class Measures:
    """One tensor's scalars: ‖Δᵢ‖ of each contribution, their cosines to the momentum m, and ‖m‖."""

    norms: Sequence[float]
    cosines: Sequence[float]
    momentum_norm: float


@dataclass(frozen=True)
class Combination:
    """Σ `weights[i]`·Δᵢ + `momentum`·m, brought to length `length` (None: as it is).

    `norms` are the ‖`weights[i]`·Δᵢ‖, `pulled` what the momentum brings to the sum's square: with both, the angles
    between the contributions can be told from the length of the sum.
    """

    weights: tuple[float, ...]
    momentum: float
    length: float | None
    norms: tuple[float, ...]
    pulled: float = 0.0


def combination(
    merge: Merge, correction: Correction, weights: Sequence[float], measures: Measures, *, embedding: bool
) -> Combination:
    """The coefficients of one tensor. `weights` sum to 1; an embedding is merged by the weighted mean under any rule,
    because its rows are touched by few tokens each and a common length means nothing to them."""
    parts = [
        heloco(norm, measures.momentum_norm, cosine) if correction == "heloco" else (1.0, 0.0)
        for norm, cosine in zip(measures.norms, measures.cosines, strict=True)
    ]
    lengths = [
        _length(own * norm, pull * measures.momentum_norm, cosine)
        for (own, pull), norm, cosine in zip(parts, measures.norms, measures.cosines, strict=True)
    ]
    if merge == "rda" and not embedding:
        shares = [weight / max(length, TINY) for weight, length in zip(weights, lengths, strict=True)]
        length = math.fsum(weight * length for weight, length in zip(weights, lengths, strict=True))
    else:
        shares, length = list(weights), None
    own_weights = tuple(share * own for share, (own, _) in zip(shares, parts, strict=True))
    momentum = math.fsum(share * pull for share, (_, pull) in zip(shares, parts, strict=True))
    norms = tuple(weight * norm for weight, norm in zip(own_weights, measures.norms, strict=True))
    pull = momentum * measures.momentum_norm
    pulled = pull * (pull + 2 * math.fsum(n * cosine for n, cosine in zip(norms, measures.cosines, strict=True)))
    return Combination(own_weights, momentum, length, norms, pulled)


def heloco(norm: float, momentum_norm: float, cosine: float) -> tuple[float, float]:
    """(a, b) of the corrected contribution aΔ + b·m (HeLoCo, arXiv 2606.00271; as in DESIGN.md section 5).

    A contribution that points along the momentum passes; one at a right angle is turned towards it at its own
    length; of one that points against it, part of what opposes is taken out.
    """
    if norm <= TINY or momentum_norm <= TINY or cosine >= HELOCO_PASS:
        return 1.0, 0.0
    confidence = norm / (norm + HELOCO_MOMENTUM * momentum_norm)
    if cosine >= 0:
        turn = min((1 - cosine) * confidence, 1.0)
        direction = _length(1 - turn, turn, cosine)
        return (1 - turn) / direction, turn / direction * norm / momentum_norm
    bend = min(HELOCO_BEND * -cosine * confidence, HELOCO_MOST)
    return 1.0, -bend * cosine * norm / momentum_norm


def mean_cosine(merged_squares: float, norms: Sequence[Sequence[float]]) -> float | None:
    """Mean cosine between the terms of a sum, each pair weighted by the product of its lengths.

    `merged_squares` is ‖Σ vᵢ‖² over all tensors, `norms[t][i]` the length of term i in tensor t. None where there
    are fewer than two terms of any length. It needs no pass over the tensors: ‖Σv‖² = Σ‖v‖² + Σ_{i≠j} vᵢ·vⱼ.
    """
    own = math.fsum(norm**2 for tensor in norms for norm in tensor)
    pairs = math.fsum(math.fsum(tensor) ** 2 for tensor in norms) - own
    if pairs <= 1e-9 * own or own == 0:
        return None
    return max(-1.0, min(1.0, (merged_squares - own) / pairs))


def _length(a: float, b: float, cosine: float) -> float:
    """The length of two vectors' sum, from their lengths and the cosine between them."""
    return math.sqrt(max(0.0, a * a + b * b + 2 * a * b * cosine))
