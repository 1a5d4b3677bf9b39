"""Whole runs of small real models, real agents and real HTTP: what must hold between the coordinator and its sites."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import ConfigError, RefusedError
from shared.fragments import digest_flat
from site_agent.agent import Agent
from site_agent.check import check
from site_agent.contribution import Anchor
from site_agent.core.alignment import How
from site_agent.learner import Learner, Stopped
from site_agent.news import Stop
from tests.support.live import TOY, live, run_config, site_config, train

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small_run(text: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "tokens": 12_000, "min_sites": 2},
        "task": {"use": "byte-lm", "paths": str(text), "context": 16, "width": 32, "layers": 1, "heads": 2},
        "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
        "outer": {"lr": 1.0, "momentum": 0.5},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 2, "pacing": "equal-steps"},
        "wire": {},
    }
    for table, values in changes.items():
        tables.setdefault(table, {}).update(values)
    return tables


def toy_run(min_sites: int) -> dict[str, dict[str, Any]]:
    return {
        "run": {"name": "toy", "tokens": 10, "min_sites": min_sites},
        "task": {"use": f"{TOY}:Toy"},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 2},
    }


class Watched(Learner):
    """A learner that keeps every anchor that it took up, by (fragment, version)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.seen: dict[tuple[int, int], Anchor] = {}

    def _align(self, p: int, how: How) -> None:
        super()._align(p, how)
        self.seen[p, self.anchors[p].version] = self.anchors[p]


class Watching(Agent):
    learns = Watched

    @property
    def seen(self) -> dict[tuple[int, int], Anchor]:
        assert isinstance(self.learner, Watched)
        return self.learner.seen


@pytest.mark.parametrize("publish", ["int4", "int8", "bf16", "fp32"])
def test_anchors_are_identical_at_every_site_after_every_version(tmp_path: Path, text: Path, publish: str) -> None:
    config = run_config(small_run(text, wire={"publish": publish}))
    with live(config, tmp_path / "state") as served:
        agents = [Watching(site_config(name, served.url, tmp_path)) for name in ("a", "b")]
        train(*agents)
        published = {
            (p, round_.version): round_.published_digest
            for p in range(2)
            for round_ in served.coordinator.reader.rounds(p, after=0)
        }
        layout = served.coordinator.layout
    assert len(published) > 8
    for agent in agents:
        assert agent.courier.repairs == 0
        assert agent.seen.keys() == published.keys()
        for (p, version), anchor in agent.seen.items():
            assert digest_flat(anchor.flat, layout.fragments[p].chunks()) == published[p, version]


def test_the_result_does_not_depend_on_who_is_faster(tmp_path: Path, text: Path) -> None:
    """Full quorum, equal steps, fixed τ: which site's contributions arrive first changes nothing, bit for bit."""
    results = []
    for slow in ("a", "b"):
        with live(run_config(small_run(text)), tmp_path / f"slow-{slow}") as served:
            directory = tmp_path / slow
            agents = [
                Agent(site_config(n, served.url, directory, devices={"throttle": 0.3 if n == slow else 1.0}))
                for n in ("a", "b")
            ]
            train(*agents)
            results.append(served.digests())
    assert results[0] == results[1]
    assert all(version > 2 for version, _ in results[0])


def test_training_lowers_the_held_out_loss_and_reports_it(tmp_path: Path, text: Path) -> None:
    config = run_config(small_run(text, run={"tokens": 40_000}))
    with live(config, tmp_path / "state") as served:
        train(*(Agent(site_config(name, served.url, tmp_path)) for name in ("a", "b")))
        losses = [loss for _, loss in served.coordinator.evaluations]
        # Started once more, a site has a checkpoint of the end, and there is nothing to do.
        again = Agent(site_config("a", served.url, tmp_path))
        again.run()
        assert again.learner is not None
        assert again.learner.core.steps > 0
    assert losses
    assert losses[0] > 5  # close to log 256: nothing was learnt yet
    assert losses[-1] < 4


