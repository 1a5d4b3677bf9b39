"""A mirror: what it takes to restore a run on another machine, and what is made of a damaged or half-written one."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from coordinator.machine import MACHINE
from coordinator.mirroring import Mirroring
from coordinator.outer.step import Digests
from coordinator.service import Coordinator
from coordinator.store import mirror
from coordinator.store.journal import Journal
from coordinator.store.mirror import Cancelled, Mirror, Pass, Place, restore
from coordinator.store.state_dir import StateDir
from coordinator.verify import verify
from shared.config import RunConfig
from shared.errors import ConfigError, CorruptError, FaultError
from tests.coordinator.test_damage import DAMAGES, Damage, recovered
from tests.coordinator.test_recovery import SITES, Killed, act_as_sites, config, life


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed between its checkpoints: a round is closed and not published."""
    directory, journals = tmp_path_factory.mktemp("mirrored"), list[str]()

    def commit(journal: Journal, name: str) -> None:
        if journals.count("publish") == 5:
            raise Killed
        journal._db.execute("COMMIT")
        journals.append(name)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "_commit", commit)
        assert asyncio.run(life(directory / "state", {}, SITES, {})) is None
    return directory / "state"


def copied(state: Path, tmp_path: Path) -> Path:
    shutil.copytree(state, tmp_path / "state")
    return tmp_path / "state"


def mirrored(state: Path, url: str, *, at: float = 1.0) -> Pass:
    """One pass over a state directory that nobody serves."""
    store = StateDir.hold(state)
    try:
        made = Mirror(Place(url), store, 1)
        return made.copy(made.stage(), 40, at)
    finally:
        store.close()


def faults(path: Path) -> list[str]:
    return verify(path).faults


def run_of(state: Path) -> tuple[str, str]:
    store = StateDir(state, read_only=True)
    try:
        return store.run_id, store.lineage
    finally:
        store.close()


@pytest.fixture
def expected(killed: Path, tmp_path: Path) -> list[Digests]:
    shutil.copytree(killed, tmp_path / "expected")
    return recovered(tmp_path / "expected")


def memory() -> str:
    return f"memory://mirror-{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_restored_run_goes_on_in_the_same_bits(
    killed: Path, tmp_path: Path, expected: list[Digests], kind: str
) -> None:
    url = f"file://{tmp_path}/elsewhere" if kind == "file" else memory()
    state = copied(killed, tmp_path)
    mirrored(state, url)
    before = run_of(state)
    shutil.rmtree(state)
    restored = restore(url, tmp_path / "new", faults)
    assert restored.before == before[0]
    after = run_of(tmp_path / "new")
    assert after == (restored.run, before[1])
    assert after[0] != before[0], "what it publishes next may be other bits than what was published before"
    assert after[0].split(".")[0] == before[0].split(".")[0]
    assert recovered(tmp_path / "new") == expected


def test_a_restored_run_trains_to_its_end_and_is_mirrored_again(killed: Path, tmp_path: Path) -> None:
    url, state = memory(), copied(killed, tmp_path)
    mirrored(state, url)
    restored = restore(url, tmp_path / "new", faults)
    assert asyncio.run(life(tmp_path / "new", {}, SITES, {})) is not None
    assert faults(tmp_path / "new") == []
    mirrored(tmp_path / "new", url, at=2.0)
    again = restore(url, tmp_path / "newer", faults)
    assert again.before == restored.run
    assert run_of(tmp_path / "newer")[1] == run_of(state)[1]
    assert recovered(tmp_path / "newer") == recovered(tmp_path / "new")


def test_a_list_of_many_fragments_is_read_as_it_was_written() -> None:
    """JSON's keys are text: 10 comes before 2."""
    written = Pass("r.2", "r.1", 7, 1.5, 40, {p: p + 3 for p in range(12)}, "journal", "ab", {"journal": 9})
    assert Pass.from_json(written.to_json().encode()) == written


def test_the_sites_tokens_come_along(killed: Path, tmp_path: Path) -> None:
    url, state = memory(), copied(killed, tmp_path)
    store = StateDir(state)
    store.journal.put_token("a", b"salt", b"hash", 1.0)
    store.close()
    mirrored(state, url)
    restore(url, tmp_path / "new", faults)
    restored = StateDir(tmp_path / "new", read_only=True)
    assert restored.journal.token("a") == (b"salt", b"hash")
    assert {site.session for site in restored.journal.sites()} == {None}
    restored.close()


