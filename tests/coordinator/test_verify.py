"""`isthmus coordinator verify`: all that a state directory keeps is read, and what was changed is named."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.store import schema
from coordinator.store.journal import Journal
from coordinator.store.state_dir import StateDir
from coordinator.verify import verify
from isthmus import app
from shared.errors import CorruptError
from tests.coordinator.test_recovery import SITES, Killed, life


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two fragments with 3 versions each, a checkpoint of the last, and all contributions since."""
    state = tmp_path_factory.mktemp("verify") / "state"
    assert asyncio.run(life(state, {}, SITES, {})) is not None
    return state


@pytest.fixture
def state(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "state"
    shutil.copytree(finished, copy)
    return copy


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a coordinator leaves that dies after the third version of fragment 0: a checkpoint of the second."""
    journals: list[str] = []

    def commit(journal: Journal, name: str) -> None:
        if journals.count("publish") == 5:
            raise Killed
        journal._db.execute("COMMIT")
        journals.append(name)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_commit", commit)
        assert asyncio.run(life(tmp_path / "killed", {}, SITES, {})) is None
    return tmp_path / "killed"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_an_untouched_directory_has_no_fault_and_is_not_written_to(state: Path) -> None:
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    found = verify(state)
    assert found.faults == []
    assert found.checkpoints == 2
    assert found.blobs > 0
    assert "all digests agree" in str(found)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_every_checkpoint_and_blob_that_is_changed_is_named(state: Path) -> None:
    files = [path for path in state.rglob("*") if path.parent.parent.name == "blobs" or path.suffix == ".safetensors"]
    assert len(files) >= 4
    for path in files:
        for at in (0, path.stat().st_size // 2, -1):
            flip(path, at)
            assert any(str(path) in fault for fault in verify(state).faults), (path, at)
            flip(path, at)
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert any(str(path) in fault for fault in verify(state).faults), path
        path.unlink()
        assert any(str(path) in fault for fault in verify(state).faults), path
        path.write_bytes(data)
    assert verify(state).faults == []


def test_rounds_since_the_oldest_checkpoint_are_executed_again(killed: Path) -> None:
    found = verify(killed)
    assert (found.faults, found.rounds) == ([], 1)
    with sqlite3.connect(killed / "journal.sqlite") as db:
        schema.prepare(db)
        db.execute("UPDATE rounds SET rule = replace(rule, '0.5', '0.25') WHERE version = 3")
    db.close()
    (fault,) = verify(killed).faults
    assert "version 3 of fragment 0 came out different when it was executed again" in fault


def test_the_command_says_what_it_found_and_ends_with_4_where_that_is_a_fault(state: Path) -> None:
    ended = CliRunner().invoke(app, ["coordinator", "verify", str(state)])
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.endswith("all digests agree\n")
    (checkpoint,) = (state / "checkpoints").glob("p0001-*")
    flip(checkpoint, -1)
    ended = CliRunner().invoke(app, ["coordinator", "verify", str(state)])
    assert ended.exit_code == 4
    assert ended.stdout.endswith("2 faults\n")
    assert f"isthmus: checkpoint {checkpoint} is corrupt" in ended.stderr
    ended = CliRunner().invoke(app, ["coordinator", "verify", str(state / "blobs")])
    assert ended.exit_code == 2


def test_a_manifest_that_cannot_be_read_is_named(state: Path) -> None:
    manifest = state / "checkpoints" / "manifest.json"
    manifest.write_text("{}")
    assert any(str(manifest) in fault for fault in verify(state).faults)


def test_a_journal_that_says_something_else_is_found_out(state: Path) -> None:
    with sqlite3.connect(state / "journal.sqlite") as db:
        schema.prepare(db)
        db.execute("UPDATE rounds SET master_digest = published_digest WHERE version = 3 AND fragment = 1")
    db.close()
    (fault,) = verify(state).faults[:1]
    assert "not what the journal recorded of version 3" in fault


def test_a_journal_whose_pages_are_damaged_is_not_read_on(state: Path) -> None:
    StateDir(state).close()
    journal = state / "journal.sqlite"
    with sqlite3.connect(journal) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = journal.read_bytes()
    found = 0
    for page in range(1, len(data) // 4096):
        journal.write_bytes(data[: page * 4096] + bytes(64) + data[page * 4096 + 64 :])
        try:
            found += bool(verify(state).faults)
        except CorruptError:
            found += 1
    assert found >= len(data) // 4096 - 2, "a page that holds nothing may be changed"
