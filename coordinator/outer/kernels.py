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
def nesterov(delta: F32, master: F32, momentum: F32, published: F32, lr: np.float32, mu: np.float32, out: F32) -> None:
    """b ← μb + Δ; Θ ← Θ − η(Δ + μb) (DiLoCo, arXiv 2311.08105); out = Θ − Θ̂."""
    for i in range(delta.size):
        b = mu * momentum[i] + delta[i]
        momentum[i] = b
        theta = master[i] - lr * (delta[i] + mu * b)
        master[i] = theta
        out[i] = theta - published[i]


@_jit
def sgd(delta: F32, master: F32, published: F32, lr: np.float32, out: F32) -> None:
    """Θ ← Θ − ηΔ; out = Θ − Θ̂."""
    for i in range(delta.size):
        theta = master[i] - lr * delta[i]
        master[i] = theta
        out[i] = theta - published[i]
