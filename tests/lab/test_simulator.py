"""The simulator: what holds, holds under any faults; what is broken on purpose is found; and a seed is a course."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import coordinator.store.recovery
from coordinator.core.rounds import Contribution
from coordinator.core.run import RunCore
from coordinator.intake import Intake
from coordinator.store.files import Blobs
from coordinator.store.journal import Journal, StoredRound
from lab.simulator.audit import Auditor, Violation
from lab.simulator.network import Weather
from lab.simulator.schedules import COUNTING, FOR_EVER, STEPS, TOKENS_PER_STEP, schedule_of
from lab.simulator.simulate import prepare, run_schedule, simulate
from lab.simulator.world import Fault, Schedule, World
from shared.config import RunConfig, parse
from site_agent.courier import Courier
from site_agent.history import History
from site_agent.learner import Learner
from site_agent.news import ArrivedAnchor
from site_agent.training.leased import LeasedStream
from site_agent.training.replica import Replica
from site_agent.versions import Versions

SCHEDULES = 60


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    import logging

    prepare()
    yield
    logging.disable(logging.NOTSET)


def test_nothing_breaks() -> None:
    summary = simulate(range(SCHEDULES), 1, lambda result: None)
    assert not summary.violations, summary.violations[0]
    assert summary.faults > SCHEDULES
    assert summary.checks > 20 * SCHEDULES


def test_a_seed_is_a_course(tmp_path: Path) -> None:
    def course() -> list[str]:
        lines: list[str] = []
        World(schedule_of(11), tmp_path / "world", lines.append).run()
        return lines

    assert course() == course()
    assert run_schedule(11) == run_schedule(11)


# ---- bugs, brought back


def found(likely: Callable[[Schedule], bool] = lambda schedule: True, most: int = 120) -> str:
    """The first invariant that breaks, among the first `most` schedules in which it is likely to."""
    seeds = (seed for seed in range(200 * most) if likely(schedule_of(seed)))
    for seed in islice(seeds, most):
        if (violation := run_schedule(seed).violation) is not None:
            return violation
    pytest.fail(f"{most} schedules and nothing was found")


def killed(schedule: Schedule) -> bool:
    return sum(fault.whom == "coordinator" and fault.kind.startswith("kill") for fault in schedule.faults) > 1


def killed_between_large_rounds(schedule: Schedule) -> bool:
    config = schedule.config
    large = len(schedule.sites) == 3 and config.rounds.quorum == "all"
    return killed(schedule) and large and config.store.checkpoint_versions > 1


def test_an_acknowledgement_before_the_sync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt(self: Blobs, source: Path, digest: str) -> None:
        self._prepare(digest)
        self._disk.rename(source, self.path(digest))

    monkeypatch.setattr(Blobs, "adopt", adopt)
    assert "a restart recovers" in (violation := found()) or "a fold of the journal" in violation


def test_an_acknowledgement_before_the_journal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    acknowledge = Intake._acknowledge

    async def early(self: Any, upload: Any, screened: Any) -> Any:
        writing = asyncio.create_task(acknowledge(self, upload, screened))
        await asyncio.sleep(0)
        if writing.done():
            return writing.result()
        from shared.protocol import Outcome

        return Outcome(accepted=True, version=self._core.fragments[upload.opening.fragment].target)

    monkeypatch.setattr(Intake, "_acknowledge", early)
    assert found()


def test_a_replay_in_order_of_arrival_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    execute = coordinator.store.recovery.execute

    def by_arrival(state: Any, round_: StoredRound, journal: Journal, *more: Any) -> Any:
        rows = journal._db.execute("SELECT id FROM contributions ORDER BY seq DESC").fetchall()
        order = {row["id"]: place for place, row in enumerate(rows)}
        members = tuple(sorted(round_.members, key=lambda member: order[member[0]]))
        return execute(state, dataclasses.replace(round_, members=members), journal, *more)

    monkeypatch.setattr(coordinator.store.recovery, "execute", by_arrival)
    assert found(killed_between_large_rounds)


def test_error_feedback_that_moves_on_with_a_refusal_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arrive = Learner._arrive

    def advancing(self: Learner, arrival: ArrivedAnchor) -> None:
        p = arrival.fragment
        flight = self.core.fragments[p].in_flight
        replica = self.trainer
        assert isinstance(replica, Replica)
        if arrival.how == "rebase" and flight is not None and p in replica.snapshots:
            replica.settle(p, delivered=True)
            replica.residuals[p] = replica.residuals[p] - 1
        arrive(self, arrival)

    monkeypatch.setattr(Learner, "_arrive", advancing)
    assert "no step is lost or delivered twice" in found(lambda schedule: schedule.config.rounds.max_staleness == 2)


def test_a_lease_that_bytes_do_not_renew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunCore, "bytes_arrived", lambda self, site, now, *, uploads=True: None)
    assert "arriving bytes renew a lease" in found()


def test_a_version_that_is_used_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = RunCore.restore

    def behind(self: RunCore, versions: Any, *more: Any, **named: Any) -> Any:
        return restore(self, [(max(0, version - 1), tokens) for version, tokens in versions], *more, **named)

    close = Journal.close_round

    def over(self: Journal, fragment: int, version: int, *more: Any) -> None:
        self._db.execute("DELETE FROM rounds WHERE fragment = ? AND version = ?", (fragment, version))
        close(self, fragment, version, *more)

    monkeypatch.setattr(RunCore, "restore", behind)
    monkeypatch.setattr(Journal, "close_round", over)
    assert found(killed)


def a_site_killed_last(schedule: Schedule) -> bool:
    """Of two that train leased data."""
    last = schedule.faults[-1] if schedule.faults else None
    killed = last is not None and last.kind == "kill" and last.whom != "coordinator"
    return schedule.leased and len(schedule.sites) == 2 and killed


def test_a_lease_that_is_used_before_it_is_written_down_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: LeasedStream, new: Any) -> None:
        self._known.extend(dataclasses.replace(lease) for lease in new)

    monkeypatch.setattr(LeasedStream, "_remember", forget)
    assert "a step is trained again on the same data" in found(a_site_killed_last)


def test_progress_that_is_claimed_before_it_is_in_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def ahead(self: LeasedStream) -> list[tuple[int, int, int]]:
        return [(lease.epoch, lease.shard, self.sizes[lease.shard]) for lease in self._leases]

    monkeypatch.setattr(LeasedStream, "progress", ahead)
    assert "no sequence is left out" in found(lambda schedule: schedule.leased)


# ---- a site that comes back to versions that the coordinator has no more


def long_ago(*faults: Fault, repeats: bool, quorum: str | int = "all", cycles: int = 12) -> Schedule:
    """Two sites in a run of which only the newest delta is kept, and which save once, at their beginning."""
    rounds = {"fragments": 1, "quorum": quorum, "overlap_steps": 1, "align": "carry", "deadline_seconds": FOR_EVER}
    rounds |= {"pacing": "equal-steps"} if quorum == "all" else {"max_staleness": 1, "pacing": "equal-time"}
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "simulated", "tokens": 2 * cycles * STEPS * TOKENS_PER_STEP, "min_sites": 2},
        "task": {"use": f"{COUNTING}:Counting", "fragments": 1},
        "inner": {"steps": STEPS, "batch_size": 1, "schedule": "constant"},
        "rounds": rounds,
        "wire": {"upload": "int4", "publish": "int8"},
        "store": {"keep_versions": 1, "checkpoint_versions": 1},
    }
    return Schedule(
        seed=1,
        config=parse(RunConfig, tables, "run.toml"),
        sites=("a", "b"),
        step_seconds={"a": 1.0, "b": 1.0},
        weather={"a": Weather(), "b": Weather()},
        faults=faults,
        checkpoint_seconds=FOR_EVER,
        lease_seconds=FOR_EVER if repeats else 30.0,
        repeats=repeats,
    )


KILLED_LATE = long_ago(Fault(62.0, "kill", "b", 1.0), Fault(63.0, "kill", "a", 3.0), repeats=True)
CUT_THEN_KILLED = long_ago(
    Fault(8.0, "cut", "b", 20.0), Fault(50.0, "kill", "b", 2.0), repeats=False, quorum=1, cycles=30
)


def test_steps_are_trained_again_on_the_versions_that_they_were_trained_on(tmp_path: Path) -> None:
    undisturbed = World(dataclasses.replace(KILLED_LATE, faults=()), tmp_path / "calm").run()
    assert World(KILLED_LATE, tmp_path / "killed").run() == undisturbed


def test_a_site_that_asks_the_coordinator_for_them_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Courier, "repeat", lambda self, parcel, version: self.send(parcel))
    monkeypatch.setattr(Versions, "_by_history", lambda self, p, anchor: None)
    with pytest.raises(Violation, match="a contribution is made on its base"):
        World(KILLED_LATE, tmp_path / "killed").run()


@pytest.mark.parametrize("seed", range(6))
def test_a_site_that_jumped_goes_on_from_there(tmp_path: Path, seed: int) -> None:
    World(dataclasses.replace(CUT_THEN_KILLED, seed=seed), tmp_path / "killed").run()


def test_a_jump_that_no_checkpoint_follows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_jumped", property(lambda self: False, lambda self, jumped: None), raising=False)
    with pytest.raises(Violation, match="no step is lost"):
        World(CUT_THEN_KILLED, tmp_path / "killed").run()


def test_without_its_history_a_site_begins_with_what_is_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has contributed since its checkpoint stays delivered, and the data of it is not trained again."""
    monkeypatch.setattr(History, "put", lambda self, fragment, version, data: None)
    delivered, positions = {"a": 0, "b": 0}, list[int]()
    accept, resume = RunCore.accept, Learner._resume

    def counted(self: RunCore, contribution: Contribution, now: float) -> Any:
        if now < KILLED_LATE.faults[0].at:
            delivered[contribution.site] += contribution.steps
        return accept(self, contribution, now)

    def noted(self: Learner, found: Any) -> None:
        resume(self, found)
        positions.append(self.stream.state_dict()["position"])

    monkeypatch.setattr(RunCore, "accept", counted)
    monkeypatch.setattr(Learner, "_resume", noted)
    world = World(KILLED_LATE, tmp_path / "killed")
    monkeypatch.setattr(Auditor, "__init__", forgetful(Auditor.__init__))
    world.run()
    assert positions == [delivered["b"], delivered["a"]]
    assert min(positions) >= 3 * STEPS


