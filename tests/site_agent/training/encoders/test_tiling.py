"""How chunks lie in whole blocks."""

from __future__ import annotations

import pytest
import torch

from shared.fragments import Chunk
from site_agent.training.encoders.tiling import from_blocks, sizes_of_blocks, slabs, to_blocks

CHUNKS = [Chunk(8, 12), Chunk(12, 20), Chunk(20, 25), Chunk(25, 26), Chunk(26, 30)]


def test_blocks_begin_with_their_chunk_and_end_in_zeros() -> None:
    blocks = to_blocks(torch.arange(40.0), CHUNKS, 4)
    assert blocks.tolist() == [
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22, 23],
        [24, 0, 0, 0],
        [25, 0, 0, 0],
        [26, 27, 28, 29],
    ]
    assert from_blocks(blocks, CHUNKS).tolist() == list(range(8, 30))
    assert sizes_of_blocks(CHUNKS, 4, torch.device("cpu")).tolist() == [4, 4, 4, 4, 1, 1, 4]


def test_nothing_is_copied_where_nothing_needs_padding() -> None:
    x = torch.arange(40.0)
    blocks = to_blocks(x, CHUNKS[:2], 4)
    assert blocks.data_ptr() == x[8:].data_ptr()
    assert from_blocks(blocks, CHUNKS[:2]).data_ptr() == blocks.data_ptr()


@pytest.mark.parametrize(("most", "wanted"), [(1, [1, 1, 1, 1, 1]), (12, [2, 3]), (13, [2, 3]), (99, [5])])
def test_a_slab_is_one_chunk_or_has_no_more_than_it_may(most: int, wanted: list[int]) -> None:
    found = list(slabs(CHUNKS, most))
    assert [len(slab) for slab in found] == wanted
    assert [chunk for slab in found for chunk in slab] == CHUNKS
