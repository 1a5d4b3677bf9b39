"""The encoder of topk2 for accelerators: chosen on the device, written on the host.

Where the elements lie goes into a Rice code, bit after bit, which is no work for an accelerator, and the fit of the two
levels is one of k values of 4096. So the device finds the k largest of each block, two bytes of place and four of value
for each come to the host (0.19 bytes a parameter at k = 128, less than half of int4's), and the CPU's own kernels
make of them what they make of their own, on all cores. What they decode to goes back, to be taken from what was
encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from shared.codecs import Codec, TopK
from shared.codecs.kernels import F32, I32, U8
from shared.codecs.topk_kernels import BLOCK, kept
from shared.fragments import Chunk
from shared.parallel import over_chunks
from site_agent.training.encoders.tiling import block_counts, slabs, to_blocks

SLAB_ELEMENTS = 1 << 22
"""Its keys are int64: some 100 MiB for what lies between the operations."""
INDEX_BITS = 12


def encode(codec: Codec, x: Tensor, chunks: Sequence[Chunk]) -> list[U8]:
    """An encoder; see `site_agent.training.encoders`."""
    if not isinstance(codec, TopK):
        raise TypeError(f"{codec.name} is encoded elsewhere")
    counts = block_counts(chunks, BLOCK)
    keeps = torch.from_numpy(_keeps(codec.k, chunks)).to(x.device)  # (B, 1)
    places, values, at = [], [], 0
    for slab in slabs(chunks, SLAB_ELEMENTS):
        blocks = to_blocks(x, slab, BLOCK)
        found = _choose(blocks, codec.k, keeps[at : at + len(blocks)])
        places.append(found)
        values.append(blocks.gather(1, found.long()))
        at += len(blocks)
    place, value = torch.cat(places), torch.cat(values)  # (B, k)
    indices, kept_values = _on_host(place, value)
    stops = list(accumulate(counts))

    def write(section: int, chunk: Chunk) -> tuple[U8, F32]:
        rows = slice(stops[section] - counts[section], stops[section])
        return codec.write(indices[rows], kept_values[rows], chunk.size)

    written = over_chunks(chunks, write)
    starts = [at for chunk in chunks for at in range(chunk.start, chunk.stop, BLOCK)]
    at_element = torch.tensor(starts, device=x.device)[:, None] + place.long()
    lost = torch.from_numpy(np.concatenate([decoded for _, decoded in written])).to(x.device)
    x.index_add_(0, at_element.view(-1), lost.view(-1), alpha=-1)
    return [section for section, _ in written]


def _on_host(place: Tensor, value: Tensor) -> tuple[I32, F32]:
    """Both in one copy, because each is a wait for the device."""
    both: U8 = torch.cat([value.view(torch.uint8), place.view(torch.uint8)], dim=1).cpu().numpy()
    cut = 4 * place.shape[1]
    values, places = np.ascontiguousarray(both[:, :cut]), np.ascontiguousarray(both[:, cut:])
    return places.view(np.int16).astype(np.int32), values.view(np.float32)


def _keeps(k: int, chunks: Sequence[Chunk]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """How many elements each block keeps, (blocks, 1)."""
    of_blocks = [
        kept(k, min(BLOCK, chunk.stop - at)) for chunk in chunks for at in range(chunk.start, chunk.stop, BLOCK)
    ]
    return np.array(of_blocks, dtype=np.int64)[:, None]


def _choose(blocks: Tensor, k: int, keeps: Tensor) -> Tensor:
    """The places of the k largest of each block, in order, int16 (blocks, k); of equals, those that come first. A block
    that keeps fewer has them first, then zeros."""
    magnitude = (blocks.view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    # No two keys are equal, so that what is chosen does not depend on how a device breaks ties.
    last = (1 << INDEX_BITS) - 1
    from_end = torch.arange(last, -1, -1, device=blocks.device)
    chosen = ((magnitude << INDEX_BITS) | from_end).topk(k, dim=1).values
    places = last - (chosen & last)
    spare = torch.arange(k, device=blocks.device) >= keeps
    ordered = places.masked_fill(spare, BLOCK).sort(dim=1).values
    return ordered.masked_fill(spare, 0).to(torch.int16)
