"""Sites of several processes, for real: what they train, what becomes of a run when one of them dies, and what a person
reads when something is amiss."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.tokens import add_token
from site_agent.agent import Agent
from tests.support.live import Live, live, run_config, site_config, train
from tests.support.processes import processes_in, start, until
from tests.support.tiny import write_tokenizer

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))
STEPS = 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def small_run(text: Path, **tables: dict[str, Any]) -> Any:
    """A full-quorum run with a fixed course, to the bit."""
    small = {"context": 16, "width": 32, "layers": 1, "heads": 2}
    task = {"use": "byte-lm", "paths": str(text), **small, **tables.pop("task", {})}
    run = {"name": "ranks", "tokens": 24_000, "min_sites": 2, **tables.pop("run", {})}
    rounds = {"fragments": 2, "quorum": "all", "overlap_steps": 2, "pacing": "equal-steps", **tables.pop("rounds", {})}
    inner = {"lr": 3e-3, "steps": STEPS, "batch_size": 8}
    return run_config({"run": run, "task": task, "inner": inner, "rounds": rounds, **tables})


class Site:
    """`isthmus site COMMAND` in a directory of its own, and the processes that it has started."""

    def __init__(self, directory: Path, url: str, devices: str, command: str = "run", **more: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.command, self.log = directory, command, directory / f"{command}.log"
        keys = {"name": '"eu"', "coordinator": f'"{url}"', "checkpoint_seconds": "0.7", **more}
        tables = keys.pop("tables", "")
        lines = ["[site]", *(f"{key} = {value}" for key, value in keys.items()), "[devices]", "threads = 1", devices]
        (directory / "site.toml").write_text("\n".join([*lines, tables, "[metrics]", "port = 0", ""]), encoding="utf-8")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return start(["site", self.command, "site.toml"], self.directory, self.log)

    def again(self) -> None:
        self.process = self._start()

    def rank(self, rank: int) -> int:
        """The process of this rank, once it is there."""

        def found() -> int | None:
            for pid in processes_in(self.directory):
                if pid != self.process.pid and self._environment(pid).get("RANK") == str(rank):
                    return pid
            return None

        pid: int = until(f"rank {rank}", found)
        return pid

    @staticmethod
    def _environment(pid: int) -> dict[str, str]:
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return {}
        return dict(entry.partition("=")[::2] for entry in raw.split("\0"))

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def ended(self) -> int:
        return self.process.wait(timeout=200)

    def end(self) -> None:
        for pid in processes_in(self.directory):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@contextmanager
def site(*arguments: Any, **more: Any) -> Iterator[Site]:
    """A site's program for the length of the block."""
    started = Site(*arguments, **more)
    try:
        yield started
    finally:
        started.end()


def versions(served: Live) -> int:
    return sum(version for version, _ in served.digests())


@contextmanager
def beside(agent: Agent) -> Iterator[None]:
    """A site of one process that trains in this one, until the run is finished."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train(agent)
        except BaseException as error:
            failed.append(error)

    training = threading.Thread(target=work)
    training.start()
    yield
    training.join(timeout=200)
    assert not failed
    assert not training.is_alive()


TWO = 'device = ["cpu", "cpu"]'


def test_kill_9_of_any_process_of_a_site_changes_no_bit(tmp_path: Path, text: Path) -> None:
    """Of the second rank, then of the head: all of them start again from the last local checkpoint, and the run ends as
    if nothing had been, and as if the site were one process with as many passes."""
    with live(small_run(text), tmp_path / "calm") as served:
        eu_alone = site_config("eu", served.url, tmp_path / "calm", devices={"micro_batch": 4})
        train(Agent(eu_alone), Agent(site_config("us", served.url, tmp_path / "calm-us")))
        undisturbed = served.digests()
        assert served.coordinator.core.finished
    with live(small_run(text), tmp_path / "state") as served:
        us = Agent(site_config("us", served.url, tmp_path / "us"))
        with beside(us), site(tmp_path / "eu", served.url, f"{TWO}\nthrottle = 0.3") as eu:
            for starts, (victim, reached) in enumerate(((1, 4), (0, 12)), start=1):
                until(f"version {reached}", lambda reached=reached: versions(served) >= reached)
                os.kill(eu.rank(victim), signal.SIGKILL)
                until("a new start", lambda starts=starts: eu.said().count(AGAIN) == starts)
                assert versions(served) < sum(version for version, _ in undisturbed), "in mid-run"
            assert eu.ended() == 0, eu.said()
        assert served.digests() == undisturbed, eu.said()
    assert "2 x" in eu.said()
    assert eu.said().count("continuing from the checkpoint of step") == 2
    assert [sites for sites in merged(tmp_path / "state") if sites != ["eu", "us"]] == []


AGAIN = "a process of this site died (killed, as for want of memory); starting all again from the last checkpoint"


def merged(state: Path) -> list[list[str]]:
    """The sites of each round, by the coordinator's journal."""
    with contextlib.closing(sqlite3.connect(state / "journal.sqlite")) as journal:
        rows = journal.execute("SELECT round, site FROM contributions WHERE round IS NOT NULL ORDER BY site")
        rounds: dict[int, list[str]] = {}
        for round_, name in rows:
            rounds.setdefault(round_, []).append(name)
    return list(rounds.values())


