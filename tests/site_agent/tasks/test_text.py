from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.errors import ConfigError
from shared.task import BatchStream, Shard
from site_agent.tasks.corpus import Corpus, read_bytes
from site_agent.tasks.options import Partition
from site_agent.tasks.text import Blocks, Text, WindowStream, cut, evenly_spread

CONTEXT = 15
WINDOW = CONTEXT + 1


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def open_text(path: str, context: int, block_bytes: int, held_out: float) -> Text:
    return cut(read_bytes(path), context, block_bytes, held_out)


def corpus_of(ids: npt.NDArray[np.uint8]) -> Corpus:
    return Corpus((ids,), ("here",))


def whole(text: Text) -> bytes:
    return b"".join(piece.tobytes() for piece in text.corpus.pieces(0, len(text.corpus)))


def numbered(count: int) -> Text:
    """A text whose bytes do not matter; tests look at positions."""
    bounds = np.arange(count + 1, dtype=np.int64) * 100
    blocks = Blocks(bounds[:-1], bounds[1:])
    held = evenly_spread(count, max(1, count // 10))
    corpus = np.random.default_rng(0).integers(0, 256, count * 100, dtype=np.uint8)
    return Text(corpus_of(corpus), WINDOW, train=blocks.pick(~held), held_out=blocks.pick(held))


WHOLE = Shard(0, 1)


def stream(text: Text, shard: Shard = WHOLE, batch_size: int = 4) -> WindowStream:
    return WindowStream(text, text.training_parts(shard, "sharded"), shard, batch_size)


def positions(blocks: Blocks) -> set[int]:
    return {int(i) for a, b in zip(blocks.starts, blocks.ends, strict=True) for i in range(a, b)}


def epoch_order(s: WindowStream, epoch: int) -> list[int]:
    s.load_state_dict({"epoch": epoch, "position": 0})
    return [int(start) for start in s._order]


# ---- the split


@pytest.mark.parametrize("size", [2 * WINDOW, 777, 5_000, 100_000])
def test_blocks_cover_every_byte_once(tmp_path: Path, size: int) -> None:
    text = open_text(str(write(tmp_path / "a.txt", b"x" * size)), CONTEXT, 1024, 0.05)
    train, held = positions(text.train), positions(text.held_out)
    assert train | held == set(range(size))
    assert not train & held
    lengths = np.concatenate([text.train.ends - text.train.starts, text.held_out.ends - text.held_out.starts])
    assert lengths.min() >= WINDOW


def test_a_small_text_still_has_64_blocks(tmp_path: Path) -> None:
    text = open_text(str(write(tmp_path / "a.txt", b"x" * 64 * WINDOW)), CONTEXT, 16_384, 0.05)
    assert len(text.train.starts) + len(text.held_out.starts) == 64


def test_a_large_text_is_cut_at_block_bytes(tmp_path: Path) -> None:
    text = open_text(str(write(tmp_path / "a.txt", b"x" * 100_000)), CONTEXT, 1000, 0.05)
    assert len(text.train.starts) + len(text.held_out.starts) == 100
    assert len(text.held_out.starts) == 5


def test_held_out_blocks_are_spread_evenly() -> None:
    where = np.flatnonzero(evenly_spread(1000, 50))
    assert len(where) == 50
    assert set(np.diff(where)) == {20}
    assert evenly_spread(3, 1).tolist() == [False, True, False]


def test_something_is_held_out_and_something_trained_on_whatever_the_share(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.txt", b"x" * 3 * WINDOW))
    assert len(open_text(path, CONTEXT, WINDOW, 0.001).held_out.starts) == 1
    assert len(open_text(path, CONTEXT, WINDOW, 0.999).train.starts) == 1


def test_too_little_text_for_the_context_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"31 bytes .*context = 15, which needs 32 "):
        open_text(str(write(tmp_path / "a.txt", b"x" * 31)), CONTEXT, 16_384, 0.05)


# ---- shards


def test_no_two_shards_share_a_byte_of_their_own_parts() -> None:
    text = numbered(50)
    seen: list[set[int]] = []
    for index in range(7):
        s = stream(text, Shard(index, 7, seed=3))
        starts = {start for epoch in range(0, 20, 2) for start in epoch_order(s, epoch)}
        seen.append({start + i for start in starts for i in range(WINDOW)})
    seen.append(positions(text.held_out))
    assert sum(map(len, seen)) == len(set.union(*seen))


@pytest.mark.parametrize("partition", ["sharded", "contiguous"])
def test_shards_together_are_all_training_parts(partition: Partition) -> None:
    text = numbered(50)
    shards = [positions(text.training_parts(Shard(i, 7), partition)[0]) for i in range(7)]
    assert set.union(*shards) == positions(text.train)
    assert sum(map(len, shards)) == len(positions(text.train))


def test_a_contiguous_shard_is_a_run_of_the_text() -> None:
    text = numbered(50)
    blocks = text.train
    first, second = (text.training_parts(Shard(i, 2), "contiguous")[0] for i in range(2))
    half = len(blocks.starts) // 2
    assert first.starts.tolist() == blocks.starts[:half].tolist()
    assert second.starts.tolist() == blocks.starts[half:].tolist()


def test_a_local_partition_uses_all_of_the_sites_own_text() -> None:
    text = numbered(50)
    assert positions(text.training_parts(Shard(3, 7), "local")[0]) == positions(text.train)


def test_too_little_text_for_the_shards_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"1000 bytes .* 9 training blocks, too few for 10 shards; add"):
        numbered(10).training_parts(Shard(0, 10), "sharded")


@pytest.mark.parametrize("index", [-1, 2, 3])
def test_a_shard_that_is_none_of_the_count_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=f"no shard {index} of 2"):
        numbered(10).training_parts(Shard(index, 2), "sharded")


