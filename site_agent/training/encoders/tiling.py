"""How the chunks of a fragment lie in whole blocks.

A codec's blocks begin with their chunk, and a chunk ends with its tensor, wherever that is: a vector of all blocks of
a fragment needs zeros after each chunk that is not a whole number of them. Where there is none, as with most
models' shapes, the flat vector is that vector already and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shared.fragments import Chunk


def slabs(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Runs of chunks that together have at most `most` elements, or are one."""
    slab: list[Chunk] = []
    for chunk in chunks:
        if slab and chunk.stop - slab[0].start > most:
            yield slab
            slab = []
        slab.append(chunk)
    if slab:
        yield slab


def block_counts(chunks: Sequence[Chunk], block: int) -> list[int]:
    """How many blocks each chunk has."""
    return [-(-chunk.size // block) for chunk in chunks]


def to_blocks(x: Tensor, chunks: Sequence[Chunk], block: int) -> Tensor:
    """The blocks of `chunks`, which follow each other in `x` (elements,): (blocks, block), padded with zeros. A view of
    `x` where nothing needs padding."""
    zeros = x.new_zeros(block)
    pieces, start = [], chunks[0].start
    for chunk in chunks:
        if gap := -chunk.size % block:
            pieces += [x[start : chunk.stop], zeros[:gap]]
            start = chunk.stop
    if start < chunks[-1].stop:
        pieces.append(x[start : chunks[-1].stop])
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(-1, block)


def from_blocks(blocks: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """The inverse of `to_blocks`, (elements of `chunks`,)."""
    flat, block = blocks.view(-1), blocks.shape[1]
    pieces, start, at = [], 0, 0
    for chunk in chunks:
        at += chunk.size
        if gap := -chunk.size % block:
            pieces.append(flat[start:at])
            at += gap
            start = at
    if start < at:
        pieces.append(flat[start:at])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def sizes_of_blocks(chunks: Sequence[Chunk], block: int, device: torch.device) -> Tensor:
    """How many elements each block has, fp32 (blocks,)."""
    counts = block_counts(chunks, block)
    sizes = torch.full((sum(counts),), float(block), device=device)
    short, at = {}, 0
    for chunk, count in zip(chunks, counts, strict=True):
        at += count
        if rest := chunk.size % block:
            short[at - 1] = float(rest)
    if short:
        places = torch.tensor(list(short), device=device)
        sizes[places] = torch.tensor(list(short.values()), device=device)
    return sizes
