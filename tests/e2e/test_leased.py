"""Leased data from end to end: real agents over HTTP, every window of the text once an epoch."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.errors import RefusedError
from site_agent.agent import Agent
from site_agent.learner import Learner, Stopped
from site_agent.news import Stop
from site_agent.tasks.byte_lm import ByteLM
from tests.e2e.test_federation import small_run
from tests.support.live import live, run_config, site_config, train

TEXT = "".join(f"line {n} of a text that is short enough to be gone through, {n * n} times.\n" for n in range(300))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each window was trained, whoever did."""
    count: Counter[tuple[int, int]] = Counter()
    lock, batch = threading.Lock(), ByteLM.leased_batch

    def counted(self: ByteLM, sequences: Any) -> Any:
        with lock:
            count.update(sequences)
        return batch(self, sequences)

    monkeypatch.setattr(ByteLM, "leased_batch", counted)
    return count


def test_sites_train_every_window_as_often_as_any_other(
    tmp_path: Path, text: Path, windows: Counter[tuple[int, int]]
) -> None:
    manifest = ByteLM({"paths": str(text), "context": 16, "partition": "leased"}).manifest()
    assert manifest is not None
    tables = small_run(text, task={"partition": "leased"}, rounds={"quorum": 1, "overlap_steps": "auto"})
    tables["run"]["tokens"] = int(2.5 * 16 * sum(manifest.sizes))
    with live(run_config(tables), tmp_path / "state") as served:
        train(*(Agent(site_config(name, served.url, tmp_path)) for name in ("a", "b", "c")))
        data = served.coordinator.lending.document()
    assert data is not None
    assert data["epoch"] >= 2
    every = {(shard, index) for shard, size in enumerate(manifest.sizes) for index in range(size)}
    assert windows.keys() == every
    # The last epochs are under way at the end: one shard is ahead of another by those that are leased at once.
    assert max(windows.values()) - min(windows.values()) <= 2


class Half(Learner):
    """Is stopped after some steps."""

    def step(self) -> None:
        super().step()
        if self.core.steps % 11 == 0:
            self.courier._post(Stop(15))


class Interrupted(Agent):
    learns = Half


def test_a_site_that_is_stopped_and_started_goes_on_in_its_shard(
    tmp_path: Path, text: Path, windows: Counter[tuple[int, int]]
) -> None:
    """Half a run, and the other half: nothing is left out, nothing comes twice before all has come once."""
    tables = small_run(text, task={"partition": "leased"})
    manifest = ByteLM({"paths": str(text), "context": 16, "partition": "leased"}).manifest()
    assert manifest is not None
    tables["run"] |= {"tokens": int(0.9 * 16 * sum(manifest.sizes)), "min_sites": 1}
    with live(run_config(tables), tmp_path / "state") as served:
        with pytest.raises(Stopped):
            Interrupted(site_config("a", served.url, tmp_path)).run()
        Agent(site_config("a", served.url, tmp_path)).run()
    assert max(windows.values()) == 1


def test_a_site_may_train_other_data_from_one_start_to_the_next(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = small_run(text, task={"partition": "leased"}, run={"min_sites": 1, "tokens": 40_000})
    with live(run_config(tables), tmp_path / "state") as served:
        for n, partition in enumerate(("leased", "local", "leased")):
            caplog.clear()
            config = site_config("a", served.url, tmp_path, data={"partition": partition})
            with pytest.raises(Stopped):
                Interrupted(config).run()
            assert ("partition was changed" in caplog.text) == (n > 0)
            leases = served.coordinator.lending.leases
            assert leases is not None
            assert bool(leases.held_by("a")) == (partition == "leased")


def test_a_site_with_another_text_is_refused(tmp_path: Path, text: Path) -> None:
    tables = small_run(text, task={"partition": "leased"}, run={"min_sites": 1, "tokens": 2000})
    with live(run_config(tables), tmp_path / "state") as served:
        Agent(site_config("a", served.url, tmp_path)).run()
        (tmp_path / "other.txt").write_text(TEXT[:-9], encoding="utf-8")
        other = site_config("b", served.url, tmp_path, data={"paths": str(tmp_path / "other.txt")})
        with pytest.raises(RefusedError, match=r"not the data that this run leases.*wrong-data"):
            Agent(other).run()
