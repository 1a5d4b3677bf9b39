"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shared.files import DISK

HELLO = b"hello"


def fill(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def test_a_written_file_is_there_and_nothing_beside_it(tmp_path: Path) -> None:
    DISK.put(tmp_path / "file", fill(HELLO))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": HELLO}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("a fault"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_the_old_file_and_no_partial_one(
    tmp_path: Path, error: BaseException
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def half(path: Path) -> None:
        path.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        DISK.put(tmp_path / "file", half)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_a_file_never_has_its_name_before_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        seen.append((tmp_path / "file").exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    DISK.put(tmp_path / "file", fill(HELLO))
    assert seen == [False, True], "the bytes before the rename, the directory after it"


def test_a_sync_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="broken"):
        DISK.put(tmp_path / "file", fill(HELLO))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_pieces_are_all_written_however_little_the_system_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    real = os.pwritev

    def takes(descriptor: int, pieces: Sequence[bytes | memoryview], offset: int) -> int:
        return real(descriptor, [b"".join(pieces)[:at_once]], offset)

    monkeypatch.setattr(os, "pwritev", takes)
    DISK.write_at(tmp_path / "file", 2, [b"ab", b"", memoryview(b"cde"), b"f"])
    assert (tmp_path / "file").read_bytes() == b"\0\0abcdef"
    DISK.write_at(tmp_path / "file", 3, [b"xy"])
    assert (tmp_path / "file").read_bytes() == b"\0\0axydef"


def test_more_pieces_than_a_system_call_takes_are_written(tmp_path: Path) -> None:
    DISK.write_at(tmp_path / "file", 0, [b"%d," % n for n in range(5000)])
    assert (tmp_path / "file").read_bytes() == b"".join(b"%d," % n for n in range(5000))
