"""Every file of a state directory, cut or with a bit that is another: found out and named, or made good."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.outer.step import Digests
from coordinator.service import Coordinator
from coordinator.store.checkpoint import Checkpoints
from coordinator.store.journal import Journal
from coordinator.store.state_dir import StateDir
from coordinator.verify import verify
from shared.errors import CorruptError
from tests.coordinator.test_recovery import SITES, Killed, config, life

Damage = Callable[[bytes], bytes]


def flipped(at: float) -> Damage:
    def damage(data: bytes) -> bytes:
        spoilt = bytearray(data)
        spoilt[int(at * (len(spoilt) - 1))] ^= 0x04
        return bytes(spoilt)

    return damage


DAMAGES: dict[str, Damage] = {
    "gone": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    **{f"bit at {at}": flipped(at) for at in (0.0, 0.02, 0.3, 0.6, 0.97)},
}


def recovered(state: Path) -> list[Digests]:
    """What a coordinator has after it opened the directory. Raises CorruptError."""

    async def opened() -> list[Digests]:
        coordinator = await Coordinator.open(config(), state, state.parent)
        try:
            return [fragment.digests() for fragment in coordinator._states]
        finally:
            await coordinator.stop()

    return asyncio.run(opened())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a coordinator leaves that dies between two checkpoints: two of each fragment, and rounds since the last."""
    directory, journals = tmp_path_factory.mktemp("damage"), list[str]()

    def commit(journal: Journal, name: str) -> None:
        if journals.count("publish") == 5:
            raise Killed
        journal._db.execute("COMMIT")
        journals.append(name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "_commit", commit)
        patched.setattr("coordinator.store.state_dir.StateDir.checkpoints", _keeping_two)
        assert asyncio.run(life(directory / "state", {}, SITES, {})) is None
    # Closed as a kill leaves it: the journal's newest rows may be in its log alone.
    return directory / "state"


def _keeping_two(self: StateDir, keep: int) -> Checkpoints:
    return Checkpoints(self.path / "checkpoints", self.run_id, 2, self.disk)


def fault(state: Path, expected: list[Digests]) -> str | None:
    """Why a start on the directory is refused; None where it ends in the bits that it should."""
    try:
        found = recovered(state)
    except CorruptError as error:
        return str(error)
    assert found == expected
    return None


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_every_file_that_is_damaged_is_named_or_made_good(killed: Path, tmp_path: Path, damage: Damage) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(killed, whole)
    expected = recovered(whole)
    files = [path.relative_to(killed) for path in killed.rglob("*") if path.is_file() and path.name != "lock"]
    names = sorted(map(str, files))
    assert len(names) > 12
    made_good = 0
    for name in names:
        state = tmp_path / "state"
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(killed, state)
        data = (state / name).read_bytes()
        (state / name).write_bytes(damage(data))
        if (error := fault(state, expected)) is None:
            made_good += 1
        else:
            assert Path(name).name.split("-wal")[0] in error, (name, error)
    assert made_good > len(names) // 2


def test_a_checkpoint_that_is_damaged_is_replaced_by_the_one_before(killed: Path, tmp_path: Path) -> None:
    state, whole = tmp_path / "state", tmp_path / "whole"
    shutil.copytree(killed, state)
    shutil.copytree(killed, whole)
    newest = sorted((state / "checkpoints").glob("p0000-*.safetensors"))[-1]
    assert not newest.name.startswith("p0000-v000000000")
    newest.write_bytes(flipped(0.9)(newest.read_bytes()))
    assert any(newest.name in fault for fault in verify(state).faults)
    assert recovered(state) == recovered(whole)


def test_a_manifest_that_is_damaged_is_made_good_by_the_files_beside_it(killed: Path, tmp_path: Path) -> None:
    state, whole = tmp_path / "state", tmp_path / "whole"
    shutil.copytree(killed, state)
    shutil.copytree(killed, whole)
    (state / "checkpoints" / "manifest.json").write_text("{")
    assert any("manifest.json is corrupt" in fault for fault in verify(state).faults)
    assert recovered(state) == recovered(whole)


def content(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All that a journal says. Raises CorruptError, OSError."""
    journal = Journal(path, read_only=True)
    try:
        names = [row["name"] for row in journal._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: [tuple(row) for row in journal._db.execute(f"SELECT * FROM {name}")] for name in sorted(names)}
    finally:
        journal.close()


def test_a_bit_that_changes_anywhere_in_the_journal_is_found(killed: Path, tmp_path: Path) -> None:
    """SQLite itself notices what breaks its structure, the seals notice the rest."""
    path = tmp_path / "journal.sqlite"
    shutil.copytree(killed, tmp_path / "state")
    recovered(tmp_path / "state")
    whole = (tmp_path / "state" / "journal.sqlite").read_bytes()
    path.write_bytes(whole)
    expected = content(path)
    rng = random.Random(0)
    refused, by_seal = 0, 0
    for _ in range(400):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(100, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(spoilt))
        try:
            found = content(path)
        except (CorruptError, OSError) as error:
            said = str(error)
        else:
            assert found == expected
            continue
        assert str(path) in said
        refused += 1
        by_seal += "is not what was written" in said
    assert by_seal > 5, "what SQLite takes for sound"
    assert refused > 20
