"""What each way of training over uneven sites costs in loss, and saves in time, at equal tokens.

Every setting trains the same model on the same text with the same number of tokens, in virtual time (lab.trained):
real steps, codecs, merges and alignments, run by the cores of production; only a device's and a link's time are
imagined. Speeds are inner steps per virtual second, relative to the fastest; a link's one way takes LINK seconds.
`virtual_seconds` is what the run would have taken in the world, `seconds` what it took here.

    python -m benchmarks.quality --json FILE [--plot FILE.png] [--tokens N] [--seeds N] [--only NAME,…] [--quick]

Rows that FILE has already (same setting, seed and tokens) are kept, so that a long measurement can be continued.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import arguments, copy_bytes_per_second, machine
from lab import data_parallel
from lab.corpus import shakespeare
from lab.trained import TrainedRun
from lab.virtual import VirtualSite
from shared.config import RunConfig, parse

UNEVEN, EVEN = (1.0, 2.0, 4.0, 8.0), (1.0, 1.0, 1.0, 1.0)
"""Virtual seconds of an inner step at each site: speeds 8:4:2:1, and all alike."""
LINK = 4.0
"""One way, virtual seconds: four inner steps of the fastest site, half a one of the slowest of four."""
STEP = 1.0
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One way of training. `tables` override the base config; `batches` (data-parallel only) is the global batch in
    batches of a site."""

    name: str
    note: str
    tables: Tables = field(default_factory=dict)
    steps: tuple[float, ...] = UNEVEN
    data_parallel: bool = False
    batches: int = 0
    dies: bool = False


def _outer(**keys: Any) -> dict[str, dict[str, Any]]:
    return {"outer": keys}


def _with(*tables: Tables) -> Tables:
    merged: dict[str, dict[str, Any]] = {}
    for each in tables:
        for name, keys in each.items():
            merged.setdefault(name, {}).update(keys)
    return merged


DILOCO: Tables = {"outer": {"lr": 0.7, "momentum": 0.9}, "wire": {"upload": "fp32", "publish": "fp32"}}
FULL: Tables = {"rounds": {"quorum": "all", "overlap_steps": 0, "pacing": "equal-steps"}}
PACED: Tables = {"rounds": {"quorum": "all", "pacing": "equal-time", "overlap_steps": "auto"}}
ASYNC: Tables = {"rounds": {"quorum": 1, "grace_seconds": 0, "pacing": "equal-steps", "overlap_steps": "unbounded"}}
DECOUPLED: Tables = {"rounds": {"quorum": 1, "grace_seconds": "auto", "pacing": "equal-time", "overlap_steps": "auto"}}
SHORT: Tables = {"outer": {"lr": 1.0, "momentum": 0.5}}
BY_PLAY: Tables = {"task": {"partition": "contiguous"}}

SETTINGS = [
    Setting("data-parallel", "synchronous, global batch of 4 sites", data_parallel=True, batches=4),
    Setting("data-parallel-large", "synchronous, global batch of 16 sites", data_parallel=True, batches=16),
    Setting("diloco-m1", "one site, DiLoCo's outer step", _with(DILOCO, FULL), (1.0,)),
    Setting("diloco-m2", "two sites, full quorum, τ = 0, fp32", _with(DILOCO, FULL), (1.0, 1.0)),
    Setting("diloco-m4", "four sites, full quorum, τ = 0, fp32", _with(DILOCO, FULL), EVEN),
    Setting("diloco-m4-short", "the same with η 1.0, μ 0.5", _with(DILOCO, FULL, SHORT), EVEN),
    Setting("streaming", "four sites, full quorum, τ = 3, carry, fp32", _with(DILOCO, PACED, SHORT), EVEN),
    Setting("streaming-int4", "the same, int4 up, int8 down", _with(PACED, SHORT), EVEN),
    Setting("unpaced-full-quorum", "8:4:2:1, everyone takes H steps", _with(FULL, SHORT)),
    Setting("paced-full-quorum", "8:4:2:1, DyLU", _with(PACED, SHORT)),
    Setting(
        "naive-async",
        "8:4:2:1, each arrival a Nesterov step",
        _with(ASYNC, _outer(lr=0.7, momentum=0.9, partial="full")),
    ),
    Setting(
        "delayed-nesterov",
        "8:4:2:1, Delayed Nesterov and DyLU",
        _with(ASYNC, _outer(optimizer="delayed-nesterov", lr=0.7, momentum=0.9), {"rounds": {"pacing": "equal-time"}}),
    ),
    Setting("decoupled-rda", "8:4:2:1, K = 1, grace, RDA, carry", _with(DECOUPLED, SHORT, _outer(merge="rda"))),
    Setting("decoupled", "8:4:2:1, K = 1, grace, mean, carry: the default", _with(DECOUPLED, SHORT)),
    Setting("heloco", "the same with HeLoCo's correction", _with(DECOUPLED, SHORT, _outer(correction="heloco"))),
    Setting("decoupled-by-play", "the default, each site its own plays", _with(DECOUPLED, SHORT, BY_PLAY)),
    Setting(
        "heloco-by-play",
        "HeLoCo, each site its own plays",
        _with(DECOUPLED, SHORT, _outer(correction="heloco"), BY_PLAY),
    ),
    Setting("decoupled-one-dies", "the default; the second site dies half way", _with(DECOUPLED, SHORT), dies=True),
]