def forgetful(begin: Callable[..., None]) -> Callable[..., None]:
    def begun(self: Auditor, *arguments: Any) -> None:
        begin(self, *arguments)
        self.forgetful |= {"a", "b"}

    return begun


# ---- a run that goes on with another codec


def recoded(seed: int) -> Schedule:
    """Of what is on its way when the codec changes some was accepted, and its answer lost; some was not, because the
    disk was full or the link cut."""
    faults = (
        Fault(30.0, "full", "coordinator", 60.0),
        Fault(60.0, "other-codec", "coordinator", 2.0, seed),
        Fault(150.0, "cut", "b", 30.0),
        Fault(170.0, "other-codec", "coordinator", 2.0, seed + 1),
    )
    schedule = long_ago(*faults, repeats=False, quorum=("all", 1)[seed % 2])
    wire = schedule.config.wire.model_copy(update={"feedback_decay": 1.0})  # what fades could not be found again
    config = schedule.config.model_copy(update={"wire": wire})
    weather = dict.fromkeys("ab", Weather(unanswered=0.2))
    return dataclasses.replace(schedule, seed=seed, config=config, weather=weather)


def run_recoded(directory: Path) -> float:
    """A few of them; how many contributions were refused by their codec."""
    refused = 0.0
    for seed in range(8):
        world = World(recoded(seed), directory)
        world.run()
        registry = world.site_metrics.registry
        refused += registry.get_sample_value("isthmus_site_refused_total", {"code": "wrong-codec"}) or 0.0
    return refused


def test_contributions_in_a_codec_of_before_are_neither_lost_nor_counted_twice(tmp_path: Path) -> None:
    assert run_recoded(tmp_path / "world") >= 8


def test_a_codec_that_is_looked_at_before_what_is_known_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = Intake.open

    async def early(self: Any, site: str, message: Any) -> Any:
        if self._core._standing(site, message.session) is None:
            self._require_codec(message)
        return await open_(self, site, message)

    monkeypatch.setattr(Intake, "open", early)
    with pytest.raises(Violation, match="no step is lost or delivered twice"):
        run_recoded(tmp_path / "world")
