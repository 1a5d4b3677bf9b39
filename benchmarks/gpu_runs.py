"""What `benchmarks.gpu` trains: plain loops side by side, and the sites of a run, on one device; a row of each."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.course import Course
from benchmarks.processes import free_port, write_toml
from benchmarks.rates import Sample, Seen, of_sites, steady, together
from coordinator.store.journal import Journal
from lab.fleet import Child, Fleet, coordinator_status
from lab.measure import anchors_identical
from lab.sample import held_out_loss, load_model
from shared.config import RunConfig, parse
from shared.errors import FaultError
from shared.fragments import TensorSpec, build_layout
from shared.task import build_model, load_task
from site_agent.core.memory import Needed, memory_needed

LAST_MERGES = 50
"""How often the status is asked for, a fifth of a second apart, once the sites have ended."""


@dataclass(frozen=True)
class Setup:
    """What is trained, and for how long: `seconds` of each measurement, `steps` H, `values` to encode so many
    `repeats` times, `sites` one row each."""

    device: str
    task: Mapping[str, Any]
    batch_size: int
    lr: float
    steps: int
    seconds: float
    sites: tuple[int, ...]
    values: int
    repeats: int

    def threads(self, count: int) -> int:
        """CPU threads of each of so many processes."""
        return max(1, (os.cpu_count() or 1) // count) if self.device != "cpu" else 1

    def tables(self, text: str, sites: int, tokens: int) -> dict[str, dict[str, Any]]:
        """The run's config; what is not here is the default."""
        inner = {"lr": self.lr, "steps": self.steps, "batch_size": self.batch_size, "warmup_tokens": tokens // 16}
        return {
            "run": {"name": "gpu", "tokens": tokens, "min_sites": sites},
            "task": {"use": "byte-lm", "paths": text, "eval_batches": 1, **self.task},
            "inner": inner,
            "store": {"keep_rounds": 1_000_000},
        }

    @property
    def cycle_tokens(self) -> int:
        """What a site trains in a cycle at full pace."""
        tokens: int = self.steps * self.batch_size * self.task["context"]
        return tokens


# -- plain loops


def loops(setup: Setup, text: str, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a process says of the device, the row) of so many plain loops at the same time."""
    with _fleet() as fleet:
        write_toml(fleet.directory / "run.toml", setup.tables(text, count, 10**12))
        threads, until = setup.threads(count), fleet.directory / "over"
        files = [fleet.directory / f"loop-{i}.jsonl" for i in range(count)]
        children = []
        for i, file in enumerate(files):
            how = ["--device", setup.device, "--index", str(i), "--count", str(count), "--threads", str(threads)]
            how += ["--to", file.name, "--until", until.name]
            children.append(fleet.start(f"loop-{i}", ["benchmarks.plain_loop", "run.toml", *how]))
        while not all(len(_lines(file)) > 1 for file in files):
            _still_there(fleet, children)
            time.sleep(0.2)
        time.sleep(setup.seconds)
        _still_there(fleet, children)
        until.touch()
        for child in children:
            child.process.wait()
        fleet.check()
        said = [_lines(file) for file in files]
    samples = [[Sample(line["at"], line["tokens"]) for line in each if "at" in line] for each in said]
    rate = together(samples)
    row = {
        "kind": "loops",
        "setting": f"{count} plain loops" if count > 1 else "1 plain loop",
        "contributions": None,
        "seconds": rate.seconds,
        "tokens_per_second": rate.whole,
        "median_tokens_per_second": rate.median,
        "spread": rate.spread,
        "peak_bytes": _largest(each[-1]["peak_bytes"] for each in said),
        "initial_loss": statistics.mean(each[-1]["first_loss"] for each in said),
        "loss": statistics.mean(each[-1]["loss"] for each in said),
    }
    return said[0][0], row


def _lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines that are there, whole ones."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _still_there(fleet: Fleet, children: Sequence[Child]) -> None:
    """Raises FaultError where one has ended, well or not."""
    fleet.check()
    for child in children:
        if child.process.poll() is not None:
            raise FaultError(f"{child.name} has ended too early:\n{child.last_words()}")


# -- sites


def train_sites(setup: Setup, text: str, count: int, speed: float) -> dict[str, Any]:
    """The row of a run over so many sites on the device, of which `speed` (tokens per second of all) is expected."""
    tokens = round(speed * setup.seconds + 2 * count * setup.cycle_tokens)
    names = [f"site-{i}" for i in range(count)]
    with _fleet() as fleet:
        tables = setup.tables(text, count, tokens)
        course = Course(fleet, tables, names)
        course.start("coordinator")
        coordinator = fleet.children[-1]
        url, sites = f"http://127.0.0.1:{course.port}", {name: free_port() for name in names}
        while coordinator_status(url) is None:
            fleet.check()
            time.sleep(0.2)
        for name, port in sites.items():
            write_toml(fleet.directory / f"{name}.toml", site_tables(setup, name, url, port, count))
        children = [
            fleet.start(name, ["benchmarks.watched_site", f"{name}.json", setup.device, "site", "run", f"{name}.toml"])
            for name in names
        ]
        seen, moved = _watch(setup, fleet, url, children, list(sites.values()))
        status = _finished(url)
        fleet.stop(coordinator)
        kept = steady(seen, setup.cycle_tokens, tokens)
        rate = together(of_sites(kept))
        needed, parameters = needed_bytes(setup, tables)
        config, task, trained = load_model([course.state])
        merged = _contributions(course.state, len(status["fragments"]))
        peaks = [json.loads((fleet.directory / f"{name}.json").read_text(encoding="utf-8")) for name in names]
        return {
            "kind": "sites",
            "setting": f"{count} site{'s' if count > 1 else ''}",
            "params": parameters,
            "upload": config.wire.upload,
            "publish": config.wire.publish,
            "contributions": sum(merged),
            "least_contributions": min(merged),
            "steps": setup.steps,
            "batch_size": setup.batch_size,
            "tokens": status["tokens"],
            "seconds": rate.seconds,
            "tokens_per_second": rate.whole,
            "median_tokens_per_second": rate.median,
            "spread": rate.spread,
            "training_share": min(kept[-1].shares),
            "training_shares": list(kept[-1].shares),
            "bytes_up": moved[0],
            "bytes_down": moved[1],
            "peak_bytes": _largest(each["peak_bytes"] for each in peaks),
            "needed_bytes": needed.total,
            "needed_beyond_loop_bytes": needed.feedback + needed.snapshots + needed.alignment,
            "initial_eval_loss": held_out_loss(task, build_model(task, config.run.seed), config.inner.batch_size),
            "eval_loss": held_out_loss(task, trained, config.inner.batch_size),
            "finished": status["state"] == "finished",
            "repairs": sum(site["anchor_repairs"] for site in status["sites"]),
            "identical": anchors_identical(course.state, [fleet.directory / f"state-{name}" for name in names]),
        }


def site_tables(setup: Setup, name: str, url: str, port: int, count: int) -> dict[str, dict[str, Any]]:
    """A site's config. It saves once in the time that is measured (the default is every five minutes), and leaves
    evaluating to us: a plain loop does not do it either."""
    site = {"name": name, "coordinator": url, "state": f"state-{name}"}
    return {
        "site": {**site, "checkpoint_seconds": setup.seconds, "evaluate": False},
        "devices": {"device": setup.device, "threads": setup.threads(count)},
        "metrics": {"port": port},
    }


def _watch(
    setup: Setup, fleet: Fleet, url: str, children: Sequence[Child], ports: Sequence[int]
) -> tuple[list[Seen], tuple[float, float]]:
    """What was seen until every site had ended, and the bytes (up, down) of all sites."""
    seen: list[Seen] = []
    moved = dict.fromkeys(ports, (0.0, 0.0))
    while any(child.process.poll() is None for child in children):
        fleet.check()
        status, said = coordinator_status(url), [metrics_of(port) for port in ports]
        at = time.monotonic()
        for port, each in zip(ports, said, strict=True):
            if each:
                moved[port] = (each["isthmus_site_bytes_up_total"], each["isthmus_site_bytes_down_total"])
        if status is not None and status["state"] == "training" and all(said):
            tokens = tuple(each["isthmus_site_tokens_total"] for each in said)
            shares = tuple(each["isthmus_site_training_share"] for each in said)
            seen.append(Seen(at, tokens, tuple(each["tokens"] for each in status["fragments"]), shares))
        time.sleep(min(1.0, setup.seconds / 40))
    fleet.check()
    return seen, (sum(up for up, _ in moved.values()), sum(down for _, down in moved.values()))


def _finished(url: str) -> dict[str, Any]:
    """The status, once what came during the last merges is merged as well; as it is where that takes too long."""
    status = None
    for _ in range(LAST_MERGES):
        status = coordinator_status(url)
        if status is not None and status["state"] == "finished":
            return status
        time.sleep(0.2)
    if status is None:
        raise FaultError("the coordinator did not answer at the end of the run")
    return status


def metrics_of(port: int) -> dict[str, float]:
    """An agent's metrics without labels, by name; empty where it does not answer (yet, or any more)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except (urllib.error.URLError, OSError):
        return {}
    return {
        name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)
    }


def _contributions(state: Path, fragments: int) -> list[int]:
    """How many were merged into each fragment."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        return [sum(len(round_.members) for round_ in journal.rounds(p, after=0)) for p in range(fragments)]
    finally:
        journal.close()


def needed_bytes(setup: Setup, tables: dict[str, dict[str, Any]]) -> tuple[Needed, int]:
    """(what a site needs on its device at least, how many parameters the model has), without making the model."""
    config = parse(RunConfig, tables, "gpu")
    with torch.device("meta"):
        model = load_task("byte-lm", {**setup.task}).build_model()
    tensors = [TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    layout = build_layout(tensors, config.rounds.fragments, config.rounds.layout)
    inner = config.inner
    feedback = config.wire.error_feedback
    return memory_needed(layout, inner.optimizer, feedback=feedback, overlap=None, steps=inner.steps), layout.parameters


@contextmanager
def _fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="isthmus-gpu-") as directory, Fleet(Path(directory)) as fleet:
        yield fleet


def _largest(peaks: Iterable[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None
