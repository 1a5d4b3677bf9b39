"""`isthmus demo`: the whole system on one machine, for real.

One coordinator and several sites of unequal speed run as separate processes, each site behind an emulated
50 Mbit/s, 80 ms link, and train a small language model on Shakespeare. Then the same model is trained on the
same number of tokens as plain data-parallel, and the two are compared: loss, bytes, and how the sites spent
their time. Everything is temporary but the text, which is fetched once.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from coordinator.export import export
from lab.corpus import shakespeare
from lab.display import progress_view, result_view
from lab.fleet import Child, Fleet, coordinator_status
from lab.link import Link, LinkSettings
from lab.measure import anchors_identical, training_speed
from lab.sample import held_out_loss, load_exported
from lab.wheels import cache
from shared.config import RunConfig, load_run
from shared.errors import ConfigError, FaultError

RATE, RTT = 50e6 / 8, 0.080
NAMES = ("eu-west", "us-east", "ap-south", "sa-east", "af-south", "eu-north", "us-west", "ap-east")
PROMPT = "HAMLET\n"
BASELINE_THREADS = 2
LEAST_TOKENS = 120_000
"""Less teaches the model nothing that a table could show."""
USABLE = 0.85
"""Share of a plain training loop's speed that the sites, their links and the coordinator reach together."""

RUN_TOML = """\
[run]
name = "demo"
tokens = {tokens}
min_sites = {sites}

[task]
use = "byte-lm"
paths = {paths}
context = 64
width = 96
layers = 4
heads = 4

[inner]
optimizer = "adamw"
lr = 3e-3
steps = 16
batch_size = 16
schedule = "cosine"
warmup_tokens = {warmup}
"""
"""[outer], [rounds] and [wire] are what they are by default."""

LAST_MERGES = 50
"""How often the status is asked for, a fifth of a second apart, once the sites have ended."""

SITE_TOML = """\
[site]
name = "{name}"
coordinator = "http://127.0.0.1:{port}"
state = "state-{name}"

[devices]
device = "cpu"
threads = 1
throttle = {throttle}

[metrics]
port = 0
"""


@dataclass(frozen=True)
class SiteResult:
    """What one site did, and the bytes that crossed its link."""

    name: str
    inner_steps: int
    tokens: int
    training_share: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Results:
    """What the demo found, under the names of its JSON file."""

    initial_eval_loss: float
    eval_loss: float
    baseline_eval_loss: float
    tokens: int
    outer_steps: int
    bytes_up: int
    bytes_down: int
    data_parallel_bytes: int
    anchors_identical: bool
    sites: list[SiteResult]


@dataclass(frozen=True)
class Trained:
    """The federated half of the demo."""

    eval_loss: float
    tokens: int
    outer_steps: int
    identical: bool
    parameters: int
    sites: list[SiteResult]
    text: str


def run_demo(sites: int, minutes: float, json_file: Path | None, port: int) -> None:
    """Runs the demo and prints its table. Ctrl-C and SIGTERM end every process and leave nothing behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    if json_file is not None:
        _require_writable(json_file)
    port = _usable_port(port)
    with tempfile.TemporaryDirectory(prefix="isthmus-demo-") as directory, Fleet(Path(directory)) as fleet:
        # torch makes itself a cache for compiled code as soon as an optimizer steps, used or not.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(fleet.directory / "torchinductor"))
        try:
            results, text = asyncio.run(_demo(console, fleet, sites, minutes, port))
        except KeyboardInterrupt:
            console.print("stopping every process…")
            raise
    console.print(result_view(results))
    console.print(f"[bold]The trained model, continuing {PROMPT!r}:[/]")
    console.print(text, markup=False, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")


async def _demo(console: Console, fleet: Fleet, sites: int, minutes: float, port: int) -> tuple[Results, str]:
    console.print("[bold]Isthmus demo[/]: fetching the text, measuring this machine…")
    text = await asyncio.to_thread(shakespeare, cache())
    run_file = fleet.directory / "run.toml"
    throttles = [0.5**i if i < 3 else 0.25 for i in range(sites)]
    _write_run(run_file, text, sites, tokens=1_000_000)
    speed = await asyncio.to_thread(training_speed, load_run(run_file), sites, BASELINE_THREADS)
    # The sites do not fill the machine where their throttles add up to less than its cores.
    share = min(1.0, sum(throttles) / (os.cpu_count() or 1)) * USABLE
    _write_run(run_file, text, sites, tokens=max(LEAST_TOKENS, round(speed * share * minutes * 60)))
    config = load_run(run_file)
    trained = await _train(console, fleet, config, throttles, port)
    baseline = await _baseline(console, fleet, config, sites, trained.tokens)
    results = Results(
        initial_eval_loss=baseline["initial_eval_loss"],
        eval_loss=trained.eval_loss,
        baseline_eval_loss=baseline["eval_loss"],
        tokens=trained.tokens,
        outer_steps=trained.outer_steps,
        bytes_up=sum(site.bytes_up for site in trained.sites),
        bytes_down=sum(site.bytes_down for site in trained.sites),
        # Each step every site sends its fp32 gradient and receives the mean: the least that it can be.
        data_parallel_bytes=baseline["steps"] * sites * 2 * 4 * trained.parameters,
        anchors_identical=trained.identical,
        sites=trained.sites,
    )
    return results, trained.text


async def _train(console: Console, fleet: Fleet, config: RunConfig, throttles: list[float], port: int) -> Trained:
    """The federated run, from the coordinator's start to its end."""
    url, state = f"http://127.0.0.1:{port}", fleet.directory / "coordinator"
    coordinator = fleet.start(
        "coordinator",
        ["isthmus", "coordinator", "serve", "run.toml", "--state", str(state), "--port", str(port), "--insecure"],
    )
    while await asyncio.to_thread(coordinator_status, url) is None:
        fleet.check()
        await asyncio.sleep(0.2)
    names, links = NAMES[: len(throttles)], []
    try:
        children = []
        for name, throttle in zip(names, throttles, strict=True):
            link = Link(("127.0.0.1", 0), ("127.0.0.1", port), LinkSettings(rate=RATE, rtt=RTT))
            listening = await link.start()
            links.append(link)
            site_file = fleet.directory / f"{name}.toml"
            site_file.write_text(SITE_TOML.format(name=name, port=listening, throttle=throttle), encoding="utf-8")
            children.append(fleet.start(name, ["isthmus", "site", "run", site_file.name]))
        status = await _watch(console, fleet, url, children, dict(zip(names, links, strict=True)))
    finally:
        for link in links:
            await link.stop()
    fleet.stop(coordinator)
    identical = all(site["anchor_repairs"] == 0 for site in status["sites"]) and anchors_identical(
        state, [fleet.directory / f"state-{name}" for name in names]
    )
    console.print("evaluating…")
    weights = fleet.directory / "weights.safetensors"
    await asyncio.to_thread(export, [state], weights, "safetensors", published=False)
    task, model = load_exported(weights, config, fleet.directory)
    loss = held_out_loss(task, model, config.inner.batch_size)
    return Trained(
        eval_loss=loss if loss is not None else float("nan"),
        tokens=status["tokens"],
        outer_steps=status["outer_steps"],
        identical=identical,
        parameters=sum(fragment["parameters"] for fragment in status["fragments"]),
        sites=[_site_result(status, name, link) for name, link in zip(names, links, strict=True)],
        text=task.generate(model, PROMPT, 300, seed=0),
    )


