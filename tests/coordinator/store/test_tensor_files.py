"""safetensors files in pieces: the library reads what was written, and what the library wrote is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from coordinator.store import tensor_files
from coordinator.store.tensor_files import TensorWriter, open_tensors, write_tensors
from shared.fragments import F32

METADATA = {"run": "run-1", "version": "16", "said": 'a "quote", an ü and a \n line'}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these tensors have several, and the last one is shorter."""
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 64)


def tensors() -> dict[str, F32]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"master": (51,), "a.scalar": (), "matrix": (7, 9), "b": (1, 1, 3)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def same(found: dict[str, F32], wanted: dict[str, F32]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == np.float32
        and found[name].shape == wanted[name].shape
        and found[name].tobytes() == wanted[name].tobytes()
        for name in wanted
    )


def read(path: Path) -> tuple[dict[str, F32], dict[str, str]]:
    with open_tensors(path) as file:
        found = {name: np.full(shape, np.nan, np.float32) for name, shape in file.shapes.items()}
        for name, array in found.items():
            file.read_into(name, array.reshape(-1))
        return found, file.metadata


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", tensors(), METADATA)
    assert same(load_file(tmp_path / "file"), tensors())
    with safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata() == METADATA
    length = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert length % 8 == 0, "so that tensors are aligned where the file is mapped"


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    """As in the checkpoints of earlier versions of Isthmus."""
    save_file(tensors(), tmp_path / "file", METADATA)
    found, metadata = read(tmp_path / "file")
    assert same(found, tensors())
    assert metadata == METADATA


def test_tensors_may_come_in_any_order_and_the_metadata_last(tmp_path: Path) -> None:
    held = tensors()
    shapes = {name: values.shape for name, values in held.items()}
    with TensorWriter(tmp_path / "file", shapes, {"versions": "9" * 40}) as writer:
        for name in reversed(held):
            writer.write(name, held[name])
        writer.finish({"versions": "1,2,3"})
    assert same(load_file(tmp_path / "file"), held)
    assert read(tmp_path / "file")[1] == {"versions": "1,2,3"}


def test_metadata_that_is_longer_than_its_room_does_not_run_into_the_tensors(tmp_path: Path) -> None:
    with (
        TensorWriter(tmp_path / "file", {"a": (3,)}, {"versions": "1"}) as writer,
        pytest.raises(ValueError, match="room for"),
    ):
        writer.finish({"versions": "1" * 20})


def test_a_tensor_of_another_size_than_announced_is_refused(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "file", {"a": (3,)}, {}) as writer, pytest.raises(ValueError, match="16 bytes"):
        writer.write("a", np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        b'{"a": {"dtype": "F32", "shape": [1073741824], "data_offsets": [0, 4294967296]}}',
        b'{"__metadata__": [], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_a_malformed_header_is_an_error_with_a_reason(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"."):
        open_tensors(tmp_path / "file")


@pytest.mark.parametrize("size", [0, 7, 8, 2**62])
def test_a_header_that_is_not_there_is_an_error_with_a_reason(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(size.to_bytes(8, "little")[: min(size, 8)])
    with pytest.raises(ValueError, match=r"short|claims"):
        open_tensors(tmp_path / "file")
