"""Blobs that are what their names say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from coordinator.store.files import Blobs, file_digest, tree_bytes
from shared.errors import CorruptError

HELLO = b"hello"
HELLO_DIGEST = blake3(HELLO).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    (tmp_path / "blobs").mkdir()
    return Blobs(tmp_path / "blobs")


# ---- blobs


def test_a_blob_is_found_under_its_own_digest(blobs: Blobs) -> None:
    assert blobs.put(HELLO) == HELLO_DIGEST
    assert blobs.verify(HELLO_DIGEST).read_bytes() == HELLO
    assert blobs.path(HELLO_DIGEST) == blobs.directory / HELLO_DIGEST[:2] / HELLO_DIGEST
    assert blobs.has(HELLO_DIGEST, 5)
    assert not blobs.has(HELLO_DIGEST, 6)


def test_the_same_blob_may_be_put_twice(blobs: Blobs) -> None:
    assert blobs.put(HELLO) == blobs.put(HELLO)
    assert tree_bytes(blobs.directory) == 5


def test_a_flipped_bit_is_told_by_the_blobs_name(blobs: Blobs) -> None:
    path = blobs.path(blobs.put(HELLO))
    path.write_bytes(b"hellp")
    with pytest.raises(CorruptError, match=rf"{path} is corrupt.*restore it from a backup$"):
        blobs.verify(HELLO_DIGEST)


def test_what_this_process_wrote_is_not_read_again_and_what_another_wrote_is(blobs: Blobs) -> None:
    path = blobs.path(blobs.put(HELLO))
    path.write_bytes(b"hellp")
    assert blobs.sound(HELLO_DIGEST) == path
    with pytest.raises(CorruptError, match="is corrupt"):
        Blobs(blobs.directory).sound(HELLO_DIGEST)
    blobs.remove(HELLO_DIGEST)
    with pytest.raises(CorruptError, match="cannot be read"):
        blobs.sound(HELLO_DIGEST)


def test_a_blob_is_hashed_beside_its_writing_as_it_is_without(blobs: Blobs) -> None:
    with ThreadPoolExecutor(1) as executor:
        assert blobs.put(b"he", memoryview(b"llo"), executor=executor) == HELLO_DIGEST
    assert blobs.verify(HELLO_DIGEST).read_bytes() == HELLO


def test_what_a_crash_left_without_a_name_is_swept(blobs: Blobs) -> None:
    blobs.put(HELLO)
    (blobs.directory / ".half").write_bytes(b"hel")
    assert blobs.sweep({HELLO_DIGEST}) == 1
    assert tree_bytes(blobs.directory) == 5


def test_a_missing_blob_is_told_by_its_name(blobs: Blobs) -> None:
    with pytest.raises(CorruptError, match=rf"{HELLO_DIGEST} cannot be read: No such file"):
        blobs.verify(HELLO_DIGEST)


def test_an_adopted_file_moves_into_place(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(HELLO)
    blobs.adopt(tmp_path / "spool", HELLO_DIGEST)
    assert not (tmp_path / "spool").exists()
    assert blobs.verify(HELLO_DIGEST).read_bytes() == HELLO


def test_a_removed_blob_is_gone_and_may_be_removed_again(blobs: Blobs) -> None:
    blobs.put(HELLO)
    blobs.remove(HELLO_DIGEST)
    blobs.remove(HELLO_DIGEST)
    assert not blobs.has(HELLO_DIGEST, 5)


def test_a_files_digest_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: more than one piece
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == blake3(data).hexdigest()


def test_the_size_of_a_tree_counts_every_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"1")
    (tmp_path / "a" / "b" / "two").write_bytes(b"22")
    assert tree_bytes(tmp_path) == 3
