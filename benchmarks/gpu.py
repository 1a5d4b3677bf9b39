"""What a site costs beside a plain training loop where both have an accelerator: speed, encoding, memory.

    python -m benchmarks.gpu [--quick | --self-check] [--sites N ...] [--seconds S] [--batch-size B] [--steps H]
                             [--device D] [--json FILE] [--markdown FILE]

One device, one model of more than 100 M parameters (byte-lm; bf16 where the device has it), trained in turn by N
processes that run a plain loop (benchmarks.plain_loop), by N sites of one real run with the defaults of run.toml
(`isthmus site run`, their coordinator beside them), and by the N loops again. Processes that share a device cost each
other time whatever they do, so `efficiency` is N sites against N loops; one loop alone is measured too. Of the loops it
is the median over windows, and of before and after the faster one; of the sites all the time from the end of the first
cycle until the first fragment is complete, with every contribution, alignment and checkpoint in it. What sites have
trained is what their own metrics say, once a second.

Then each codec's encoding time on the device, beside a copy of its memory (benchmarks.encode_device has the two ways).
`peak_bytes` is what tensors of a process took at most, `needed_bytes` what site_agent.core.memory says is the least.

`--self-check` is the same with a tiny model on the CPU, for machines without an accelerator: it ends with code 0 only
if all figures are there, the run has finished, every site ends with the coordinator's bits and the loss has fallen. Its
speeds mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import encode_device
from benchmarks.course import Course
from benchmarks.gpu_report import page, problems, verdict
from benchmarks.machine import arguments, copy_bytes_per_second, machine, report
from benchmarks.plain_loop import synchronize
from benchmarks.processes import free_port, write_toml
from benchmarks.rates import Sample, Seen, of_sites, steady, together
from coordinator.store.journal import Journal
from lab.fleet import Child, Fleet, coordinator_status
from lab.measure import anchors_identical
from lab.sample import held_out_loss, load_model
from shared.codecs import warm_up
from shared.config import RunConfig, parse
from shared.errors import ConfigError, FaultError
from shared.fragments import TensorSpec, build_layout
from shared.program import command
from shared.task import build_model, load_task
from site_agent.core.memory import Needed, memory_needed
from site_agent.training.devices import choose_device

ROOT = Path(__file__).resolve().parents[1]
LINES = 200_000
LAST_MERGES = 50
"""How often the status is asked for, a fifth of a second apart, once the sites have ended."""
COPY_BYTES, COPIES, REPEATS = 1 << 30, 8, 7


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


# H = 100 as in Streaming DiLoCo (2501.18512); sites of one machine are much quicker with a step than those of its
# purpose, and contribute much more often.
FULL = Setup(
    device="",
    task={"context": 1024, "width": 1024, "layers": 10, "heads": 16},
    batch_size=16,
    lr=3e-4,
    steps=100,
    seconds=120.0,
    sites=(1, 2, 4),
    values=64 << 20,
    repeats=15,
)
QUICK = replace(FULL, seconds=25.0, sites=(2,), values=16 << 20, repeats=7)
SELF_CHECK = Setup(
    device="cpu",
    task={"context": 64, "width": 128, "layers": 5, "heads": 4},
    batch_size=4,
    lr=3e-3,
    steps=8,
    seconds=6.0,
    sites=(2,),
    values=1 << 20,
    repeats=3,
)


def measure(setup: Setup, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the processes say of the device, all rows of training)."""
    about, alone = loops(setup, text, 1)
    rows = [alone]
    for count in setup.sites:
        before = alone
        if count > 1:
            _, before = loops(setup, text, count)
            rows.append(before)
        trained = train_sites(setup, text, count, before["tokens_per_second"])
        _, after = loops(setup, text, count)
        plain = max(before["median_tokens_per_second"], after["median_tokens_per_second"])
        of_loops = {
            "loop_tokens_per_second": plain,
            "efficiency": trained["tokens_per_second"] / plain,
            "alone_efficiency": trained["tokens_per_second"] / alone["median_tokens_per_second"],
            "loop_peak_bytes": before["peak_bytes"],
        }
        rows += [trained | of_loops, after | {"setting": f"{after['setting']}, again"}]
    return about, rows


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
            write_toml(fleet.directory / f"{name}.toml", _site(setup, name, url, port, count))
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


def _site(setup: Setup, name: str, url: str, port: int, count: int) -> dict[str, dict[str, Any]]:
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
        status, said = coordinator_status(url), [_metrics(port) for port in ports]
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


def _metrics(port: int) -> dict[str, float]:
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


