"""Encoders for accelerators: a pseudo-gradient becomes wire sections on the device that holds it.

What comes to the host are the sections' raw bytes, for int4 half a byte a parameter where fp32 would be four. They are
the formats of `shared.codecs`, and of the same values the same bytes wherever the device divides and takes roots as
IEEE 754 says, as CPUs and CUDA devices do; elsewhere a block's scale may be another by its own rounding. Nothing
depends on which: what the codec lost is computed from what was encoded.

On the CPU the numba kernels do this in one pass and these would take many, so they are for accelerators alone; tests
run them on the CPU beside the numba kernels. Launches are what short vectors cost on an accelerator, so all chunks of a
fragment go through together, in slabs that bound the memory for what lies between the operations. int8 and int4 have
a Triton kernel that is one launch and one pass (`fused`), which is used on a CUDA device once it has given the same
bytes there as the torch operations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from shared.codecs import Codec, Dense, TopK, kernels
from shared.codecs.kernels import U8
from shared.fragments import Chunk
from site_agent.training.encoders import dense, topk

log = logging.getLogger(__name__)

Encode = Callable[[Dense, Tensor, Sequence[Chunk]], list[U8]]


def encode(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
    """The raw bytes of each of `chunks`, which are all of `x`, fp32 (elements,) on any device; leaves in `x` what the
    codec lost. Raises ValueError on NaN, infinity, or what is too large; `x` is of no use then.

    The device is waited for once.
    """
    if not chunks:
        return []
    if isinstance(codec, TopK):
        return topk.encode(codec, x, chunks)
    if not isinstance(codec, Dense):
        raise TypeError(f"{codec.name} has no encoder for accelerators")
    return _dense(codec, x.device)(codec, x, chunks)


@cache
def _dense(codec: Dense, device: torch.device) -> Encode:
    """How this codec encodes on this device."""
    if device.type != "cuda" or codec.kind not in (kernels.INT8, kernels.INT4) or find_spec("triton") is None:
        return dense.encode
    try:
        from site_agent.training.encoders import fused

        proven = _same(codec, device, fused.encode)
    except Exception as error:  # whatever a compiler for this make of device may come upon
        log.warning("the Triton encoder does not work on %s (%s); %s is encoded without it", device, error, codec.name)
        return dense.encode
    if not proven:
        log.warning("the Triton encoder gives other bytes on %s; %s is encoded without it", device, codec.name)
    return fused.encode if proven else dense.encode


def _same(codec: Dense, device: torch.device, other: Encode) -> bool:
    """Whether `other` makes of a sample what the torch operations make of it."""
    chunks = [Chunk(0, 5001), Chunk(5001, 5070)]
    # Sums of such squares are exact in whatever order.
    sample = ((torch.arange(chunks[-1].stop, device=device) * 7 % 31 - 15) / 8).float()
    left, right = sample.clone(), sample.clone()
    sections = zip(dense.encode(codec, left, chunks), other(codec, right, chunks), strict=True)
    return all(np.array_equal(one, two) for one, two in sections) and torch.equal(left, right)
