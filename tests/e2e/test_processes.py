"""What only real processes can show: kill -9, Ctrl-C, and the demo from end to end."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from site_agent.agent import Agent
from tests.support.live import live, run_config, site_config, train
from tests.support.processes import free_port, get, processes_in, start, until

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))


def write_run(directory: Path) -> dict[str, dict[str, Any]]:
    """A full-quorum run with a fixed course, as tables and as `run.toml` in `directory`."""
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "killed", "tokens": 60_000, "min_sites": 2},
        "task": {
            "use": "byte-lm",
            "paths": str(directory / "text.txt"),
            "context": 16,
            "width": 32,
            "layers": 1,
            "heads": 2,
        },
        "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
        "rounds": {"fragments": 2, "quorum": "all", "overlap_steps": 2, "pacing": "equal-steps"},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (directory / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    return tables


def test_kill_9_of_the_coordinator_under_load_changes_no_bit(tmp_path: Path) -> None:
    tables = write_run(tmp_path)
    with live(run_config(tables), tmp_path / "calm") as served:
        train(*(Agent(site_config(name, served.url, tmp_path / "calm-sites")) for name in ("a", "b")))
        undisturbed = served.digests()

    port, log = free_port(), tmp_path / "coordinator.log"
    url = f"http://127.0.0.1:{port}"
    serve = ["coordinator", "serve", "run.toml", "--state", "state", "--port", str(port), "--insecure"]

    def versions() -> int:
        document = get(f"{url}/v1/versions")
        return sum(f["version"] for f in document["fragments"]) if document else -1

    coordinator = start(serve, tmp_path, log)
    try:
        until("a coordinator", lambda: versions() == 0)
        agents = [Agent(site_config(name, url, tmp_path / "sites", devices={"throttle": 0.2})) for name in ("a", "b")]
        training = threading.Thread(target=train, args=agents)
        training.start()
        for reached in (5, 20, 40):
            until(f"version {reached}", lambda reached=reached: versions() >= reached)
            os.kill(coordinator.pid, signal.SIGKILL)
            coordinator.wait()
            coordinator = start(serve, tmp_path, log)
        training.join()
        last = get(f"{url}/v1/versions")
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait() == 0
    finally:
        coordinator.kill()
        coordinator.wait()
    assert [(f["version"], f["digest"]) for f in last["fragments"]] == undisturbed, log.read_text()
    assert all(agent.courier.repairs == 0 for agent in agents)


HANGING = """
import threading
from tests.support.toy import Counting, Toy


class Hangs(Counting):
    def __next__(self):
        if super().__next__() == 30:
            open("hangs", "w").close()
            threading.Event().wait()
        return self.position


class Task(Toy):
    def train_batches(self, shard, batch_size):
        return Hangs()