def needed_bytes(setup: Setup, tables: Mapping[str, Any]) -> tuple[Needed, int]:
    """(what a site needs on its device at least, how many parameters the model has), without making the model."""
    config = parse(RunConfig, tables, "gpu")
    with torch.device("meta"):
        model = load_task("byte-lm", {**setup.task}).build_model()
    tensors = [TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    layout = build_layout(tensors, config.rounds.fragments, config.rounds.layout)
    inner = config.inner
    feedback = config.wire.error_feedback
    return memory_needed(layout, inner.optimizer, feedback=feedback, overlap=None, steps=inner.steps), layout.parameters


# -- encoding


def encoding(setup: Setup, device: torch.device) -> list[dict[str, Any]]:
    """Each codec's rows, both ways."""
    warm_up()
    values = torch.randn(setup.values, generator=torch.Generator().manual_seed(0)).to(device)
    return [
        {"kind": "encoding", **row, "seconds_per_gigabyte": 1e9 / row["encode_bytes_per_second"]}
        for label, codec in encode_device.CODECS
        for row in encode_device.measure(label, codec, values, setup.repeats)
    ]


def device_copy(device: torch.device) -> float:
    """Bytes read plus bytes written per second by copies within the device's memory; median of several."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(REPEATS + 1):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - began) / COPIES)
    return 2 * COPY_BYTES / statistics.median(times[1:])


# -- all of it


@contextmanager
def _fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="isthmus-gpu-") as directory, Fleet(Path(directory)) as fleet:
        yield fleet


def _largest(peaks: Iterator[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def _setup(options: Any) -> Setup:
    """Raises ConfigError without an accelerator, unless the check is asked for."""
    setup = SELF_CHECK if options.self_check else QUICK if options.quick else FULL
    if not options.self_check:
        device = choose_device(options.device)
        if device.type == "cpu":
            raise ConfigError("there is no accelerator here; --self-check tries all of this on the CPU, for no speed")
        setup = replace(setup, device=str(device))
    if options.sites and min(options.sites) < 1:
        raise ConfigError("--sites: at least 1; give one or several numbers")
    given = {
        "sites": tuple(dict.fromkeys(options.sites or ())),
        "seconds": options.seconds,
        "batch_size": options.batch_size,
        "steps": options.steps,
    }
    return replace(setup, **{name: value for name, value in given.items() if value})


def run(setup: Setup) -> dict[str, Any]:
    """All of it: the JSON document."""
    with tempfile.TemporaryDirectory(prefix="isthmus-text-") as directory:
        text = Path(directory) / "text.txt"
        text.write_text(
            "".join(f"line {n} of a text that can be learnt from, {n * n} times.\n" for n in range(LINES)),
            encoding="utf-8",
        )
        about, rows = measure(setup, str(text))
    # Only now: while others were measured, this process had nothing on the device.
    device, copy = torch.device(setup.device), copy_bytes_per_second()
    of_device = {
        "device": about["device"],
        "device_type": device.type,
        "device_memory_bytes": about["memory_bytes"],
        "device_copy_bytes_per_second": copy if device.type == "cpu" else device_copy(device),
        "precision": about["precision"],
    }
    return {"machine": machine(copy) | of_device, "rows": rows + encoding(setup, device)}


@command
def main() -> None:
    """Prints the tables, and writes what is asked for; ends with code 1 where something was amiss."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--self-check", action="store_true", help="a tiny model on the CPU: all of it, for no speed")
    parser.add_argument("--sites", type=int, nargs="+", metavar="N", help="how many sites, one run each")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--batch-size", type=int, help="sequences of an inner step, where memory is short")
    parser.add_argument("--steps", type=int, metavar="H", help="inner steps of a cycle")
    parser.add_argument("--device", default="", help="as in [devices] device; absent: the first accelerator")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page to FILE")
    options = parser.parse_args()
    # Children run elsewhere, and are to find these packages.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    document = run(_setup(options))
    copy, rows = document["machine"]["copy_bytes_per_second"], document["rows"]
    for kind in ("loops", "sites", "encoding"):
        report(f"{kind} on {document['machine']['device']}", copy, [r for r in rows if r["kind"] == kind], None)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(page(document), encoding="utf-8")
    if document["machine"]["device_type"] != "cpu":
        print(verdict(rows))
    amiss = problems(document)
    for problem in amiss:
        print(f"amiss: {problem}")
    print("all checks hold" if not amiss else f"{len(amiss)} of the checks do not hold")
    raise SystemExit(1 if amiss else 0)


if __name__ == "__main__":
    main()
