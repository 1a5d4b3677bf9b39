"""Encoders for accelerators: a pseudo-gradient becomes wire sections on the device that holds it.

What comes to the host are the sections' raw bytes, for int4 half a byte a parameter where fp32 would be four. They are
the formats of `shared.codecs`, and of the same values the same bytes wherever the device divides and takes roots as
IEEE 754 says, as CPUs and CUDA devices do; elsewhere a block's scale may be another by its own rounding. Nothing
depends on which: what the codec lost is computed from what was encoded.

On the CPU the numba kernels do this in one pass and these would take many, so they are for accelerators alone; tests
run them on the CPU beside the numba kernels. Launches are what short vectors cost on an accelerator, so all chunks of a
fragment go through together, in slabs that bound the memory for what lies between the operations. int8 and int4 have
a Triton kernel that is one launch and one pass (`fused`). What a device is trusted with it first does on a sample.

An encoder takes a codec, a vector x, fp32 (elements,) on the device, and the chunks that are all of it. It gives the
raw bytes of each chunk, on the host, and leaves in x what the codec lost. It raises ValueError on NaN, infinity, or
what is too large; x is of no use then. The device is waited for once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from shared.codecs import Codec, TopK
from shared.codecs.kernels import U8
from shared.fragments import Chunk
from site_agent.training.encoders import dense, topk

log = logging.getLogger(__name__)

Encode = Callable[[Codec, Tensor, Sequence[Chunk]], list[U8]]


def torch_operations(codec: Codec) -> Encode:
    """The form of this codec that works on any device that torch has the operations for."""
    return topk.encode if isinstance(codec, TopK) else dense.encode


@cache
def encoder(codec: Codec, device: torch.device) -> Encode | None:
    """How this codec encodes on this device: the first way that does it as the CPU would, to within its own rounding.
    None where none does (a device may lack an operation), or where the device is the CPU: then shared.codecs has to.
    """
    for way, encode in _ways(codec, device):
        try:
            flaw: object = _flaw_of(encode, codec, device)
        except torch.OutOfMemoryError:
            raise  # which says nothing of the way
        except Exception as error:  # whatever a make of device, or a compiler for it, may come upon
            flaw = error
        if not flaw:
            return encode
        log.warning("%s cannot encode %s on %s: %s", way, codec.name, device, flaw)
    return None


def _ways(codec: Codec, device: torch.device) -> Iterator[tuple[str, Encode]]:
    if device.type == "cuda" and codec.name in ("int8", "int4") and find_spec("triton") is not None:
        yield "Triton", _fused
    if device.type != "cpu":
        yield "torch", torch_operations(codec)


def _fused(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
    from site_agent.training.encoders import fused

    return fused.encode(codec, x, chunks)


def _flaw_of(encode: Encode, codec: Codec, device: torch.device) -> str:
    """What is wrong with what `encode` makes of a sample, if anything."""
    chunks = [Chunk(0, 5001), Chunk(5001, 5070)]
    x = np.random.default_rng(0).standard_normal(chunks[-1].stop).astype(np.float32)
    left = torch.from_numpy(x).to(device, copy=True)
    sections, lost = encode(codec, left, chunks), left.cpu().numpy()
    for section, chunk in zip(sections, chunks, strict=True):
        part, kept = x[chunk.start : chunk.stop], lost[chunk.start : chunk.stop]
        best = part.copy()
        codec.encode(part, best, -1.0)
        if not np.array_equal(part - codec.decode(section, part.size), kept):
            return "what it leaves is not what it lost"
        if np.linalg.norm(kept) > 1.05 * np.linalg.norm(best):
            return "it loses more than the CPU"
    return ""
