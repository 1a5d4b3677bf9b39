"""The parts of `benchmarks.gpu` that need no accelerator: what is trained, the loop, what sites tell, the script."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import FULL, QUICK, SELF_CHECK
from benchmarks.gpu_report import page
from benchmarks.gpu_runs import Setup, metrics_of, needed_bytes, site_tables
from benchmarks.plain_loop import precision_of, train
from benchmarks.processes import free_port, write_toml
from shared.config import InnerTable, MetricsTable, load_run, load_site
from shared.errors import ConfigError
from shared.task import Shard, build_model
from site_agent.metrics import Metrics
from site_agent.tasks.byte_lm import ByteLM

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.mark.parametrize(
    ("setup", "least", "most"), [(FULL, 100e6, 200e6), (QUICK, 100e6, 200e6), (SELF_CHECK, 5e5, 2e6)]
)
def test_the_model_is_as_large_as_it_is_said_to_be(setup: Setup, least: float, most: float) -> None:
    needed, parameters = needed_bytes(setup, setup.tables("text.txt", 2, 10**9))
    assert least <= parameters <= most
    assert needed.weights == 4 * parameters
    assert needed.optimizer == 8 * parameters


@pytest.mark.parametrize("setup", [FULL, QUICK, SELF_CHECK])
def test_run_and_sites_are_configs_that_are_not_refused(setup: Setup, tmp_path: Path) -> None:
    write_toml(tmp_path / "run.toml", setup.tables("text.txt", 4, 10**9))
    run = load_run(tmp_path / "run.toml")
    ByteLM(run.task.options())
    assert run.run.min_sites == 4
    assert setup.cycle_tokens == run.inner.steps * run.inner.batch_size * run.task.options()["context"]
    write_toml(tmp_path / "site.toml", site_tables(setup, "site-0", "http://127.0.0.1:1", 9471, 4))
    site = load_site(tmp_path / "site.toml")
    assert site.devices.device == setup.device
    assert not site.site.evaluate


def test_the_plain_loop_trains_and_says_how_far_it_is(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of a text, {n * n} times.\n" for n in range(2000)), encoding="utf-8")
    task = ByteLM({"paths": str(text), "context": 16, "width": 16, "layers": 1, "heads": 2})
    said: list[dict[str, Any]] = []
    inner = InnerTable(lr=1e-2, batch_size=2)
    model = build_model(task, 0)
    train(task, model, Shard(0, 1), inner, torch.device("cpu"), said.append, lambda: len(said) > 3)
    *samples, end = said
    assert [set(sample) for sample in samples] == [{"at", "tokens"}] * 4
    assert all(later["tokens"] - before["tokens"] >= 32 for before, later in pairwise(samples))
    assert all(later["at"] > before["at"] for before, later in pairwise(samples))
    assert end["loss"] < end["first_loss"]
    assert end["peak_bytes"] > 0


def test_a_cpu_is_compared_in_fp32() -> None:
    assert precision_of(torch.device("cpu")) == "fp32"


def test_what_is_read_of_a_site_is_what_agents_serve() -> None:
    port, metrics = free_port(), Metrics()
    assert metrics_of(port) == {}
    server = metrics.serve(MetricsTable(port=port))
    assert server is not None
    try:
        metrics.tokens.inc(512)
        metrics.share.set(0.75)
        metrics.version.labels(1).set(3)
        said = metrics_of(port)
    finally:
        server.shutdown()
        server.server_close()
    assert said["isthmus_site_tokens_total"] == 512
    assert said["isthmus_site_training_share"] == 0.75
    assert not any("{" in name for name in said)
    assert {"isthmus_site_bytes_up_total", "isthmus_site_bytes_down_total"} <= said.keys()


def test_a_watched_site_is_the_program_itself_and_leaves_its_peak(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.watched_site", "peak.json", "cpu", "site", "run", "absent.toml"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "absent.toml" in done.stderr
    assert json.loads((tmp_path / "peak.json").read_text(encoding="utf-8"))["peak_bytes"] > 0


def options(**given: Any) -> argparse.Namespace:
    absent = {"self_check": False, "quick": False, "device": "", "sites": None, "seconds": None, "batch_size": None}
    return argparse.Namespace(**{**absent, "steps": None, **given})


def test_without_an_accelerator_only_the_check_runs() -> None:
    with pytest.raises(ConfigError, match="--self-check"):
        gpu.setup_of(options(device="cpu"))
    assert gpu.setup_of(options(self_check=True)) == SELF_CHECK


def test_what_is_given_takes_the_place_of_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "choose_device", lambda wanted: torch.device(wanted or "cuda:0"))
    assert gpu.setup_of(options()).device == "cuda:0"
    setup = gpu.setup_of(options(quick=True, device="xpu:1", sites=[3, 1, 3], batch_size=4))
    assert (setup.device, setup.sites, setup.batch_size) == ("xpu:1", (3, 1), 4)
    assert setup.seconds == QUICK.seconds
    with pytest.raises(ConfigError, match="--sites"):
        gpu.setup_of(options(sites=[0]))


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 1)])
def test_the_check_ends_well_only_if_nothing_is_amiss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: bool, code: int
) -> None:
    document = json.loads((ROOT / "docs" / "results" / "gpu.json").read_text(encoding="utf-8"))
    document["rows"] = [{**row, "finished": finished} if row["kind"] == "sites" else row for row in document["rows"]]
    monkeypatch.setattr(gpu, "run", lambda setup: document)
    monkeypatch.setenv("PYTHONPATH", "")
    files = ["--json", str(tmp_path / "gpu.json"), "--markdown", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", ["gpu", "--self-check", *files])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == code
    assert json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8")) == document
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == page(document)


def test_the_script_is_sound_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", [], ["--self-check"]),
        ("cpu", ["--json", "a b.json"], ["--self-check", "--json", "a b.json"]),
        ("cuda", ["--quick"], ["--quick"]),
        (
            "npu",
            ["--sites", "3"],
            ["--json", f"{ROOT}/docs/results/gpu.json", "--markdown", f"{ROOT}/docs/results/gpu.md", "--sites", "3"],
        ),
    ],
)
def test_the_script_measures_where_there_is_an_accelerator_and_checks_itself_elsewhere(
    tmp_path: Path, device: str, given: list[str], expected: list[str]
) -> None:
    done = _script(tmp_path, f'[ "$1" = -c ] && echo {device} && exit\nprintf "<%s>" "$@"\nexit 7\n', given)
    assert done.returncode == 7, done.stderr
    assert done.stdout.endswith("".join(f"<{word}>" for word in ["-m", "benchmarks.gpu", *expected]))
    assert ("no accelerator here" in done.stdout) == (device == "cpu")


def test_the_script_says_what_to_do_where_python_lacks_isthmus(tmp_path: Path) -> None:
    done = _script(tmp_path, "exit 1\n", [])
    assert done.returncode == 2
    assert "set PYTHON" in done.stderr


def _script(tmp_path: Path, python: str, given: list[str]) -> subprocess.CompletedProcess[str]:
    """The script with this in place of an interpreter."""
    stub = tmp_path / "python"
    stub.write_text(f"#!/usr/bin/env bash\n{python}", encoding="utf-8")
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub)}
    return subprocess.run([str(SCRIPT), *given], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
