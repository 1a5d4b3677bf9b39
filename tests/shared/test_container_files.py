"""Containers that are streamed to a file are those that are built in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared import container_files
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
def test_memory_does_not_grow_with_the_container(tmp_path: Path, level: int) -> None:
    many = Fragment(0, (TensorSpec("a", (8 * CHUNK_ELEMENTS,)),))
    flat = np.random.default_rng(0).standard_normal(many.size, dtype=np.float32)
    described = header("fp32", level > 0).model_copy(update={"tensors": tensor_table(many)})
    with peak_of() as peak:
        write_flat(tmp_path / "file", described, many, flat, level)
    assert peak.bytes < 4 * (4 * CHUNK_ELEMENTS)
