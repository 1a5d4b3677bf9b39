"""A site's checkpoints on disk: the last two, whole or not there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigError
from shared.files import Disk
from site_agent import checkpoint


def save(directory: Path, step: int, mark: int, disk: Disk | None = None) -> None:
    manifest = {"run": "run", "mark": mark, "outbox": {"next_number": 10 + mark, "pending": {}}, "numbers": {}}
    checkpoint.save(directory, step, {"w": torch.full((3,), float(mark))}, manifest, disk or Disk())


def flipped(data: bytes) -> bytes:
    """A bit of the last digit is another: what still reads as a number, or a weight."""
    at = max(place for place, byte in enumerate(data) if byte in b"0123456789") if data[:1] == b"{" else len(data) - 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def newest(directory: Path) -> int:
    found = checkpoint.load_newest(directory, "run", "run")
    assert found is not None
    tensors, manifest = found
    assert float(tensors["w"][0]) == manifest["mark"]
    return int(manifest["mark"])


def test_the_last_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for mark, step in enumerate((5, 9, 10, 100)):
        save(tmp_path, step, mark)
        assert newest(tmp_path) == mark
    assert len(list(tmp_path.iterdir())) == 2


def test_a_site_that_waits_may_save_the_same_step_again_and_again(tmp_path: Path) -> None:
    for mark in range(12):
        save(tmp_path, 7, mark)
        assert newest(tmp_path) == mark
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("step", ["write", "sync", "rename", "sync_directory"])
def test_a_save_that_the_disk_refuses_leaves_the_one_before(tmp_path: Path, step: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    save(tmp_path, 7, 1)
    disk = Disk()
    setattr(disk, step, refuse)
    with pytest.raises(OSError, match="full"):
        save(tmp_path, 7, 2, disk)
    assert newest(tmp_path) in ((1, 2) if step == "sync_directory" else (1,))
    save(tmp_path, 8, 3)
    assert newest(tmp_path) == 3
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[: len(data) // 2], flipped], ids=["gone", "cut", "bit"]
)
@pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
def test_one_that_cannot_be_read_gives_way_to_the_one_before(
    tmp_path: Path, file: str, spoil: Callable[[bytes], bytes]
) -> None:
    save(tmp_path, 1, 1)
    save(tmp_path, 2, 2)
    path = sorted(tmp_path.glob("step-*"))[-1] / file
    path.write_bytes(spoil(path.read_bytes()))
    assert newest(tmp_path) == 1


def test_another_runs_are_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 1, 1)
    with pytest.raises(ConfigError, match="holds checkpoints of run run, and this is other"):
        checkpoint.load_newest(tmp_path, "other", "other")


def test_those_of_the_run_that_this_one_was_restored_from_are(tmp_path: Path) -> None:
    manifest = {"run": "before", "lineage": "run", "outbox": {"next_number": 0, "pending": {}}, "numbers": {}}
    checkpoint.save(tmp_path, 1, {"w": torch.zeros(3)}, manifest)
    found = checkpoint.load_newest(tmp_path, "after", "run")
    assert found is not None
    assert found[1]["run"] == "before"


def test_the_outbox_is_kept_back_to_the_oldest_that_may_be_gone_back_to(tmp_path: Path) -> None:
    assert checkpoint.oldest_record(tmp_path) == 0
    for mark in (1, 2, 3):
        save(tmp_path, mark, mark)
    assert checkpoint.oldest_record(tmp_path) == 12
    (next(tmp_path.glob("step-*")) / "manifest.json").write_text("{")
    assert checkpoint.oldest_record(tmp_path) == 0