# ---- the stream


def test_batches_are_rows_of_context_and_one_more_byte_of_the_text() -> None:
    text = numbered(20)
    batch = next(stream(text, batch_size=5))
    assert batch.shape == (5, WINDOW)
    assert batch.dtype == torch.int64
    for row in batch:
        assert bytes(row.tolist()) in whole(text)


def test_an_epoch_shows_windows_that_do_not_overlap_and_no_other_epoch_the_same_cuts() -> None:
    s = stream(numbered(20))
    orders = [epoch_order(s, epoch) for epoch in range(5)]
    for order in orders:
        assert min(np.diff(sorted(order))) >= WINDOW
        assert order != sorted(order)
    assert len({frozenset(order) for order in orders}) == 5


def test_a_block_of_one_window_is_in_every_epoch_and_every_evaluation() -> None:
    starts = np.arange(10, dtype=np.int64) * WINDOW
    blocks = Blocks(starts, starts + WINDOW)
    text = Text(corpus_of(np.zeros(10 * WINDOW, dtype=np.uint8)), WINDOW, train=blocks, held_out=blocks)
    for epoch in range(20):
        assert sorted(epoch_order(stream(text), epoch)) == starts.tolist()
    assert [len(batch) for batch in text.held_out_batches(100, 1)] == [10]


def test_every_byte_of_the_shard_is_reached_in_time() -> None:
    text = numbered(20)
    s = stream(text, Shard(0, 2))
    starts = {start for epoch in range(0, 400, 2) for start in epoch_order(s, epoch)}
    assert {b + i for b in starts for i in range(WINDOW)} == positions(text.training_parts(Shard(0, 2), "sharded")[0])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_site_that_has_been_through_its_own_part_goes_on_to_the_others(count: int) -> None:
    """A fast site would else see its part many times while most of a slow one's has not been seen at all."""
    text = numbered(50)
    parts = text.training_parts(Shard(0, count), "sharded")
    assert set.union(*map(positions, parts)) == positions(text.train)
    assert sum(len(positions(part)) for part in parts) == len(positions(text.train))
    s = stream(text, Shard(0, count))
    for epoch in range(4):
        inside = positions(parts[epoch % len(parts)])
        assert {b + i for b in epoch_order(s, epoch) for i in range(WINDOW)} <= inside


