"""Codecs: how a chunk of fp32 values becomes the raw bytes of a wire section, and back.

A codec sees one chunk at a time (fp32, contiguous, at most 2²⁰ elements) and knows nothing of
compression or framing. `accumulate` is the only decoder: the merge adds `weight ·` values into its sum,
and an anchor moves by `accumulate(raw, 1, anchor)`, the same arithmetic at the coordinator and every site.

    codec     raw bytes/element   scale                    largest error of an element
    fp32      4                   –                        0
    bf16      2                   –                        2⁻⁸ of it
    fp16      2                   –                        2⁻¹¹ of it (beyond ±65504: clipped)
    int8      1 + 1/32            bf16 per block of 64     half a step: max|block|/127, or a wider one
    int4      1/2 + 1/32          bf16 per block of 64     half a step: max|block|/7, or a wider one
    e3m0      1/2 + 1/32          bf16 per block of 64     a third of it, or max|block|/128 if that is more
    topk2-k   about 0.060 for     two bf16 levels per      all of it, where it is not of the k largest of 4096
              k = 256             block of 4096

The block codecs are symmetric. Their scale is rounded *up* to bf16, so the block's largest value never
clips, and costs 2 bytes where fp32 would cost 4 for no measurable loss (tests/shared/codecs). The values of e3m0
are 0 and ±scale·2ⁿ for n from 0 to 6 (one sign bit, three of exponent, as in Streaming DiLoCo, arXiv 2501.18512).
topk2 is in `topk`.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from shared.codecs import kernels
from shared.codecs.codec import Codec
from shared.codecs.dense import DENSE, Dense
from shared.codecs.topk import MOST_KEPT, TopK
from shared.errors import FormatError

__all__ = ["CODECS", "DENSE", "Codec", "Dense", "TopK", "codec_named", "grid", "warm_up"]

CODECS: dict[str, Codec] = {**DENSE, "topk2-256": TopK(256)}
"""Every codec by its name on the wire; of topk2, whose k is part of its name, the default."""

_TOPK = re.compile(r"topk2-([1-9][0-9]{0,4})")


@cache
def codec_named(name: str) -> Codec:
    """The codec of this name on the wire. Raises FormatError."""
    if name in CODECS:
        return CODECS[name]
    match = _TOPK.fullmatch(name)
    if match is None or int(match[1]) > MOST_KEPT:
        raise FormatError(f"codec {name[:32]!r} is not known here; {', '.join(CODECS)} would do")
    return TopK(int(match[1]))


@cache
def grid(name: str, step: float) -> Codec:
    """The codec of this name, encoding integers on no finer a grid than `step` root mean squares of a block; what it
    makes of floats and of topk2 does not depend on it. Raises FormatError."""
    codec = codec_named(name)
    return codec.with_step(step) if isinstance(codec, Dense) and step > 0 else codec


def warm_up() -> None:
    """Compile (or load from the cache) every kernel now, so that no round pays for it.

    A section may come as read-only bytes, which numba compiles for by themselves.
    """
    x = np.ones(kernels.BLOCK + 1, dtype=np.float32)
    for codec in CODECS.values():
        raw = codec.encode(x, x.copy())
        for section in (raw, np.frombuffer(raw.tobytes(), dtype=np.uint8)):
            codec.decode(section, x.size)
            codec.screen(section, x.size)
    kernels.square_sum(x)
