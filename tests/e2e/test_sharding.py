"""One model at two coordinators that share nothing: real agents over loopback HTTP."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.typedefs import Middleware

from coordinator.export import stored_run
from coordinator.store.mirror import restore
from coordinator.verify import verify
from shared.errors import ConfigError, RefusedError
from shared.protocol import Code
from shared.sharding import interleave
from site_agent import link
from site_agent.agent import Agent
from site_agent.check import check
from site_agent.learner import Learner
from site_agent.tasks.byte_lm import ByteLM
from tests.e2e.test_federation import TEXT, Watching, small_run
from tests.e2e.test_processes import write_run
from tests.support.live import Live, doors, live, run_config, site_config, train, url_of
from tests.support.processes import free_port, get, start, until

Tables = dict[str, dict[str, Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def at(tables: Tables, urls: list[str]) -> Tables:
    """The run of these tables, with coordinators at `urls`."""
    return {**tables, "run": {**tables["run"], "coordinators": urls}}


@contextmanager
def two(tables: Tables, directory: Path, weather: Middleware | None = None) -> Iterator[list[Live]]:
    """A run of these tables at two coordinators, the second one in that weather."""
    with doors(2) as ways_in:
        config = run_config(at(tables, [url_of(door) for door in ways_in]))
        directory.mkdir()
        with (
            live(config, directory / "0", None, 0, ways_in[0]) as first,
            live(config, directory / "1", weather, 1, ways_in[1]) as second,
        ):
            yield [first, second]


def digests(served: list[Live]) -> list[tuple[int, str]]:
    """(version, digest) of each fragment of the whole run."""
    return interleave([each.digests() for each in served])


def cut(request: web.Request) -> None:
    """Ends the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError("down")


def breaks_down(at_contribution: int, reached: threading.Event) -> Middleware:
    """From that contribution on nothing gets through: the run cannot end before there is another coordinator."""
    opened = 0

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal opened
        opened += request.method == "POST" and request.path.endswith("/contributions")
        if opened >= at_contribution:
            reached.set()
            cut(request)
        return await handler(request)

    return middleware


@pytest.mark.parametrize("fragments", [2, 3])
def test_two_coordinators_end_in_the_very_weights_of_one(tmp_path: Path, text: Path, fragments: int) -> None:
    """Full quorum: every version of every fragment at every site, and the masters at the end, bit for bit."""
    tables = small_run(text, rounds={"fragments": fragments}, inner={"steps": 9})
    with live(run_config(tables), tmp_path / "whole") as whole:
        alone = [Watching(site_config(name, whole.url, tmp_path / "alone")) for name in ("a", "b")]
        train(*alone)
        expected = whole.digests()
    with two(tables, tmp_path / "state") as served:
        agents = [Watching(site_config(name, served[0].url, tmp_path / "sites")) for name in ("a", "b")]
        train(*agents)
        assert digests(served) == expected
        assert [each.coordinator.core.finished for each in served] == [True, True]
        assert [each.coordinator.core.members.live for each in served] == [{}, {}], "a goodbye to both"
        assert [bool(each.coordinator.evaluations) for each in served] == [True, False]
    assert all(version > 2 for version, _ in expected)
    for one, other in zip(alone, agents, strict=True):
        assert other.courier.repairs == 0
        seen, wanted = ({key: anchor.digest for key, anchor in each.seen.items()} for each in (other, one))
        assert seen == wanted
    sharded = [tmp_path / "state" / "1", tmp_path / "state" / "0"]
    with stored_run(sharded) as parts, stored_run([tmp_path / "whole"]) as states:
        for part, state in zip(parts.states, states.states, strict=True):
            np.testing.assert_array_equal(part.master, state.master)
            assert part.fragment.tensors == state.fragment.tensors


