"""What each way of training over uneven sites costs in loss, and saves in time, at equal tokens.

Every setting trains the same model on the same text with the same number of tokens, in virtual time (lab.trained):
real steps, codecs, merges and alignments, run by the cores of production; only a device's and a link's time are
imagined. Speeds are inner steps per virtual second, relative to the fastest; a link's one way takes LINK seconds.
`virtual_seconds` is what the run would have taken in the world, `seconds` what it took here. One setting runs as real
processes over HTTP as well (`diloco-m4-processes`), and must end in the very weights of its double in virtual time.

    python -m benchmarks.quality --json FILE [--plot FILE.png] [--markdown FILE.md]
                                 [--tokens N] [--seeds N] [--only NAME,…] [--quick]

Rows that FILE has already (same setting with the same config, seed and tokens) are kept, so that a long measurement can
be continued; how many of them are from other sources is said below the table.
"""

from __future__ import annotations

import hashlib
import itertools
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

from benchmarks import processes
from benchmarks.machine import arguments, copy_bytes_per_second, machine
from benchmarks.quality_report import plot, tables, write_markdown
from lab import data_parallel
from lab.corpus import shakespeare
from lab.trained import TrainedRun
from lab.virtual import VirtualSite
from shared.config import RunConfig, parse

UNEVEN, EVEN = (1.0, 2.0, 4.0, 8.0), (1.0, 1.0, 1.0, 1.0)
"""Virtual seconds of an inner step at each site: speeds 8:4:2:1, and all alike."""
LINK = 4.0
"""One way, virtual seconds: four inner steps of the fastest site, half a one of the slowest of four."""
ROUND_TRIP_STEPS = 9
"""τ that covers a link both ways where a step takes a second: the two ways, and the step in which the answer falls."""
RATE, BASE_RATE = 4.5e-3, 3e-3
"""[inner] lr of the sites, and of data-parallel training, each the best of those tried (see `*-rate-*`)."""
MOOD = 0.2
OTHER = "OTHER WEIGHTS"
MEASURED = ("coordinator", "lab", "shared", "site_agent")
"""Packages whose sources a row depends on."""
EVALUATIONS = 40
QUICK_TOKENS, QUICK_EVALUATIONS = 60_000, 8
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One way of training. `tables` override the base config, `steps` are the seconds of an inner step at each site;
    `batches` (data-parallel only) is the global batch in batches of a site; `double`: the setting of which this one is
    the run in real processes."""

    name: str
    note: str
    tables: Tables = field(default_factory=dict)
    steps: tuple[float, ...] = UNEVEN
    batches: int = 0
    dies: bool = False
    mood: float = 0.0
    double: str = ""


def _outer(**keys: Any) -> Tables:
    return {"outer": keys}


def _wire(**keys: Any) -> Tables:
    return {"wire": keys}


def _rate(lr: float) -> Tables:
    return {"inner": {"lr": lr}}


def _with(*tables: Tables) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for each in tables:
        for name, keys in each.items():
            merged.setdefault(name, {}).update(keys)
    return merged


PAPER: Tables = _outer(lr=0.7, momentum=0.9)
OURS: Tables = _outer(lr=1.0, momentum=0.5)
FP32: Tables = {"wire": {"upload": "fp32", "publish": "fp32"}}
TOPK: Tables = {"wire": {"upload": "topk2"}}
WHOLE: Tables = {"wire": {"feedback_decay": 1.0}}
BOTH: Tables = {"wire": {"upload_grid": 1.0, "publish": "int4", "publish_grid": 1.0}}
FULL: Tables = {"rounds": {"quorum": "all", "overlap_steps": 0, "pacing": "equal-steps"}}
STREAMING: Tables = {"rounds": {"quorum": "all", "overlap_steps": ROUND_TRIP_STEPS, "pacing": "equal-steps"}}
PACED: Tables = {"rounds": {"quorum": "all", "overlap_steps": "auto"}}
ASYNC: Tables = {"rounds": {"quorum": 1, "grace_seconds": 0, "overlap_steps": "unbounded"}}
UNPACED: Tables = {"rounds": {"pacing": "equal-steps"}}
STALE: Tables = {"rounds": {"max_staleness": 10**6}}
NAIVE: Tables = _with(ASYNC, UNPACED, STALE, PAPER, _outer(partial="full"))
DELAYED: Tables = _with(ASYNC, PAPER, _outer(optimizer="delayed-nesterov"))
BY_PLAY: Tables = {"task": {"partition": "contiguous"}}
HELOCO: Tables = _outer(correction="heloco")
RDA: Tables = _outer(merge="rda")
ADAM: Tables = _outer(optimizer="adam", lr=4e-3, momentum=0.9)
DECAY: Tables = {"rounds": {"staleness_decay": 0.5}}

DEFAULT, BASE = "decoupled", "data-parallel"
QUICK = [BASE, "data-parallel-large", "diloco-m1", "diloco-m2", "diloco-m4", "diloco-m4-processes", "streaming"]
QUICK += ["streaming-int4", "unpaced-full-quorum", "paced-full-quorum", "naive-async", "delayed-nesterov", DEFAULT]
QUICK += ["decoupled-no-grace", "decoupled-rda", "decoupled-follow", "adam", "heloco", "decoupled-even"]
QUICK += ["decoupled-by-play", "decoupled-one-dies", "paced-moody", "decoupled-moody"]
"""One of each kind, for --quick."""
SETTINGS = [
    Setting(BASE, "synchronous, the global batch of four sites", _rate(BASE_RATE), batches=4),
    Setting("data-parallel-rate-2", "the same, lr 2e-3", _rate(2e-3), batches=4),
    Setting("data-parallel-rate-4.5", "the same, lr 4.5e-3", _rate(4.5e-3), batches=4),
    Setting("data-parallel-large", "synchronous, four times that batch, lr 4.5e-3", batches=16),
    Setting("diloco-m1", "one site; η 0.7, μ 0.9, fp32, τ = 0", _with(FULL, PAPER, FP32), (1.0,)),
    Setting("diloco-m2", "two even sites, full quorum, the same", _with(FULL, PAPER, FP32), (1.0, 1.0)),
    Setting("diloco-m4", "four even sites, full quorum, the same", _with(FULL, PAPER, FP32), EVEN),
    Setting("diloco-m4-by-play", "the same, each site its own plays", _with(FULL, PAPER, FP32, BY_PLAY), EVEN),
    Setting("diloco-m4-processes", "as real processes over HTTP", _with(FULL, PAPER, FP32), EVEN, double="diloco-m4"),
    Setting("diloco-m4-short", "four even sites, our η and μ, fp32", _with(FULL, FP32), EVEN),
    Setting("streaming", "the same with τ of a round trip, carry", _with(STREAMING, FP32), EVEN),
    Setting("streaming-int4", "the same, int4 up, int8 down", STREAMING, EVEN),
    Setting("unpaced-full-quorum", "8:4:2:1, everyone takes H steps, τ = 0", FULL),
    Setting("paced-full-quorum", "8:4:2:1, DyLU, τ by time", PACED),
    Setting("naive-async", "8:4:2:1, each arrival a whole Nesterov step", NAIVE),
    Setting("naive-async-gentle", "the same with our η and μ", _with(NAIVE, OURS)),
    Setting("naive-async-rate-3", "naive async, lr 3e-3", _with(NAIVE, _rate(3e-3))),
    Setting("delayed-nesterov", "8:4:2:1, Delayed Nesterov and DyLU", DELAYED),
    Setting("delayed-nesterov-ours", "the same with our η and μ", _with(DELAYED, OURS)),
    Setting("delayed-nesterov-rate-3", "with η 0.7, μ 0.9 and lr 3e-3", _with(DELAYED, _rate(3e-3))),
    Setting(DEFAULT, "8:4:2:1, the defaults of run.toml"),
    Setting("decoupled-rate-3", "the same, lr 3e-3", _rate(3e-3)),
    Setting("decoupled-rate-6", "the same, lr 6e-3", _rate(6e-3)),
    Setting("decoupled-short-cycle", "the same, H = 8", {"inner": {"steps": 8}}),
    Setting("decoupled-long-cycle", "the same, H = 32", {"inner": {"steps": 32}}),
    Setting("decoupled-fp32", "the same, fp32 up and down", FP32),
    Setting("decoupled-step-0", "int4 on its finest grid", _wire(upload_grid=0.0)),
    Setting("decoupled-step-0.5", "int4 on a grid of ½ σ", _wire(upload_grid=0.5)),
    Setting("decoupled-step-0.75", "int4 on a grid of ¾ σ", _wire(upload_grid=0.75)),
    Setting("decoupled-step-1", "int4 on a grid of 1 σ", _wire(upload_grid=1.0)),
    Setting("decoupled-step-1.5", "int4 on a grid of 1.5 σ", _wire(upload_grid=1.5)),
    Setting("decoupled-step-2", "int4 on a grid of 2 σ", _wire(upload_grid=2.0)),
    Setting("decoupled-e3m0", "e3m0 up", _wire(upload="e3m0")),
    Setting("decoupled-topk2", "topk2 up, outer SGD", _with(TOPK, _outer(optimizer="sgd"))),
    Setting("decoupled-topk2-momentum", "topk2 up, our η and μ", _with(TOPK, OURS)),
    Setting("decoupled-topk2-256-momentum", "topk2, k = 256, our η and μ", _with(TOPK, _wire(topk=256), OURS)),
    Setting(
        "decoupled-topk2-256-best", "topk2, k = 256, β = 1, our η and μ", _with(TOPK, _wire(topk=256), WHOLE, OURS)
    ),
    Setting("decoupled-topk2-304", "topk2, k = 304, our η and μ", _with(TOPK, _wire(topk=304), OURS)),
    Setting(
        "decoupled-topk2-304-98",
        "topk2, k = 304, β = 0.98, our η and μ",
        _with(TOPK, _wire(topk=304, feedback_decay=0.98), OURS),
    ),
    Setting("decoupled-topk2-best", "topk2, β = 1, our η and μ", _with(TOPK, WHOLE, OURS)),
    Setting("decoupled-topk2-whole", "topk2 up, β = 1, outer SGD", _with(TOPK, WHOLE, _outer(optimizer="sgd"))),
    Setting(
        "decoupled-topk2-256", "topk2 with k = 256, outer SGD", _with(TOPK, _wire(topk=256), _outer(optimizer="sgd"))
    ),
    Setting("decoupled-sgd-fp32", "fp32, outer SGD", _with(FP32, _outer(optimizer="sgd"))),
    Setting("decoupled-publish-int4", "int4 down as well", _wire(publish="int4", publish_grid=0.0)),
    Setting("decoupled-publish-step-1", "int4 down on a grid of 1 σ", _wire(publish="int4", publish_grid=1.0)),
    Setting("decoupled-both-step-1", "int4 both ways on a grid of 1 σ", BOTH),
    Setting("decoupled-paper", "the same with η 0.7, μ 0.9", PAPER),
    Setting("decoupled-0.7-0.7", "the same with η 0.7, μ 0.7", _outer(lr=0.7, momentum=0.7)),
    Setting("decoupled-rda", "the same with RDA", RDA),
    Setting("decoupled-full", "each round a whole step", _outer(partial="full")),
    Setting(
        "decoupled-no-grace", "pure async: each arrival is a round, worth its share", {"rounds": {"grace_seconds": 0}}
    ),
    Setting("decoupled-follow", "sites join rounds that are about to close", {"rounds": {"pacing": "follow"}}),
    Setting("decoupled-overwrite", "aligned by overwriting", {"rounds": {"align": "overwrite"}}),
    Setting("decoupled-uniform", "contributions weigh the same", {"rounds": {"weighting": "uniform"}}),
    Setting("decoupled-tokens2", "contributions weigh tokens²/steps", {"rounds": {"weighting": "tokens2-per-step"}}),
    Setting("decoupled-decay", "older contributions weigh less: (1 + staleness)^−½", DECAY),
    Setting("decoupled-quorum-2", "a round needs two sites", {"rounds": {"quorum": 2}}),
    Setting("decoupled-no-feedback", "without error feedback", {"wire": {"error_feedback": False}}),
    Setting("adam-rate-1", "outer Adam, η 1e-3", _outer(optimizer="adam", lr=1e-3, momentum=0.9)),
    Setting("adam", "outer Adam, η 4e-3", ADAM),
    Setting("adam-decay", "the same; older contributions weigh less", _with(ADAM, DECAY)),
    Setting("heloco", "with HeLoCo's correction", HELOCO),
    Setting("naive-async-even", "1:1:1:1, each arrival a whole step", NAIVE, EVEN),
    Setting("delayed-nesterov-even", "1:1:1:1, Delayed Nesterov", DELAYED, EVEN),
    Setting("decoupled-even", "1:1:1:1, the defaults", {}, EVEN),
    Setting("decoupled-rda-even", "the same with RDA", RDA, EVEN),
    Setting("heloco-even", "1:1:1:1, with HeLoCo's correction", HELOCO, EVEN),
    Setting("decoupled-even-by-play", "1:1:1:1, each site its own plays", BY_PLAY, EVEN),
    Setting("naive-async-by-play", "each arrival a whole step, each site its own plays", _with(NAIVE, BY_PLAY)),
    Setting("paced-by-play", "full quorum, DyLU, each site its own plays", _with(PACED, BY_PLAY)),
    Setting("decoupled-by-play", "the defaults, each site its own plays", BY_PLAY),
    Setting("decoupled-rda-by-play", "the same with RDA", _with(RDA, BY_PLAY)),
    Setting("heloco-by-play", "with HeLoCo's correction", _with(HELOCO, BY_PLAY)),
    Setting("delayed-nesterov-by-play", "Delayed Nesterov, each site its own plays", _with(DELAYED, BY_PLAY)),
    Setting("decoupled-one-dies", "the defaults; the second site dies half way", dies=True),
    Setting("paced-moody", "full quorum, DyLU, τ by time; speeds wander by a factor of 1.5", PACED, mood=MOOD),
    Setting("decoupled-moody", "the defaults; speeds wander by a factor of 1.5", mood=MOOD),
    Setting(
        "no-grace-moody", "without grace; speeds wander by a factor of 1.5", {"rounds": {"grace_seconds": 0}}, mood=MOOD
    ),
]
NAMED = {setting.name: setting for setting in SETTINGS}
PAIRS = [
    (DEFAULT, "unpaced-full-quorum"),
    (DEFAULT, "paced-full-quorum"),
    (DEFAULT, BASE),
    ("decoupled-moody", "paced-moody"),
]


def tables_of(setting: Setting, text: str, tokens: int, seed: int) -> dict[str, dict[str, Any]]:
    """The run.toml of a setting, by tables."""
    base: Tables = {
        "run": {"name": setting.name, "seed": seed, "tokens": tokens, "min_sites": len(setting.steps)},
        "task": {"use": "byte-lm", "paths": text, "context": 64, "width": 64, "layers": 3, "heads": 4},
        "inner": {"lr": RATE, "steps": 16, "batch_size": 8, "warmup_tokens": tokens // 16},
        "rounds": {"fragments": 4},
    }
    return _with(base, setting.tables)


def digest_of(setting: Setting, tokens: int, seed: int) -> str:
    """What a row was measured with: its config, defaults included, and its sites."""
    config = parse(RunConfig, tables_of(setting, "", tokens, seed), setting.name)
    # (How much history a coordinator keeps changes nothing of a row.)
    told = [
        config.model_dump_json(exclude={"store"}),
        *map(str, (setting.steps, setting.batches, setting.dies, setting.mood, LINK)),
    ]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def code_digest() -> str:
    """Of the sources that a row depends on, wherever they lie: a row that was measured with others is told as such."""
    root = Path(__file__).parents[1]
    files = sorted(file for package in MEASURED for file in (root / package).rglob("*.py"))
    told = [file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() for file in files]
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:16]


def measure(name: str, text: str, tokens: int, seed: int) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    setting = NAMED[name]
    tables = tables_of(setting, text, tokens, seed)
    config = parse(RunConfig, tables, name)
    began = time.perf_counter()
    if setting.batches:
        found = _data_parallel(setting, config)
    elif setting.double:
        found = _processes(setting, tables)
    else:
        found = _federated(setting, config)
    known = {"setting": name, "seed": seed, "budget": tokens}
    known |= {"config": digest_of(setting, tokens, seed), "code": code_digest()}
    return {**known, **found, "seconds": time.perf_counter() - began}


def _federated(setting: Setting, config: RunConfig) -> dict[str, Any]:
    sites = [VirtualSite(f"site-{n}", each, LINK, mood=setting.mood) for n, each in enumerate(setting.steps)]
    if setting.dies:
        # Half of the tokens are merged at about half of the time that all sites together need.
        together = sum(1 / site.step_seconds for site in sites)
        tokens_per_step = config.inner.batch_size * int(config.task.options()["context"])
        sites[1].dies_at = config.run.tokens / tokens_per_step / together / 2
    run = TrainedRun(config, Path(), sites, _evaluations(config))
    run.run()
    gaps = [
        later - when
        for p in range(config.rounds.fragments)
        for when, later in itertools.pairwise(when for when, close in run.closed if close.fragment == p)
    ]
    living = [site for site in sites if site.dies_at is None]
    return {
        "tokens": run.core.tokens,
        "eval_loss": run.loss,
        "virtual_seconds": run.now,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "training_share": min(site.trained / (run.now - site.began) for site in living),
        "longest_wait_seconds": max(site.longest_wait for site in living),
        "longest_gap_seconds": max(gaps, default=0.0),
        "rounds": len(run.closed),
        "sites_per_round": statistics.mean(len(close.contributions) for _, close in run.closed),
        "cosine": statistics.mean(run.cosines) if run.cosines else None,
        "weights": [list(each) for each in run.digests()],
        "curve": [[point.seconds, point.tokens, point.loss] for point in run.curve],
    }


def _processes(setting: Setting, tables: Tables) -> dict[str, Any]:
    names = [f"site-{n}" for n in range(len(setting.steps))]
    status = processes.train(tables, names)
    return {
        "tokens": status["tokens"],
        "eval_loss": status["eval_loss"],
        "real_seconds": status["seconds"],
        "training_share": min(site["training_share"] for site in status["sites"]),
        "weights": [[fragment["version"], fragment["digest"]] for fragment in status["fragments"]],
        "curve": [[0.0, point["tokens"], point["loss"]] for point in status["evaluations"]],
    }


def _data_parallel(setting: Setting, config: RunConfig) -> dict[str, Any]:
    curve: list[list[float]] = []
    # A step takes as long as the slowest site and one exchange; more batches than sites are steps of accumulation.
    seconds = max(setting.steps) * setting.batches / len(setting.steps) + 2 * LINK

    def watch(steps: int, done: int, loss: float) -> None:
        curve.append([steps * seconds, done, loss])

    found = data_parallel.train(
        config, Path(), setting.batches, config.run.tokens, watch=watch, evaluations=_evaluations(config)
    )
    curve = [[0.0, 0, found.initial_eval_loss], *curve, [found.steps * seconds, found.tokens, found.eval_loss]]
    return {
        "tokens": found.tokens,
        "eval_loss": found.eval_loss,
        "virtual_seconds": found.steps * seconds,
        "training_share": min(setting.steps) * setting.batches / len(setting.steps) / seconds,
        "curve": curve,
    }


def _evaluations(config: RunConfig) -> int:
    return EVALUATIONS if config.run.tokens > QUICK_TOKENS else QUICK_EVALUATIONS


def _finished(file: Path | None) -> list[dict[str, Any]]:
    """The rows of a file that are still what would be measured."""
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [
        row
        for row in rows
        if (setting := NAMED.get(row["setting"])) is not None
        and row.get("config") == digest_of(setting, row["budget"], row["seed"])
    ]


def _write(file: Path | None, copy: float, rows: Sequence[Mapping[str, Any]]) -> None:
    if file is not None:
        places = {name: place for place, name in enumerate(NAMED)}
        ordered = sorted(rows, key=lambda row: (row["budget"], places[row["setting"]], row["seed"]))
        beside = file.with_suffix(".part")
        beside.write_text(json.dumps({"machine": machine(copy), "rows": ordered}) + "\n", encoding="utf-8")
        beside.replace(file)


def _agreement(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each run in real processes that has its double."""
    said = []
    for row in rows:
        for other in rows:
            same = other["setting"] == NAMED[row["setting"]].double
            if same and (other["seed"], other["budget"]) == (row["seed"], row["budget"]):
                verdict = "the same weights, bit for bit," if other["weights"] == row["weights"] else OTHER
                said.append(
                    f"{row['setting']}, seed {row['seed']}, {row['budget']:,} tokens: {verdict} as in virtual time; "
                    f"loss {row['eval_loss']:.6f} and {other['eval_loss']:.6f}"
                )
    return said