def config_of(setting: Setting, text: str, tokens: int, seed: int) -> RunConfig:
    """The run.toml of a setting."""
    base: Tables = {
        "run": {"name": setting.name, "seed": seed, "tokens": tokens, "min_sites": len(setting.steps)},
        "task": {"use": "byte-lm", "paths": text, "context": 64, "width": 64, "layers": 3, "heads": 4},
        "inner": {"lr": 3e-3, "steps": 16, "batch_size": 8, "warmup_tokens": min(50_000, tokens // 10)},
        "outer": {},
        "rounds": {"fragments": 4},
        "wire": {},
    }
    merged = {name: dict(keys) for name, keys in _with(base, setting.tables).items()}
    return parse(RunConfig, merged, setting.name)


def measure(name: str, text: str, tokens: int, seed: int) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    setting = next(each for each in SETTINGS if each.name == name)
    config = config_of(setting, text, tokens, seed)
    began = time.perf_counter()
    row = _data_parallel(setting, config, tokens) if setting.data_parallel else _federated(setting, config)
    return {"setting": name, "seed": seed, "budget": tokens, **row, "seconds": time.perf_counter() - began}


def _federated(setting: Setting, config: RunConfig) -> dict[str, Any]:
    sites = [VirtualSite(f"site-{n}", STEP * each, LINK) for n, each in enumerate(setting.steps)]
    if setting.dies:
        # Half of the tokens are merged at about half of the time that all sites together need.
        together = sum(1 / site.step_seconds for site in sites)
        tokens_per_step = config.inner.batch_size * int(config.task.options()["context"])
        sites[1].dies_at = config.run.tokens / tokens_per_step / together / 2
    run = TrainedRun(config, Path(), sites)
    run.run()
    taking_part = [len(close.contributions) for _, close in run.closed]
    gaps = [
        after - before
        for before, after in zip(sorted(t for t, _ in run.closed), sorted(t for t, _ in run.closed)[1:], strict=False)
    ]
    return {
        "tokens": run.core.tokens,
        "eval_loss": run.loss,
        "virtual_seconds": run.now,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "training_share": min(site.trained / (run.now - site.began) for site in sites if site.dies_at is None),
        "rounds": len(run.closed),
        "sites_per_round": statistics.mean(taking_part),
        "cosine": statistics.mean(run.cosines) if run.cosines else None,
        "longest_gap_seconds": max(gaps, default=0.0),
        "curve": [[point.seconds, point.tokens, point.loss] for point in run.curve],
    }


def _data_parallel(setting: Setting, config: RunConfig, tokens: int) -> dict[str, Any]:
    curve: list[list[float]] = []
    # A step takes as long as the slowest site and one exchange; more batches than sites are steps of accumulation.
    seconds = STEP * max(setting.steps) * setting.batches / len(setting.steps) + 2 * LINK

    def watch(steps: int, done: int, loss: float) -> None:
        curve.append([steps * seconds, done, loss])

    found = data_parallel.train(config, Path(), setting.batches, tokens, watch=watch)
    curve = [[0.0, 0, found.initial_eval_loss], *curve, [found.steps * seconds, found.tokens, found.eval_loss]]
    return {
        "tokens": found.tokens,
        "eval_loss": found.eval_loss,
        "virtual_seconds": found.steps * seconds,
        "training_share": STEP * min(setting.steps) / seconds,
        "curve": curve,
    }


def _finished(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def _write(file: Path | None, copy: float, rows: Sequence[Mapping[str, Any]]) -> None:
    if file is not None:
        ordered = sorted(rows, key=lambda row: (_place(row["setting"]), row["budget"], row["seed"]))
        file.write_text(json.dumps({"machine": machine(copy), "rows": ordered}) + "\n", encoding="utf-8")


def _place(name: str) -> int:
    return next((place for place, setting in enumerate(SETTINGS) if setting.name == name), len(SETTINGS))


def show(rows: Sequence[Mapping[str, Any]], tokens: int) -> None:
    """The table: means over seeds, beside data-parallel."""
    here = [row for row in rows if row["budget"] == tokens]
    table = Table(title=f"held-out loss at {tokens:,} tokens (nats per byte), virtual time")
    for heading in (
        "setting",
        "",
        "seeds",
        "loss",
        "± (seeds)",
        "to data-parallel",
        "virtual s",
        "sites/round",
        "cosine",
    ):
        table.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    base = [row["eval_loss"] for row in here if row["setting"] == "data-parallel"]
    for setting in SETTINGS:
        mine = [row for row in here if row["setting"] == setting.name]
        if not mine:
            continue
        losses = [row["eval_loss"] for row in mine]
        mean = statistics.mean(losses)
        cosines = [row["cosine"] for row in mine if row.get("cosine") is not None]
        table.add_row(
            setting.name,
            setting.note,
            str(len(mine)),
            f"{mean:.4f}",
            f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "–",
            f"{mean / statistics.mean(base) - 1:+.2%}" if base else "–",
            f"{statistics.mean(row['virtual_seconds'] for row in mine):,.0f}",
            f"{statistics.mean(row['sites_per_round'] for row in mine):.2f}" if "sites_per_round" in mine[0] else "–",
            f"{statistics.mean(cosines):+.2f}" if cosines else "–",
        )
    Console(width=150).print(table)


def plot(rows: Sequence[Mapping[str, Any]], tokens: int, file: Path) -> None:
    """Loss over virtual time and over tokens, of the first seed of each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6.5), sharey=True)
    shown = sorted(
        (row for row in rows if row["budget"] == tokens and row["seed"] == 0), key=lambda r: _place(r["setting"])
    )
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, row in enumerate(shown):
        seconds, merged, losses = zip(*row["curve"], strict=True)
        style = {
            "color": colours[number % 20],
            "linewidth": 2.5 if row["setting"] in ("decoupled", "data-parallel") else 1.2,
        }
        axes[0].plot(seconds, losses, label=row["setting"], **style)
        axes[1].plot(merged, losses, label=row["setting"], **style)
    best = min(row["eval_loss"] for row in shown)
    axes[0].set(
        xlabel="virtual seconds (log)",
        ylabel="held-out loss, nats per byte",
        xscale="log",
        ylim=(best - 0.03, best + 1.2),
    )
    axes[1].set(xlabel="merged tokens")
    axes[1].legend(fontsize=8, ncols=2)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{tokens:,} tokens of Shakespeare, seed 0")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Measures what is missing, prints the table, and writes the JSON and the plot."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="settings, separated by commas")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tokens, seeds = (150_000, 1) if options.quick else (options.tokens, options.seeds)
    names = options.only.split(",") if options.only else [setting.name for setting in SETTINGS]
    if unknown := set(names) - {setting.name for setting in SETTINGS}:
        raise SystemExit(
            f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in SETTINGS)}"
        )
    copy = copy_bytes_per_second()
    rows = _finished(options.json)
    done = {(row["setting"], row["seed"], row["budget"]) for row in rows}
    text = str(shakespeare(Path(tempfile.gettempdir()) / "isthmus-corpus"))
    missing = [
        (name, text, tokens, seed) for seed in range(seeds) for name in names if (name, seed, tokens) not in done
    ]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, *case) for case in missing]):
            row = future.result()
            rows.append(row)
            _write(options.json, copy, rows)
            print(f"{row['setting']} seed {row['seed']}: {row['eval_loss']:.4f} in {row['seconds']:.0f} s", flush=True)
    show(rows, tokens)
    if options.plot is not None:
        plot(rows, tokens, options.plot)


if __name__ == "__main__":
    main()