def test_a_second_coordinator_that_is_started_again_changes_no_bit(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the run, with contributions on their way."""
    monkeypatch.setattr(link, "backoff", lambda attempt, chance: 0.0)
    tables = small_run(text)
    with live(run_config(tables), tmp_path / "whole") as whole:
        train(*(Agent(site_config(name, whole.url, tmp_path / "alone")) for name in ("a", "b")))
        expected = whole.digests()
    reached = threading.Event()
    with doors(2) as (first, second):
        config = run_config(at(tables, [url_of(first), url_of(second)]))
        with live(config, tmp_path / "0", None, 0, first) as zero:
            agents = [Agent(site_config(name, zero.url, tmp_path / "sites")) for name in ("a", "b")]
            training = threading.Thread(target=train, args=agents)
            with live(config, tmp_path / "1", breaks_down(6, reached), 1, second) as one:
                training.start()
                assert reached.wait(120)
                (before,) = one.digests()
            with live(config, tmp_path / "1", None, 1, second) as one:
                training.join()
                assert digests([zero, one]) == expected
    assert 0 < before[0] < expected[1][0]


def test_a_second_coordinator_that_is_restored_from_its_mirror_is_followed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link, "backoff", lambda attempt, chance: 0.0)
    reached, ended, mirror = threading.Event(), list[str](), f"file://{tmp_path}/mirror"
    with doors(2) as (first, second):
        tables = at(small_run(text, run={"min_sites": 1}), [url_of(first), url_of(second)])
        # What only the coordinator has to do with need not be the same at both.
        mirrored = run_config({**tables, "store": {"mirror": mirror, "mirror_seconds": 0, "checkpoint_versions": 1}})
        config = site_config("a", url_of(first), tmp_path)

        def site() -> None:
            agent = Agent(config)
            try:
                agent.run()
            except RefusedError as error:
                ended.append(error.code)
                Agent(config, agent.lineage).run()

        training = threading.Thread(target=site)
        with live(run_config(tables), tmp_path / "0", None, 0, first) as zero:
            with live(mirrored, tmp_path / "1", breaks_down(4, reached), 1, second) as one:
                training.start()
                assert reached.wait(120)
                until("a pass of the mirror", lambda: list((tmp_path / "mirror").glob("*/mirror-*.json")))
                before = one.coordinator.run_id
            assert before in str(restore(mirror, tmp_path / "new", lambda path: verify(path).faults))
            with live(mirrored, tmp_path / "new", None, 1, second) as one:
                training.join()
                assert [each.coordinator.core.finished for each in (zero, one)] == [True, True]
                assert one.coordinator.run_id != before
    assert ended == [Code.WRONG_RUN]
    assert "the run was restored as it was earlier" in caplog.text


def test_kill_9_of_the_second_coordinator_changes_no_bit(tmp_path: Path) -> None:
    tables = write_run(tmp_path)
    with live(run_config(tables), tmp_path / "calm") as whole:
        train(*(Agent(site_config(name, whole.url, tmp_path / "calm-sites")) for name in ("a", "b")))
        expected = whole.digests()
    port, log = free_port(), tmp_path / "coordinator.log"
    serve = ["coordinator", "serve", "run.toml", "--state", "1", "--port", str(port), "--insecure", "--shard", "1"]

    def version() -> int:
        document = get(f"http://127.0.0.1:{port}/v1/versions")
        return int(document["fragments"][0]["version"]) if document else -1

    with doors(1) as (door,):
        urls = [url_of(door), f"http://127.0.0.1:{port}"]
        run = (tmp_path / "run.toml").read_text(encoding="utf-8")
        (tmp_path / "run.toml").write_text(run.replace("[run]", f"[run]\ncoordinators = {urls!r}", 1), encoding="utf-8")
        second = start(serve, tmp_path, log)
        try:
            with live(run_config(at(tables, urls)), tmp_path / "0", None, 0, door) as first:
                until("a second coordinator", lambda: version() == 0)
                slow = {"throttle": 0.2}
                agents = [Agent(site_config(n, first.url, tmp_path / "sites", devices=slow)) for n in ("a", "b")]
                training = threading.Thread(target=train, args=agents)
                training.start()
                for reached in (2, 9):
                    until(f"version {reached}", lambda reached=reached: version() >= reached)
                    os.kill(second.pid, signal.SIGKILL)
                    second.wait()
                    second = start(serve, tmp_path, log)
                training.join()
                (last,) = get(f"{urls[1]}/v1/versions")["fragments"]
                assert [*first.digests(), (last["version"], last["digest"])] == expected, log.read_text()
        finally:
            second.kill()
            second.wait()


def test_a_site_that_dies_goes_on_from_its_checkpoint_at_both_coordinators(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it had contributed since to either comes up again as it was, and no bit changes."""

    class Died(Exception):
        pass

    class Dying(Learner):
        def step(self) -> None:
            super().step()
            if self.core.steps == 21:
                for branch in self.courier.branches:
                    branch.session = ""  # without a goodbye
                raise Died

    tables = small_run(text)
    with live(run_config(tables), tmp_path / "whole") as whole:
        train(*(Agent(site_config(name, whole.url, tmp_path / "alone")) for name in ("a", "b")))
        expected = whole.digests()
    with two(tables, tmp_path / "state") as served:
        other = threading.Thread(target=train, args=[Agent(site_config("b", served[0].url, tmp_path))])
        other.start()
        first = Agent(site_config("a", served[0].url, tmp_path))
        first.learns = Dying
        with pytest.raises(Died):
            first.run()
        sent = {path.stem.split("-")[1] for path in (tmp_path / "state-a" / "outbox").glob("[0-9]*.isthmus")}
        caplog.set_level("INFO")
        Agent(site_config("a", served[0].url, tmp_path)).run()
        other.join()
        assert digests(served) == expected
    assert sent == {"p0000", "p0001"}
    assert "continuing from the checkpoint of step 0" in caplog.text
    assert "is of no use" not in caplog.text


def test_data_is_leased_by_the_first_coordinator_alone(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXT[: len(TEXT) // 6], encoding="utf-8")
    manifest = ByteLM({"paths": str(text), "context": 16, "partition": "leased"}).manifest()
    assert manifest is not None
    tables = small_run(text, task={"partition": "leased"}, run={"tokens": int(1.5 * 16 * sum(manifest.sizes))})
    with two(tables, tmp_path / "state") as served:
        train(*(Agent(site_config(name, served[0].url, tmp_path)) for name in ("a", "b")))
        first, second = (each.coordinator.lending for each in served)
        assert first.leases is not None
        assert first.leases.dealt.epoch >= 1
        assert second.leases is None


def test_while_one_coordinator_is_out_of_reach_only_its_fragments_wait(tmp_path: Path, text: Path) -> None:
    """A run that waits for nobody: the other fragments go on, and what was trained meanwhile is not lost."""
    down, over = threading.Event(), threading.Event()

    @web.middleware
    async def unreachable(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.endswith("/contributions"):
            down.set()
        if down.is_set() and not over.is_set():
            cut(request)
        return await handler(request)

    rounds = {"quorum": 1, "overlap_steps": "auto"}
    with two(small_run(text, run={"min_sites": 1}, rounds=rounds), tmp_path / "state", unreachable) as served:
        training = threading.Thread(target=train, args=[Agent(site_config("a", served[0].url, tmp_path))])
        training.start()
        until("several cycles without the second one", lambda: down.is_set() and served[0].digests()[0][0] >= 4)
        assert served[1].digests()[0][0] == 0
        over.set()
        training.join()
        assert [each.coordinator.core.finished for each in served] == [True, True]


def test_a_coordinator_at_the_wrong_place_is_refused(tmp_path: Path, text: Path) -> None:
    with doors(2) as ways_in:
        urls = [url_of(door) for door in ways_in]
        straight, crossed = (run_config(at(small_run(text), each)) for each in (urls, urls[::-1]))
        with (
            live(straight, tmp_path / "0", None, 0, ways_in[0]) as first,
            live(crossed, tmp_path / "1", None, 1, ways_in[1]) as second,
        ):
            with pytest.raises(ConfigError, match="another config than the first coordinator"):
                Agent(site_config("a", first.url, tmp_path)).run()
            with pytest.raises(ConfigError, match="is coordinator 1 of its run, from 0, and a site joins the first"):
                Agent(site_config("a", second.url, tmp_path)).run()
            assert [each.coordinator.core.members.live for each in (first, second)] == [{}, {}]
        with (
            live(crossed, tmp_path / "0", None, 0, ways_in[0]) as first,
            live(crossed, tmp_path / "1", None, 1, ways_in[1]),
            pytest.raises(ConfigError, match=r"is entry 1 of .* what answers there is coordinator 0"),
        ):
            Agent(site_config("a", first.url, tmp_path)).run()


def test_a_check_names_and_tries_every_coordinator(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with two(small_run(text), tmp_path / "state") as served:
        check(site_config("a", served[0].url, tmp_path))
        said = capsys.readouterr().out
        with pytest.raises(ConfigError, match="is coordinator 1 of its run"):
            check(site_config("a", served[1].url, tmp_path))
    assert re.findall(r"coordinator *(\S+), round", said) == [each.url for each in served]
    assert said.count("none asked for, for site a in run small.") == 2
    assert "in 2 fragments" in said