def test_a_batch_crosses_into_the_next_epoch_and_no_window_is_lost() -> None:
    text = numbered(20)
    s = stream(text, batch_size=7)
    expected = np.concatenate([stream(text).text.gather(np.array(epoch_order(s, e))).numpy() for e in range(2)])
    s.load_state_dict({"epoch": 0, "position": 0})
    got = np.concatenate([next(s).numpy() for _ in range(len(expected) // 7)])
    assert np.array_equal(got, expected[: len(got)])
    assert s.state_dict()["epoch"] == 1


def test_a_shard_of_fewer_windows_than_a_batch_still_yields() -> None:
    s = stream(numbered(3), Shard(0, 2), batch_size=100)
    assert next(s).shape == (100, WINDOW)
    assert s.state_dict()["epoch"] > 10


@pytest.mark.parametrize("done", [0, 1, 5, 28, 29, 30, 200])
def test_restored_stream_continues_at_the_next_unseen_batch(done: int) -> None:
    text = numbered(20)
    running = stream(text, Shard(1, 2, seed=9))
    for _ in range(done):
        next(running)
    state = running.state_dict()
    assert all(type(value) is int for value in state.values())
    restored = stream(text, Shard(1, 2, seed=9))
    next(restored)
    restored.load_state_dict(state)
    for _ in range(40):
        assert torch.equal(next(restored), next(running))


def test_a_state_beyond_a_text_that_has_shrunk_begins_the_next_epoch() -> None:
    s = stream(numbered(20))
    s.load_state_dict({"epoch": 2, "position": 10**6})
    batch = next(s)
    assert torch.equal(batch, s.text.gather(np.array(epoch_order(s, 3)[:4])))


def test_the_seed_and_the_shard_decide_the_order() -> None:
    text = numbered(20)
    first = {(index, seed): epoch_order(stream(text, Shard(index, 2, seed)), 0) for index in (0, 1) for seed in (0, 1)}
    assert first == {key: epoch_order(stream(text, Shard(key[0], 2, key[1])), 0) for key in first}
    assert first[0, 0] != first[0, 1]
    local = [WindowStream(text, [text.train], Shard(index, 2), 4) for index in (0, 1)]
    assert epoch_order(local[0], 0) != epoch_order(local[1], 0)


def test_the_stream_is_a_batch_stream() -> None:
    s = stream(numbered(20))
    assert isinstance(s, BatchStream)
    assert iter(s) is s


# ---- the held-out set


def test_held_out_batches_are_always_the_same_and_never_trained_on() -> None:
    text = numbered(100)
    first, again = text.held_out_batches(4, 32), text.held_out_batches(4, 32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    held = b"|".join(whole(text)[a:b] for a, b in zip(text.held_out.starts, text.held_out.ends, strict=True))
    assert all(bytes(row.tolist()) in held for batch in first for row in batch)


def test_held_out_batches_are_limited_and_spread_over_all_held_out_blocks() -> None:
    text = numbered(100)  # 10 held-out blocks of 6 windows each
    batches = text.held_out_batches(5, 2)
    assert [len(batch) for batch in batches] == [5, 5]
    corpus = whole(text)
    starts = sorted(corpus.index(bytes(row.tolist())) for batch in batches for row in batch)
    assert [start // 100 for start in starts] == [int(start) // 100 for start in text.held_out.starts]


def test_the_last_held_out_batch_may_be_smaller() -> None:
    assert [len(batch) for batch in numbered(100).held_out_batches(25, 32)] == [25, 25, 10]


# ---- as it is leased


def test_the_shards_hold_every_training_window_once_and_none_held_out(tmp_path: Path) -> None:
    text = open_text(str(write(tmp_path / "t.txt", bytes(range(256)) * 40)), context=9, block_bytes=100, held_out=0.1)
    manifest = text.manifest()
    starts = np.concatenate(text.shards)
    assert sum(manifest.sizes) == len(starts) == len(set(starts.tolist()))
    assert sorted(starts.tolist()) == sorted(text.train.windows(10, 0).tolist())
    batch = text.pick([(1, 0), (0, 1)])
    assert batch.tolist() == text.gather(np.array([text.shards[1][0], text.shards[0][1]])).tolist()


def test_a_manifest_is_of_the_text_and_its_cut(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    path = str(write(tmp_path / "t.txt", content))
    same = open_text(path, 9, 100, 0.1).manifest()
    assert open_text(path, 9, 100, 0.1).manifest() == same
    assert open_text(path, 9, 200, 0.1).manifest().digest != same.digest
    assert open_text(path, 8, 100, 0.1).manifest().digest != same.digest
    write(tmp_path / "t.txt", content[:5000] + b"x" + content[5001:])
    assert open_text(path, 9, 100, 0.1).manifest().digest != same.digest


def test_a_long_text_is_leased_in_shards_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site_agent.tasks.text.MOST_SHARDS", 3)
    text = open_text(str(write(tmp_path / "t.txt", bytes(range(256)) * 40)), context=9, block_bytes=100, held_out=0.1)
    assert len(text.shards) == 3
    assert sorted(np.concatenate(text.shards).tolist()) == sorted(text.train.windows(10, 0).tolist())