def _site_result(status: dict[str, Any], name: str, link: Link) -> SiteResult:
    site = next(site for site in status["sites"] if site["name"] == name)
    share = round(site["training_share"], 4)
    return SiteResult(name, site["steps"], site["tokens"], share, link.bytes_up, link.bytes_down)


async def _watch(
    console: Console, fleet: Fleet, url: str, sites: list[Child], links: dict[str, Link]
) -> dict[str, Any]:
    """Shows the run until every site is done; the coordinator's last status."""
    began, status = asyncio.get_running_loop().time(), None
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while any(site.process.poll() is None for site in sites):
            fleet.check()
            status = await asyncio.to_thread(coordinator_status, url) or status
            elapsed = asyncio.get_running_loop().time() - began
            traffic = {name: (link.bytes_up, link.bytes_down) for name, link in links.items()}
            live.update(progress_view(status, elapsed, traffic))
            await asyncio.sleep(0.5)
        fleet.check()
    # A contribution that came while a last merge was under way is merged by one more round.
    for _ in range(LAST_MERGES):
        status = await asyncio.to_thread(coordinator_status, url)
        if status is not None and status["state"] == "finished":
            return status
        await asyncio.sleep(0.2)
    raise FaultError("the sites have ended and the run is not finished; this should not happen")


async def _baseline(console: Console, fleet: Fleet, config: RunConfig, sites: int, tokens: int) -> dict[str, Any]:
    """The data-parallel half, in one process with all of the machine."""
    child = fleet.start(
        "data-parallel",
        ["lab.data_parallel", "run.toml", "--sites", str(sites), "--tokens", str(tokens)],
        {"OMP_NUM_THREADS": str(BASELINE_THREADS)},
    )
    with console.status("data-parallel on the same tokens…") as spinner:
        waiter = asyncio.create_task(fleet.wait(child))
        while not waiter.done():
            done = child.last_words(1)
            if done.isdigit():
                spinner.update(f"data-parallel on the same tokens: {int(done):,} of {tokens:,}")
            await asyncio.wait({waiter}, timeout=0.5)
        waiter.result()
    result: dict[str, Any] = json.loads(child.last_words(1))
    return result


def _write_run(path: Path, text: Path, sites: int, tokens: int) -> None:
    filled = RUN_TOML.format(tokens=tokens, sites=sites, paths=json.dumps(str(text)), warmup=tokens // 4)
    path.write_text(filled, encoding="utf-8")


def _usable_port(wanted: int) -> int:
    """`wanted`, or any free one for 0. Raises ConfigError where it is taken."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            raise ConfigError(f"port {wanted} is in use by another program; name another --port") from None
        port: int = probe.getsockname()[1]
    return port


def _require_writable(file: Path) -> None:
    """Raises ConfigError now rather than after minutes of training."""
    try:
        with file.open("a", encoding="utf-8"):
            return
    except OSError as error:
        raise ConfigError(f"--json {file} cannot be written: {error.strerror}; name another file") from None