def test_a_stop_saves_and_leaves_and_another_number_of_processes_goes_on(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run(text, run={"min_sites": 1})
    with live(config, tmp_path / "state") as served, site(tmp_path / "eu", served.url, f"{TWO}\nthrottle = 0.3") as eu:
        until("version 4", lambda: versions(served) >= 4)
        eu.process.send_signal(signal.SIGTERM)
        assert eu.ended() == 128 + signal.SIGTERM, eu.said()
        assert served.coordinator.core.members.live == {}, "it has left"
        assert not served.coordinator.core.finished
        assert "SIGTERM: leaving" in eu.said()
        step = int(eu.said().rpartition("saved at step ")[2].split()[0])
        assert step >= 2 * STEPS
        caplog.set_level("INFO", "site_agent")
        Agent(site_config("eu", served.url, tmp_path / "eu", site={"state": "state"})).run()
        assert f"continuing from the checkpoint of step {step}" in caplog.text
        assert served.coordinator.core.finished


MIXED = f'{TWO}\ngroup = ["fast", "slow"]\nthrottle = [1.0, 0.5]'


def test_groups_that_are_learners_take_part_by_themselves(tmp_path: Path, text: Path) -> None:
    with (
        live(small_run(text, run={"tokens": 12_000, "min_sites": 1}), tmp_path / "state") as served,
        site(tmp_path / "eu", served.url, f'{MIXED}\nmixed = "learners"') as eu,
    ):
        assert eu.ended() == 0, eu.said()
        status = start(["coordinator", "status", "--url", served.url], tmp_path, tmp_path / "status.log")
        assert status.wait() == 0
        assert served.coordinator.core.finished
    assert {name for sites in merged(tmp_path / "state") for name in sites} == {"eu~fast", "eu~slow"}
    shown = (tmp_path / "status.log").read_text()
    assert "eu~fast" in shown
    assert "eu~slow" in shown
    assert {"fast", "slow"} <= {path.name for path in (tmp_path / "eu" / "state").iterdir()}, "a state of its own each"


def test_a_check_says_once_what_the_groups_would_do(tmp_path: Path, text: Path) -> None:
    with (
        live(small_run(text), tmp_path / "state") as served,
        site(tmp_path / "eu", served.url, MIXED, "check") as eu,
    ):
        assert eu.ended() == 0, eu.said()
        assert served.coordinator.core.members.live == {}
    lines = eu.said().splitlines()
    heads = " ".join(line[:11].strip() for line in lines if not line.startswith(" "))
    assert heads == "devices coordinator token layout groups memory speed exchange upload", eu.said()
    for said in (
        r"devices +fast: \S+ \(cpu; fp32\)",
        r" +slow: \S+ \(cpu; fp32; throttled to 50% of full speed\)",
        r"groups +(one learner, gradients are averaged|a learner each: eu~fast, eu~slow) \(as measured here\)",
        r" +averaged \S+ sequences/s, apart \S+: .*",
        r"memory +fast: at least \S+ .*weights.* GB were free",
        r" +slow: at least .*",
        r".* +fast: \S+ sequences/s.*",
        r" +slow: \S+ sequences/s.*",
        r"exchange +\S+ s a step to sum the groups' gradients",
    ):
        assert sum(re.fullmatch(said, line) is not None for line in lines) == 1, (said, eu.said())
    assert not (tmp_path / "eu" / "state").exists(), "a check decides nothing"


def one_sentence(said: str) -> str:
    """What a person was told, where it is one sentence."""
    told = [line for line in said.splitlines() if line.strip()]
    assert len(told) == 1, said
    assert told[0].startswith("isthmus: ")
    return told[0]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is for the person who typed the command."""
    monkeypatch.setenv("ISTHMUS_LOG", "critical")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("quiet")
def test_what_is_amiss_is_one_sentence_of_all_processes(tmp_path: Path, text: Path) -> None:
    """Not one of each; with the exit code that says whose it is to mend."""
    tokenizer, other = write_tokenizer(tmp_path / "run"), write_tokenizer(tmp_path / "other", 290)
    with live(small_run(text, task={"tokenizer": str(tokenizer)}), tmp_path / "state", insecure=False) as served:
        (tmp_path / "eu.token").write_text(served.call(_token(served, "eu")))
        (tmp_path / "wrong.token").write_text(served.call(_token(served, "us")))
        right, wrong = (f'"{tmp_path}/{name}.token"' for name in ("eu", "wrong"))
        theirs = f'[data]\ntokenizer = "{other}"'
        with (
            site(tmp_path / "a", served.url, TWO, token_file=right, tables=theirs) as trains,
            site(tmp_path / "b", served.url, TWO, "check", token_file=right, tables=theirs) as checks,
            site(tmp_path / "c", served.url, TWO, token_file=wrong) as stranger,
        ):
            for each in (trains, checks, stranger):
                each.ended()
        assert served.coordinator.core.tokens == 0
    assert trains.process.returncode == 2, trains.said()
    assert "use the run's" in one_sentence(trains.said())
    assert checks.process.returncode == 2, checks.said()
    assert "use the run's" in one_sentence("\n".join(checks.said().splitlines()[found(checks.said()) :]))
    assert stranger.process.returncode == 3, stranger.said()
    assert "wrong.token was sent" in one_sentence(stranger.said())


def found(said: str) -> int:
    """How many lines a check has printed before what was amiss."""
    return next(n for n, line in enumerate(said.splitlines()) if not re.match(r"(devices|coordinator|token| ) ", line))


async def _token(served: Live, name: str) -> str:
    return add_token(served.coordinator.store.journal, name)
