"""Chunks on all cores: what comes of them does not depend on how many threads there are, nor does what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import parallel
from shared.codecs import codec_named
from shared.container_files import write_flat
from shared.errors import FormatError
from shared.fragments import CHUNK_ELEMENTS, Chunk, Fragment, TensorSpec
from shared.parallel import in_order, over_chunks
from shared.wire import Buffer, encode_flat, open_container, pack_container, pack_section, tensor_table
from tests.shared.make_golden import CODEC_NAMES, header

CHUNKS = [Chunk(at, at + CHUNK_ELEMENTS) for at in range(0, 9 * CHUNK_ELEMENTS, CHUNK_ELEMENTS)]
LARGE = Fragment(0, (TensorSpec("a", (2 * CHUNK_ELEMENTS + 7,)), TensorSpec("b", (3, 5)), TensorSpec("c", (5000,))))
FLAT = np.random.default_rng(0).standard_normal(LARGE.size, dtype=np.float32)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The machine has so many cores."""
    count: int = request.param
    with ThreadPoolExecutor(count) as pool:
        monkeypatch.setattr(parallel, "CORES", count)
        monkeypatch.setattr(parallel, "_THREADS", pool)
        yield count


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    monkeypatch.setattr(parallel, "CORES", 2)
    with ThreadPoolExecutor(2) as pool:
        yield pool


class AtOnce(Executor):
    """Threads that are none, as the simulator's."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Nobody(Executor):
    """Threads that must not be asked."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise AssertionError("a thread was asked")


# ---- results


def test_results_come_in_the_order_of_the_chunks(threads: int) -> None:
    wanted = [(section, chunk.start) for section, chunk in enumerate(CHUNKS)]
    assert over_chunks(CHUNKS, lambda section, chunk: (section, chunk.start)) == wanted
    assert list(in_order(CHUNKS, lambda section, chunk: (section, chunk.start))) == wanted


@pytest.mark.parametrize(
    "chunks", [[], [Chunk(0, CHUNK_ELEMENTS)], [Chunk(at, at + 64) for at in range(0, 64_000, 64)]]
)
def test_what_is_soon_done_stays_on_the_thread_that_asks(chunks: list[Chunk]) -> None:
    for results in (over_chunks(chunks, lambda n, _: n, Nobody()), in_order(chunks, lambda n, _: n, Nobody())):
        assert list(results) == list(range(len(chunks)))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_bytes_and_values_are_those_of_one_chunk_after_the_other(
    threads: int, codec: str, level: int, tmp_path: Path
) -> None:
    described = header(codec, level > 0).model_copy(update={"fragment": 0, "tensors": tensor_table(LARGE)})
    sections, lost, sums = list[Buffer](), FLAT.copy(), FLAT.copy()
    for chunk in LARGE.chunks():
        x, left, acc = (vector[chunk.start : chunk.stop] for vector in (FLAT, lost, sums))
        raw = codec_named(codec).encode(x, left, -1.0)
        codec_named(codec).accumulate(raw, 0.5, acc)
        sections.append(pack_section(raw, level))
    wanted = pack_container(described, sections)

    residual, moved = np.empty_like(FLAT), FLAT.copy()
    assert encode_flat(described, LARGE, FLAT, level, residual) == wanted
    assert residual.tobytes() == lost.tobytes()
    in_place = FLAT.copy()
    assert encode_flat(described, LARGE, in_place, level, in_place) == wanted
    assert in_place.tobytes() == lost.tobytes()
    write_flat(tmp_path / "file", described, LARGE, FLAT, level)
    assert (tmp_path / "file").read_bytes() == wanted
    for source in (wanted, tmp_path / "file"):
        with open_container(source, LARGE) as opened:
            np.copyto(moved, FLAT)
            opened.add_to(moved, 0.5)
            assert moved.tobytes() == sums.tobytes()


# ---- what goes wrong


def test_the_first_chunk_that_fails_is_named_whichever_fails_first(two_cores: Executor) -> None:
    other_failed = threading.Event()

    def work(section: int, _: Chunk) -> None:
        if section == 1:
            other_failed.set()
            raise FormatError("section 1")
        other_failed.wait()
        raise FormatError(f"section {section}")

    with pytest.raises(FormatError, match=r"^section 0$"):
        over_chunks(CHUNKS, work, two_cores)


def test_nothing_is_at_work_any_more_when_an_error_comes_out(two_cores: Executor) -> None:
    failed, ended = threading.Event(), []

    def work(section: int, _: Chunk) -> None:
        if section == 1:
            failed.set()
            raise FormatError("section 1")
        failed.wait()
        ended.append(section)

    with pytest.raises(FormatError, match="section 1"):
        over_chunks(CHUNKS, work, two_cores)
    assert 0 in ended


def test_nothing_more_is_begun_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CORES", 3)
    begun = []

    def work(section: int, _: Chunk) -> None:
        begun.append(section)
        if section == 2:
            raise FormatError("section 2")

    with pytest.raises(FormatError, match="section 2"):
        over_chunks(CHUNKS, work, AtOnce())
    assert begun == [0, 1, 2]


def test_results_that_nobody_wants_any_more_are_not_in_the_making(two_cores: Executor) -> None:
    begun, ended = [], []

    def work(section: int, _: Chunk) -> int:
        begun.append(section)
        ended.append(section)
        return section

    results = in_order(CHUNKS, work, two_cores)
    assert next(results) == 0
    results.close()
    assert sorted(begun) == sorted(ended)
    assert len(begun) <= 1 + 2 * 2


def test_a_damaged_section_is_named_whatever_thread_reads_it(threads: int) -> None:
    described = header("int8", True).model_copy(update={"fragment": 0, "tensors": tensor_table(LARGE)})
    sections = [pack_section(codec_named("int8").encode(FLAT[chunk.start : chunk.stop]), 1) for chunk in LARGE.chunks()]
    sections[1:3] = [b"x" * len(section) for section in sections[1:3]]
    with (
        open_container(pack_container(described, sections), LARGE) as opened,
        pytest.raises(FormatError, match=r"^section 1 is not a sound zstd frame"),
    ):
        opened.add_to(FLAT.copy())


def test_values_that_are_not_finite_are_refused_on_any_number_of_threads(threads: int, tmp_path: Path) -> None:
    flat = FLAT.copy()
    flat[CHUNK_ELEMENTS + 1] = np.nan
    described = header("int4", True).model_copy(update={"tensors": tensor_table(LARGE)})
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_flat(described, LARGE, flat, 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_flat(tmp_path / "file", described, LARGE, flat, 1)
