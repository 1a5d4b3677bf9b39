"""The outer step of one chunk as one kernel: contributions merged, the optimizer's step, the delta's encoding, and Θ̂
moved along.

It goes through the chunk in tiles. The sum of a tile's contributions never leaves the first-level cache, nor does what
the optimizer makes of it (Θ − Θ̂) before it is encoded and added to Θ̂: what crosses the memory bus is each vector of the
state once each way, and the bytes that came and go. `fastmath` off, as in
shared.codecs.kernels.

What a step needs of its rule are fp32 scalars, in an array (parts, 7) whose columns each optimizer documents; only
Delayed Nesterov ever has more than one part.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from shared.codecs.kernels import (
    BLOCK,
    INT8,
    SOUND,
    TILE,
    encode_tile,
    new_scratch,
    payload_range,
    square_sum,
    sum_tile,
)

F32 = NDArray[np.float32]
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]

NESTEROV, SGD, DELAYED, ADAM = range(4)
SCALARS = 7

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def _nesterov(scalars: F32, delta: F32, master: F32, momentum: F32, published: F32, out: F32) -> None:
    """b ← `decay`·b + `share`·Δ; Θ ← Θ − η(`share`·Δ + `mix`·b); out = Θ − Θ̂. Scalars: η, share, decay, mix.

    With share 1 and decay = mix = μ it is Nesterov's step (DiLoCo, arXiv 2311.08105), bit for bit.
    """
    lr, share, decay, mix = scalars[0], scalars[1], scalars[2], scalars[3]
    for i in range(delta.size):
        g = share * delta[i]
        b = decay * momentum[i] + g
        momentum[i] = b
        theta = master[i] - lr * (g + mix * b)
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def _sgd(scalars: F32, delta: F32, master: F32, published: F32, out: F32) -> None:
    """Θ ← Θ − ηΔ; out = Θ − Θ̂. Scalars: η."""
    lr = scalars[0]
    for i in range(delta.size):
        theta = master[i] - lr * delta[i]
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def _delayed(scalars: F32, delta: F32, master: F32, momentum: F32, accumulated: F32, published: F32, out: F32) -> None:
    """Δ_acc ← Δ_acc + `arrivals`·g; m ← `beta`·m + `inverse`·Δ_acc; Θ ← Θ − ε(`mix`·m + `share`·g);
    Δ_acc ← `keep`·Δ_acc; out = Θ − Θ̂ (Async Local-SGD, arXiv 2401.09135). Scalars: ε, share, arrivals, mix, beta,
    inverse, keep.

    Between two updates of the momentum β = 1, inverse = 0 and keep = 1, which changes no bit of m; at one keep = 0.
    """
    lr, share, arrivals, mix = scalars[0], scalars[1], scalars[2], scalars[3]
    beta, inverse, keep = scalars[4], scalars[5], scalars[6]
    for i in range(delta.size):
        collected = accumulated[i] + arrivals * delta[i]
        m = beta * momentum[i] + inverse * collected
        momentum[i] = m
        accumulated[i] = keep * collected
        theta = master[i] - lr * (mix * m + share * delta[i])
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def _adam(scalars: F32, delta: F32, master: F32, momentum: F32, variance: F32, published: F32, out: F32) -> None:
    """m ← β₁m + (1−β₁)Δ; v ← β₂v + (1−β₂)Δ²; Θ ← Θ − η·(m/c₁)/(√(v/c₂) + ε) (arXiv 1412.6980; as an outer optimizer
    2003.00295); out = Θ − Θ̂. Scalars: η, β₁, β₂, ε, c₁, c₂."""
    lr, beta1, beta2, epsilon = scalars[0], scalars[1], scalars[2], scalars[3]
    correction1, correction2, one = scalars[4], scalars[5], np.float32(1)
    for i in range(delta.size):
        g = delta[i]
        m = beta1 * momentum[i] + (one - beta1) * g
        v = beta2 * variance[i] + (one - beta2) * (g * g)
        momentum[i] = m
        variance[i] = v
        theta = master[i] - lr * ((m / correction1) / (np.sqrt(v / correction2) + epsilon))
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def step(
    optimizer: int,
    scalars: F32,
    codec: int,
    least_step: np.float32,
    kind: int,
    cut: int,
    raws: U8,
    weights: F32,
    delta: F32,
    master: F32,
    first: F32,
    second: F32,
    published: F32,
    scales: U16,
    payload: U8,
) -> tuple[int, float]:
    """One outer step of a chunk from its contributions to its delta, all in place.

    Δ is `delta` (empty: zero) plus Σ weights[n] · decoded raws[n] (see shared.codecs.kernels.sum_tile). Steps Θ and the
    optimizer's slots (`first` and `second`; empty where it has fewer) by Δ, encodes Θ − Θ̂ into `scales` and `payload`,
    and moves Θ̂ by what they decode to. Returns what is wrong with the values, if anything is (the state is of no use
    then), and Σ Δ² in double precision.
    """
    squares = 0.0
    merged, change, scratch = np.empty(TILE, np.float32), np.empty(TILE, np.float32), new_scratch()
    for start in range(0, master.size, TILE):
        stop = min(start + TILE, master.size)
        m, p, out = master[start:stop], published[start:stop], change[: stop - start]
        d = merged[: stop - start]
        if delta.size:
            d[:] = delta[start:stop]
        else:
            d[:] = np.float32(0)
        sum_tile(kind, cut, raws, weights, start, d, scratch)
        squares += square_sum(d)
        if optimizer == NESTEROV:
            _nesterov(scalars[0], d, m, first[start:stop], p, out)
        elif optimizer == SGD:
            _sgd(scalars[0], d, m, p, out)
        elif optimizer == ADAM:
            _adam(scalars[0], d, m, first[start:stop], second[start:stop], p, out)
        else:
            for part in range(scalars.shape[0]):
                _delayed(scalars[part], d, m, first[start:stop], second[start:stop], p, out)
        low, high = payload_range(codec, start, stop)
        blocks = scales[start // BLOCK : (stop + BLOCK - 1) // BLOCK] if codec >= INT8 else scales[:0]
        flaw = encode_tile(codec, least_step, out, blocks, payload[low:high], p, np.float32(1), scratch)
        if flaw != SOUND:
            return flaw, squares
    return SOUND, squares


@_jit
def dot(x: F32, y: F32) -> float:
    """Σ xy in double precision."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total
