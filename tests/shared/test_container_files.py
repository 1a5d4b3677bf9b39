"""Containers that are streamed to a file are those that are built in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared import container_files, parallel
from shared.container_files import write_flat
from shared.fragments import CHUNK_ELEMENTS, Fragment, TensorSpec
from shared.wire import blob_digest, container_pieces, encode_flat, pack_container, tensor_table
from tests.shared.make_golden import CODEC_NAMES, FRAGMENT, header, values
from tests.support.peak import peak_of

LARGE = Fragment(0, (TensorSpec("a", (CHUNK_ELEMENTS + 7,)), TensorSpec("b", (3, 5))))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_a_streamed_container_has_the_bytes_of_one_that_was_built(
    tmp_path: Path, codec: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container_files, "PIECE_BYTES", 100)
    wanted = encode_flat(header(codec, level > 0), FRAGMENT, values(), level)
    digest = write_flat(tmp_path / "file", header(codec, level > 0), FRAGMENT, values(), level)
    assert (tmp_path / "file").read_bytes() == wanted
    assert digest == blob_digest(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "and nothing of the spool stays"


@pytest.mark.parametrize("level", [0, 1])
def test_so_has_one_of_several_chunks(tmp_path: Path, level: int) -> None:
    flat = np.random.default_rng(0).standard_normal(LARGE.size, dtype=np.float32)
    described = header("fp32", level > 0).model_copy(update={"tensors": tensor_table(LARGE)})
    write_flat(tmp_path / "file", described, LARGE, flat, level)
    assert (tmp_path / "file").read_bytes() == encode_flat(described, LARGE, flat, level)


def test_values_that_are_not_finite_leave_no_spool(tmp_path: Path) -> None:
    flat = values()
    flat[-1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        write_flat(tmp_path / "file", header("fp32", True), FRAGMENT, flat, 1)
    assert {path.name for path in tmp_path.iterdir()} <= {"file"}


def test_a_container_in_pieces_is_the_container() -> None:
    sections = [b"one", b"", b"three"]
    assert b"".join(container_pieces(header("fp32", False), sections)) == pack_container(
        header("fp32", False), sections
    )


@pytest.mark.parametrize("level", [0, 1])
def test_memory_does_not_grow_with_the_container(tmp_path: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CORES", 2)
    many = Fragment(0, (TensorSpec("a", (24 * CHUNK_ELEMENTS,)),))
    flat = np.random.default_rng(0).standard_normal(many.size, dtype=np.float32)
    described = header("fp32", level > 0).model_copy(update={"tensors": tensor_table(many)})
    with ThreadPoolExecutor(2) as pool, peak_of() as peak:
        write_flat(tmp_path / "file", described, many, flat, level, pool)
    # One that is written, four that wait or are in the making, and of two of these what they are made of.
    assert peak.bytes < 9 * (4 * CHUNK_ELEMENTS)


class Counting(Executor):
    """Does at once what it is given, and counts the results that nobody has taken yet."""

    def __init__(self) -> None:
        self.held = self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        pool = self

        class Taken(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                pool.held -= 1
                return super().result(timeout)

        self.held += 1
        self.most = max(self.most, self.held)
        future = Taken()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("level", [0, 1])
def test_only_a_few_sections_of_each_core_wait_to_be_written(
    tmp_path: Path, level: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "CORES", cores)
    monkeypatch.setattr(parallel, "CHUNK_ELEMENTS", 100)
    rows = Fragment(0, tuple(TensorSpec(f"{n:02d}", (10,)) for n in range(40)))
    flat = np.random.default_rng(0).standard_normal(rows.size, dtype=np.float32)
    described = header("fp32", level > 0).model_copy(update={"tensors": tensor_table(rows)})
    pool = Counting()
    write_flat(tmp_path / "file", described, rows, flat, level, pool)
    assert (pool.held, pool.most) == (0, 2 * cores)
    assert (tmp_path / "file").read_bytes() == encode_flat(described, rows, flat, level)
