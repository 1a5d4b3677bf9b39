"""Who owns which fragment: dealt out in turn, put together again, and refused where it cannot be."""

from __future__ import annotations

import re

import pytest

from shared.errors import ConfigError
from shared.fragments import Layout
from shared.sharding import WHOLE, Slice, home, interleave, slice_of

URLS = ["https://a:8470", "https://b:8470", "https://c:8470"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("fragments", [5, 6, 7])
def test_every_fragment_has_one_home_and_comes_back_from_there(fragments: int, count: int) -> None:
    whole = list(range(fragments))
    slices = [Slice(index, count).of(whole) for index in range(count)]
    assert interleave(slices) == whole
    assert max(map(len, slices)) - min(map(len, slices)) <= 1
    for p in whole:
        coordinator, number = home(p, count)
        assert slices[coordinator][number] == p
        assert Slice(coordinator, count).whole(number) == p


def test_a_coordinator_numbers_its_fragments_from_0() -> None:
    layout = Layout.from_wire([[("a", [1])], [("b", [2])], [("c", [3])]])
    own = Slice(1, 2).of_layout(layout)
    assert own == Layout.from_wire([[("b", [2])]])
    assert [fragment.index for fragment in Slice(0, 2).of_layout(layout).fragments] == [0, 1]
    assert WHOLE.of_layout(layout) == layout


def test_a_shard_is_one_of_the_coordinators() -> None:
    assert slice_of([], None) == WHOLE
    assert [slice_of(URLS, shard) for shard in range(3)] == [Slice(0, 3), Slice(1, 3), Slice(2, 3)]


@pytest.mark.parametrize(
    ("urls", "shard", "says"),
    [
        (
            URLS,
            None,
            "--shard is missing: [run] coordinators has 3 entries; say which of them this one is, from 0 to 2",
        ),
        (URLS, 3, "--shard 3 is none of the 3 [run] coordinators; use 0 to 2"),
        (URLS, -1, "--shard -1 is none of the 3 [run] coordinators; use 0 to 2"),
        ([], 0, "--shard 0 without [run] coordinators: drop it"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(urls: list[str], shard: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        slice_of(urls, shard)