def test_a_damaged_anchor_is_repaired_and_counted_never_trained_on(tmp_path: Path, text: Path) -> None:
    """One site's copy of a version comes out with a wrong bit, as memory or a kernel might make it."""

    class Damaging(Watched):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            versions, done = self.courier._versions, threading.Event()
            apply = versions._apply

            def damaging(of: Any, anchor: Any, data: bytes) -> Anchor:
                if anchor is not None and anchor.version == 1 and not done.is_set():
                    done.set()
                    flat = anchor.flat.copy()
                    flat.view(np.uint32)[0] ^= 1 << 22
                    anchor = Anchor(anchor.version, anchor.digest, anchor.tokens, flat)
                return apply(of, anchor, data)

            versions._apply = damaging  # type: ignore[method-assign]

    class Damaged(Watching):
        learns = Damaging

    with live(run_config(small_run(text)), tmp_path / "state") as served:
        damaged = Damaged(site_config("a", served.url, tmp_path))
        train(damaged, Agent(site_config("b", served.url, tmp_path)))
        published = {
            (p, r.version): r.published_digest for p in range(2) for r in served.coordinator.reader.rounds(p, after=0)
        }
        layout = served.coordinator.layout
    assert damaged.courier.repairs == 1
    for (p, version), anchor in damaged.seen.items():
        assert digest_flat(anchor.flat, layout.fragments[p].chunks()) == published[p, version]


def test_a_stopped_site_goes_on_from_its_checkpoint(tmp_path: Path, text: Path) -> None:
    """Stopped in the middle and started again: it continues its step count and its data, and the run ends well."""
    config = run_config(small_run(text, run={"tokens": 30_000}))

    stopped_at: list[Any] = []

    class Stopping(Learner):
        def step(self) -> None:
            super().step()
            if self.core.steps == 20:
                stopped_at.append(self.stream.state_dict())
                self.courier._post(Stop(15))

    with live(config, tmp_path / "state") as served:
        other = threading.Thread(target=Agent(site_config("b", served.url, tmp_path)).run)
        other.start()
        first = Agent(site_config("a", served.url, tmp_path))
        first.learns = Stopping
        with pytest.raises(Stopped):
            first.run()
        second = Agent(site_config("a", served.url, tmp_path))
        begun: list[tuple[int, Any]] = []

        class Resuming(Learner):
            def _resume(self, *args: Any) -> None:
                super()._resume(*args)
                begun.append((self.core.steps, self.stream.state_dict()))

        second.learns = Resuming
        second.run()
        other.join()
        assert served.coordinator.core.finished
        assert served.coordinator.reader.contributions() == []
    assert begun == [(20, *stopped_at)]
    assert second.courier.repairs == 0


def test_a_task_with_another_layout_is_refused_by_tensor_name(tmp_path: Path) -> None:
    config = run_config(
        {"run": {"name": "toy", "tokens": 10}, "task": {"use": f"{TOY}:Toy"}, "rounds": {"fragments": 2}}
    )
    with live(config, tmp_path / "state") as served:
        other = Agent(site_config("a", served.url, tmp_path, task={"use": f"{TOY}:Other"}))
        with pytest.raises(ConfigError, match="has a tensor third that the run lacks"):
            other.run()
        assert served.coordinator.core.members.live == {}


def test_a_site_whose_tokenizer_is_not_the_runs_is_told_both_and_does_not_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"use": f"{TOY}:Marked", "tokenizer": "91bc" * 16}
    config = run_config({"run": {"name": "toy", "tokens": 4}, "task": task, "rounds": {"fragments": 2}})
    with live(config, tmp_path / "state") as served:
        other = site_config("a", served.url, tmp_path, data={"tokenizer": "3fa0" * 16})
        for refused in (Agent(other).run, partial(check, other)):
            with pytest.raises(ConfigError, match=r"\(here 3fa03fa03fa0…, the run has 91bc91bc91bc…\): use the run's"):
                refused()
        capsys.readouterr()
        unmarked = site_config("a", served.url, tmp_path, task={"use": f"{TOY}:Toy"})
        with pytest.raises(ConfigError, match="here none, the run has 91bc"):
            Agent(unmarked).run()
        assert served.coordinator.core.tokens == 0
        same = site_config("a", served.url, tmp_path)
        check(same)
        assert "tokenizer   the run's (91bc91bc91bc…)\n" in capsys.readouterr().out
        Agent(same).run()
        assert served.coordinator.core.finished


def test_the_newest_of_two_agents_with_one_name_wins(tmp_path: Path) -> None:
    tables = {
        "run": {"name": "toy", "tokens": 10, "min_sites": 2},
        "task": {"use": f"{TOY}:Toy"},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 2},
    }
    with live(run_config(tables), tmp_path / "state") as served:
        older, newer = (Agent(site_config("a", served.url, tmp_path)) for _ in range(2))
        older.courier.begin(30.0)
        newer.courier.begin(30.0)
        failed = older.courier.events.get(timeout=60)
        while not hasattr(failed, "error"):
            failed = older.courier.events.get(timeout=60)
        assert isinstance(failed.error, RefusedError)
        assert failed.error.code == "superseded"
        assert served.coordinator.core.members.live["a"].session == newer.courier.branches[0].session
        older.courier.close()
        newer.courier.close()