def main() -> None:
    """Measures what is missing, prints the table, and writes the JSON and the plot."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="settings, separated by commas")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as a page")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tokens, seeds = (QUICK_TOKENS, 1) if options.quick else (options.tokens, options.seeds)
    names = options.only.split(",") if options.only else QUICK if options.quick else list(NAMED)
    if unknown := set(names) - NAMED.keys():
        raise SystemExit(f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(NAMED)}")
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
    said: list[str] = []
    if rows:
        shown = tables(rows, {setting.name: setting.note for setting in SETTINGS}, DEFAULT, BASE, PAIRS)
        for one in shown:
            Console(width=180).print(one, end="\n\n")
        said = _agreement(rows)
        if older := sum(row.get("code") != code_digest() for row in rows):
            said.append(
                f"{older} of {len(rows)} rows were measured with earlier sources than these; without FILE all are new"
            )
        print("\n".join(said))
        if options.markdown is not None:
            write_markdown("Quality", shown, said, options.markdown)
    if options.plot is not None:
        # A run in real processes is its double in virtual time; its own seconds are those of this machine.
        order = [setting.name for setting in SETTINGS if not setting.double]
        plot(rows, order, {DEFAULT: "crimson", BASE: "black"}, tokens, options.plot)
    if any(OTHER in sentence for sentence in said):
        raise SystemExit("a run in real processes did not end in the weights of its double in virtual time")


if __name__ == "__main__":
    main()