def test_what_never_changes_is_copied_once_and_two_passes_are_kept(killed: Path, tmp_path: Path) -> None:
    state = copied(killed, tmp_path)
    place = tmp_path / "elsewhere"
    first = mirrored(state, f"file://{place}")
    run = place / first.run
    checkpoints = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*")}
    (run / "blobs" / "zz").mkdir()
    (run / "blobs" / "zz" / "stray").write_bytes(b"of no pass")
    for _ in range(3):
        last = mirrored(state, f"file://{place}")
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*")} == checkpoints
    assert last.number == 4
    assert sorted(path.name for path in run.glob("*-*")) == [
        "journal-000000000003.sqlite",
        "journal-000000000004.sqlite",
        "mirror-000000000003.json",
        "mirror-000000000004.json",
    ]
    assert not (run / "blobs" / "zz" / "stray").exists()


def test_a_pass_is_of_one_moment_whatever_is_pruned_while_it_is_copied(
    killed: Path, tmp_path: Path, expected: list[Digests]
) -> None:
    url, state = memory(), copied(killed, tmp_path)
    store = StateDir.hold(state)
    made = Mirror(Place(url), store, 1)
    staged = made.stage()
    store.close()
    assert asyncio.run(life(state, {}, SITES, {})) is not None
    assert asyncio.run(life(state, {}, SITES, {})) is not None  # (holding it cleans up what was staged: see below)
    assert not (state / "mirror").exists()
    store = StateDir.hold(state)
    made = Mirror(Place(url), store, 1)
    staged = made.stage()
    for path in [*store.blobs.directory.glob("??/*"), *(state / "checkpoints").iterdir()]:
        path.unlink()
    made.copy(staged, 40, 1.0)
    store.close()
    assert restore(url, tmp_path / "new", faults).versions == staged


