"""Kernels of the outer optimizers, one chunk at a time; `fastmath` off, as in shared.codecs.kernels.

Each also writes `out = Θ − Θ̂`, what the next delta has to carry, because Θ and Θ̂ are in the cache then.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def nesterov(
    delta: F32,
    master: F32,
    momentum: F32,
    published: F32,
    lr: np.float32,
    share: np.float32,
    decay: np.float32,
    mix: np.float32,
    out: F32,
) -> None:
    """b ← `decay`·b + `share`·Δ; Θ ← Θ − η(`share`·Δ + `mix`·b); out = Θ − Θ̂.

    With share 1 and decay = mix = μ it is Nesterov's step (DiLoCo, arXiv 2311.08105), bit for bit.
    """
    for i in range(delta.size):
        g = share * delta[i]
        b = decay * momentum[i] + g
        momentum[i] = b
        theta = master[i] - lr * (g + mix * b)
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def sgd(delta: F32, master: F32, published: F32, lr: np.float32, out: F32) -> None:
    """Θ ← Θ − ηΔ; out = Θ − Θ̂."""
    for i in range(delta.size):
        theta = master[i] - lr * delta[i]
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def delayed(
    delta: F32,
    master: F32,
    momentum: F32,
    accumulated: F32,
    published: F32,
    lr: np.float32,
    share: np.float32,
    arrivals: np.float32,
    mix: np.float32,
    beta: np.float32,
    inverse: np.float32,
    keep: np.float32,
    out: F32,
) -> None:
    """Δ_acc ← Δ_acc + `arrivals`·g; m ← `beta`·m + `inverse`·Δ_acc; Θ ← Θ − ε(`mix`·m + `share`·g);
    Δ_acc ← `keep`·Δ_acc; out = Θ − Θ̂ (Async Local-SGD, arXiv 2401.09135).

    Between two updates of the momentum β = 1, inverse = 0 and keep = 1, which changes no bit of m; at one keep = 0.
    """
    for i in range(delta.size):
        collected = accumulated[i] + arrivals * delta[i]
        m = beta * momentum[i] + inverse * collected
        momentum[i] = m
        accumulated[i] = keep * collected
        theta = master[i] - lr * (mix * m + share * delta[i])
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def adam(
    delta: F32,
    master: F32,
    momentum: F32,
    variance: F32,
    published: F32,
    lr: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    epsilon: np.float32,
    correction1: np.float32,
    correction2: np.float32,
    out: F32,
) -> None:
    """m ← β₁m + (1−β₁)Δ; v ← β₂v + (1−β₂)Δ²; Θ ← Θ − η·(m/c₁)/(√(v/c₂) + ε) (arXiv 1412.6980; as an outer optimizer
    2003.00295); out = Θ − Θ̂."""
    one = np.float32(1)
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
def dot(x: F32, y: F32) -> float:
    """Σ xy in double precision."""
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total