"""


def test_a_stop_ends_in_time_though_a_step_hangs(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING, encoding="utf-8")
    tables = {
        "run": {"name": "hangs", "tokens": 1000},
        "task": {"use": f"{tmp_path}/hanging.py:Task"},
        "rounds": {"fragments": 2},
    }
    with live(run_config(tables), tmp_path / "state") as served:
        site = f"""
            [site]
            name = "a"
            coordinator = "{served.url}"
            stop_seconds = 1
            [devices]
            device = "cpu"
            [metrics]
            port = 0
        """
        (tmp_path / "site.toml").write_text(site, encoding="utf-8")
        agent = start(["site", "run", "site.toml"], tmp_path, tmp_path / "site.log")
        try:
            until("a step that hangs", (tmp_path / "hangs").exists)
            agent.send_signal(signal.SIGTERM)
            assert agent.wait() == 128 + signal.SIGTERM, (tmp_path / "site.log").read_text()
        finally:
            agent.kill()
            agent.wait()
    assert "stop_seconds = 1; ending here" in (tmp_path / "site.log").read_text()


def test_kill_9_of_a_site_changes_no_bit(tmp_path: Path) -> None:
    """At any step: it goes back to its checkpoint, and what it had contributed comes up again as it was."""
    tables = write_run(tmp_path)
    with live(run_config(tables), tmp_path / "calm") as served:
        train(*(Agent(site_config(name, served.url, tmp_path / "calm-sites")) for name in ("a", "b")))
        undisturbed = served.digests()
    with live(run_config(tables), tmp_path / "state") as served:
        (tmp_path / "a.toml").write_text(
            f'[site]\nname = "a"\ncoordinator = "{served.url}"\ncheckpoint_seconds = 0.7\n[metrics]\nport = 0\n'
            '[devices]\ndevice = "cpu"\nthrottle = 0.3\n',
            encoding="utf-8",
        )
        other = threading.Thread(target=train, args=[Agent(site_config("b", served.url, tmp_path / "sites"))])
        other.start()
        site = start(["site", "run", "a.toml"], tmp_path, tmp_path / "a.log")
        try:
            for reached in (4, 15, 31):
                until(f"version {reached}", lambda reached=reached: sum(v for v, _ in served.digests()) >= reached)
                site.kill()
                site.wait()
                site = start(["site", "run", "a.toml"], tmp_path, tmp_path / "a.log")
            assert site.wait() == 0, (tmp_path / "a.log").read_text()
            other.join()
        finally:
            site.kill()
            site.wait()
        assert served.digests() == undisturbed, (tmp_path / "a.log").read_text()


def test_ctrl_c_ends_every_process_of_the_demo_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it, in this process too
    (tmp_path / "tmp").mkdir()
    demo = start(["demo", "--minutes", "1"], tmp_path, tmp_path / "demo.log")
    try:
        until("coordinator and three sites", lambda: len(processes_in(tmp_path / "tmp")) == 4)
        demo.send_signal(signal.SIGINT)
        assert demo.wait() == 130, (tmp_path / "demo.log").read_text()
    finally:
        demo.kill()
        demo.wait()
    assert processes_in(tmp_path / "tmp") == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_demo_trains_for_real(tmp_path: Path) -> None:
    demo = start(["demo", "--minutes", "0.2", "--json", "demo.json"], tmp_path, tmp_path / "demo.log")
    assert demo.wait() == 0, (tmp_path / "demo.log").read_text()
    results = json.loads((tmp_path / "demo.json").read_text())
    assert results["anchors_identical"] is True
    assert results["eval_loss"] < 0.85 * results["initial_eval_loss"]
    assert results["baseline_eval_loss"] < 0.85 * results["initial_eval_loss"]
    assert results["tokens"] >= 120_000
    assert results["outer_steps"] >= 8
    # How many sites meet in a round, and so how many versions there are to fetch, is up to the machine's other work:
    # from 18 times on a busy one to 40.
    assert 10 * (results["bytes_up"] + results["bytes_down"]) < results["data_parallel_bytes"]
    assert [site["name"] for site in results["sites"]] == ["eu-west", "us-east", "ap-south"]
    steps = [site["inner_steps"] for site in results["sites"]]
    assert steps[0] > steps[1] > steps[2] > 0
    assert all(site["bytes_up"] > 10_000 and site["bytes_down"] > 10_000 for site in results["sites"])


def test_a_run_is_restored_from_its_mirror_and_its_sites_follow(tmp_path: Path) -> None:
    """The coordinator's machine is gone, state directory and all."""
    write_run(tmp_path)
    with (tmp_path / "run.toml").open("a", encoding="utf-8") as file:
        file.write(f'\n[store]\ncheckpoint_versions = 2\nmirror = "file://{tmp_path}/mirror"\nmirror_seconds = 0\n')
    port, logs = free_port(), {name: tmp_path / f"{name}.log" for name in ("coordinator", "a", "b")}
    url = f"http://127.0.0.1:{port}"
    serve = ["coordinator", "serve", "run.toml", "--state", "state", "--port", str(port), "--insecure"]

    def said(name: str) -> str:
        return logs[name].read_text(encoding="utf-8")

    children = {"coordinator": start(serve, tmp_path, logs["coordinator"])}
    try:
        until("a coordinator", lambda: get(f"{url}/v1/versions"))
        for name in ("a", "b"):
            (tmp_path / f"{name}.toml").write_text(
                f'[site]\nname = "{name}"\ncoordinator = "{url}"\nstate = "{name}"\n[metrics]\nport = 0\n'
                '[devices]\ndevice = "cpu"\nthrottle = 0.2\n',
                encoding="utf-8",
            )
            children[name] = start(["site", "run", f"{name}.toml"], tmp_path, logs[name])
        until("three passes", lambda: said("coordinator").count("mirrored: ") >= 3)
        children["coordinator"].kill()
        children["coordinator"].wait()
        (tmp_path / "state").rename(tmp_path / "lost")
        restore = start(["coordinator", "restore", f"file://{tmp_path}/mirror", "state"], tmp_path, tmp_path / "r.log")
        assert restore.wait() == 0, (tmp_path / "r.log").read_text()
        children["coordinator"] = start(serve, tmp_path, logs["coordinator"])
        for name in ("a", "b"):
            assert children[name].wait() == 0, said(name)
            assert "the run was restored as it was earlier" in said(name)
        last = get(f"{url}/v1/status")
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    assert last["state"] == "finished"
    assert last["eval_loss"] < 4.0
    assert last["run"] in (tmp_path / "r.log").read_text()