def test_a_pass_that_is_cut_off_leaves_the_one_before(
    killed: Path, tmp_path: Path, expected: list[Digests], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between any two pieces of any file."""
    monkeypatch.setattr(mirror, "PIECE_BYTES", 4096)
    state, place = copied(killed, tmp_path), tmp_path / "elsewhere"
    first = mirrored(state, f"file://{place}")
    assert asyncio.run(life(state, {}, SITES, {})) is not None
    whole = recovered(state)
    pieces = 0
    while True:
        url = f"file://{tmp_path}/try"
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        shutil.copytree(place, tmp_path / "try")
        store = StateDir.hold(state)
        made = Mirror(Place(url), store, 1)
        left = [pieces]

        def cancelled(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        try:
            made.copy(made.stage(), 60, 2.0, cancelled)
        except Cancelled:
            restored = restore(url, tmp_path / "new", faults)
            assert restored.versions == first.versions
            assert recovered(tmp_path / "new") == expected
            pieces += 1
            continue
        finally:
            store.close()
        break
    assert pieces > 3
    restore(f"file://{tmp_path}/try", tmp_path / "new", faults)
    assert recovered(tmp_path / "new") == whole


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_mirror_is_never_taken_for_a_sound_one(
    killed: Path, tmp_path: Path, expected: list[Digests], damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    """Every file of it in turn: an older pass that is whole is taken, or none."""
    caplog.set_level(logging.CRITICAL)
    state, place = copied(killed, tmp_path), tmp_path / "elsewhere"
    mirrored(state, f"file://{place}", at=1.0)
    mirrored(state, f"file://{place}", at=2.0)
    names = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    older, refused = 0, 0
    for name in names:
        shutil.rmtree(tmp_path / "try", ignore_errors=True)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        shutil.copytree(place, tmp_path / "try")
        path = tmp_path / "try" / name
        path.write_bytes(damage(path.read_bytes()))
        try:
            restored = restore(f"file://{tmp_path}/try", tmp_path / "new", faults)
        except CorruptError:
            refused += 1
            assert not (tmp_path / "new").exists()
            continue
        older += restored.written_at == 1.0
        assert recovered(tmp_path / "new") == expected
    assert older >= 2, "the newer list and the newer journal"
    assert refused >= 3, "what both passes hold: checkpoints and contributions"


def test_a_mirror_that_cannot_be_used_is_refused_by_name(killed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no mirror of a run"):
        restore(memory(), tmp_path / "new", faults)
    with pytest.raises(ConfigError, match=r"\[store\] mirror: nonsense://x is not a URL that can be written to"):
        restore("nonsense://x", tmp_path / "new", faults)
    with pytest.raises(ConfigError, match="is there and not empty"):
        restore(memory(), killed, faults)
    url, state = memory(), copied(killed, tmp_path)
    mirrored(state, url)
    assert asyncio.run(life(tmp_path / "other", {}, SITES, {})) is not None
    mirrored(tmp_path / "other", url)
    with pytest.raises(ConfigError, match=r"several runs; name the directory of one: killed\.\w+, killed\.\w+"):
        restore(url, tmp_path / "new", faults)
    assert restore(f"{url}/{run_of(state)[0]}", tmp_path / "new", faults).before == run_of(state)[0]


def test_a_mirror_that_cannot_be_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("forbidden")

    monkeypatch.setattr(Place, "files", refuse)
    with pytest.raises(FaultError, match="cannot be read: forbidden"):
        restore(memory(), tmp_path / "new", faults)


# ---- beside a run


def mirroring_config(url: str, **store: Any) -> RunConfig:
    plain = config()
    return plain.model_copy(
        update={"store": plain.store.model_copy(update={"mirror": url, "mirror_seconds": 0.0} | store)}
    )


async def trained(state: Path, url: str, **store: Any) -> Coordinator:
    """A run from its beginning to its end, and the pass after its end."""
    coordinator = await Coordinator.open(mirroring_config(url, **store), state, state)
    try:
        await coordinator.start()
        await act_as_sites(coordinator, {}, SITES)
        await asyncio.gather(*coordinator._merges)
        while (task := coordinator._mirroring._under_way) is not None:
            await asyncio.wait({task})
            await asyncio.sleep(0)
    finally:
        await coordinator.stop()
    return coordinator


def test_a_run_is_mirrored_as_it_goes_and_at_its_end(tmp_path: Path) -> None:
    url = memory()
    coordinator = asyncio.run(trained(tmp_path / "state", url))
    assert b"isthmus_mirror_faults_total 0.0" in coordinator.metrics.exposition()
    passes = [each for _, each in mirror._passes(Place(url), "")]
    assert max(each.number for each in passes) >= 2
    restored = restore(url, tmp_path / "new", faults)
    assert restored.tokens == coordinator.core.tokens
    assert recovered(tmp_path / "new") == recovered(tmp_path / "state")


def test_passes_are_as_far_apart_as_the_config_says(tmp_path: Path) -> None:
    url = memory()
    asyncio.run(trained(tmp_path / "state", url, mirror_seconds=1e6))
    assert max(each.number for _, each in mirror._passes(Place(url), "")) == 2, "the start, and the end"


def test_a_mirror_that_fails_stops_nothing_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("the bucket is gone")

    monkeypatch.setattr(Place, "put", refuse)
    coordinator = asyncio.run(trained(tmp_path / "state", memory()))
    assert coordinator.core.finished
    assert "the mirror could not be written (RuntimeError: the bucket is gone)" in caplog.text
    assert b"isthmus_mirror_faults_total 0.0" not in coordinator.metrics.exposition()


async def test_whether_the_mirror_can_be_written_shows_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no such key")

    monkeypatch.setattr(Place, "put", refuse)
    coordinator = await Coordinator.open(mirroring_config(memory()), tmp_path / "state", tmp_path)
    await coordinator.start()
    task = coordinator._mirroring._under_way
    assert task is not None
    await asyncio.wait({task})
    assert "the mirror could not be written (PermissionError: no such key)" in caplog.text
    await coordinator.stop()


async def test_a_pass_that_takes_long_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(self: Place, source: Path, name: str, cancelled: Any) -> None:
        while not cancelled():
            continue
        raise Cancelled

    now = 0.0
    machine = dataclasses.replace(MACHINE, clock=lambda: now)
    monkeypatch.setattr(Place, "put", hang)
    coordinator = await Coordinator.open(mirroring_config(memory()), tmp_path / "state", tmp_path, machine)
    mirroring: Mirroring = coordinator._mirroring
    mirroring.begin(0)
    for now, told in ((299.0, 0), (301.0, 1), (900.0, 1)):  # noqa: B007 (the clock reads it)
        mirroring.retry(0)
        assert caplog.text.count("has been under way for 301 s") == told
    await coordinator.stop()


async def test_a_stop_does_not_wait_for_a_far_away_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = asyncio.Event()
    loop = asyncio.get_running_loop()

    def cancelled_later(self: Place, source: Path, name: str, cancelled: Any) -> None:
        loop.call_soon_threadsafe(asking.set)
        while not cancelled():
            continue
        raise Cancelled

    monkeypatch.setattr(Place, "put", cancelled_later)
    coordinator = await Coordinator.open(mirroring_config(memory()), tmp_path / "state", tmp_path)
    mirroring: Mirroring = coordinator._mirroring
    mirroring.begin(0)
    await asking.wait()
    await coordinator.stop()
    assert mirroring._under_way is None or mirroring._under_way.done()


def test_an_unknown_url_refuses_the_start(tmp_path: Path) -> None:
    async def opened() -> None:
        await Coordinator.open(mirroring_config("nonsense://x"), tmp_path / "state", tmp_path)

    with pytest.raises(ConfigError, match="nonsense://x is not a URL"):
        asyncio.run(opened())
    assert not (tmp_path / "state").exists(), "a refused start leaves nothing"


def test_a_site_is_not_told_where_the_mirror_is(tmp_path: Path) -> None:
    async def told() -> dict[str, Any]:
        coordinator = await Coordinator.open(mirroring_config(memory()), tmp_path / "state", tmp_path)
        try:
            return coordinator.preview().config
        finally:
            await coordinator.stop()

    assert "mirror" not in str(asyncio.run(told()))
