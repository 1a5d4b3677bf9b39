"""A coordinator whose fragments rest in mapped files: what is in these files matters to nobody but the process that
made them, and a disk that has no room for them is told at the start."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from coordinator.machine import Machine
from coordinator.publication import Publication
from coordinator.service import Coordinator
from coordinator.store.journal import Journal
from shared.files import Disk
from tests.coordinator.store.test_resting import resident
from tests.coordinator.test_recovery import ADAM, DELAYED, NESTEROV, SITES, Killer, act_as_sites, config, life

FILES = {f"p{p:04d}.{name}" for p in (0, 1) for name in ("master", "published", "momentum")}


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> list[Killer]:
    """See test_recovery."""
    current: list[Killer] = []

    def commit(journal: Journal, name: str) -> None:
        current[0].commit(journal, name) if current else journal._db.execute("COMMIT")

    monkeypatch.setattr(Journal, "_commit", commit)
    return current


@pytest.mark.parametrize("outer", [NESTEROV, DELAYED, ADAM], ids=["nesterov", "delayed", "adam"])
def test_a_kill_ends_in_the_bits_of_a_run_in_memory_whatever_is_in_the_scratch_files(
    tmp_path: Path, killing: list[Killer], outer: dict[str, Any]
) -> None:
    undisturbed = asyncio.run(life(tmp_path / "calm", {}, SITES, outer, resting="memory"))
    assert undisturbed is not None
    for at in range(3, 30, 5):
        state, sessions = tmp_path / str(at), dict[str, str]()
        killing[:] = [Killer(at, after=bool(at % 2))]
        assert asyncio.run(life(state, sessions, SITES, outer, resting="mapped")) is None
        killing.clear()
        (state / "states").mkdir(exist_ok=True)
        for n, name in enumerate(sorted(FILES)):
            (state / "states" / name).write_bytes(os.urandom(4 * n))
        assert asyncio.run(life(state, sessions, SITES, outer, resting="mapped")) == undisturbed, f"killed at {at}"


def test_a_run_may_go_from_memory_to_mapped_files_and_back(tmp_path: Path, killing: list[Killer]) -> None:
    undisturbed = asyncio.run(life(tmp_path / "calm", {}, SITES, NESTEROV))
    sessions: dict[str, str] = {}
    for at, resting in ((18, "memory"), (5, "mapped"), (-1, "memory")):
        killing[:] = [Killer(at, after=True)]
        ended = asyncio.run(life(tmp_path / "state", sessions, SITES, NESTEROV, resting=resting))
    assert ended == undisturbed


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is resident")
def test_no_fragment_is_resident_once_its_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its recovery, and after each step, checkpoint and snapshot."""
    files = [tmp_path / "state" / "states" / name for name in FILES]
    found: list[tuple[str, int]] = []

    def watched(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def then_looked_at(*arguments: Any) -> Any:
            result = real(*arguments)
            found.append((name, sum(resident(path) for path in files)))
            return result

        monkeypatch.setattr(owner, name, then_looked_at)

    for owner, name in ((Coordinator, "_execute"), (Coordinator, "_checkpoint"), (Publication, "_make_snapshot")):
        watched(owner, name)

    async def run() -> None:
        coordinator = await Coordinator.open(config(resting="mapped"), tmp_path / "state", tmp_path)
        assert {path.name for path in (tmp_path / "state" / "states").iterdir()} == FILES
        assert [resident(path) for path in files] == [0] * 6
        await coordinator.start()
        await act_as_sites(coordinator, {}, SITES)
        await asyncio.gather(*coordinator._merges)
        await coordinator.publication.snapshot(0, coordinator.publication.newest[0].version)
        await coordinator.stop()

    asyncio.run(run())
    assert {name for name, _ in found} == {"_execute", "_checkpoint", "_make_snapshot"}
    assert {size for _, size in found} == {0}
    assert not (tmp_path / "state" / "states").exists(), "nobody reads them again"


@pytest.mark.parametrize(("memory", "mapped"), [(47, True), (48, False)])
def test_auto_goes_by_the_memory_of_the_machine(tmp_path: Path, memory: int, mapped: bool) -> None:
    """Two fragments of one parameter each, with Nesterov's momentum: 24 bytes."""

    async def run() -> bool:
        machine = Machine(memory=lambda: memory)
        coordinator = await Coordinator.open(config(), tmp_path / "state", tmp_path, machine)
        found = (tmp_path / "state" / "states").exists()
        await coordinator.stop()
        return found

    assert asyncio.run(run()) is mapped


def test_a_disk_without_room_for_the_states_is_refused_before_anyone_can_contribute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Disk, path: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "allocate", full)
        with pytest.raises(OSError, match="states has no room for the fragments at rest"):
            asyncio.run(Coordinator.open(config(resting="mapped"), tmp_path / "state", tmp_path))
    assert asyncio.run(life(tmp_path / "state", {}, SITES, NESTEROV, resting="mapped")) is not None, "once there is"
