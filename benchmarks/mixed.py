"""What a site of two unequal device groups makes of them: `python -m benchmarks.mixed`.

Groups are processes with one thread each, on cores of this machine; the slow one is throttled (it sleeps until its
work has taken 2, 3, … times as long). Three sites are there at a time, of the same config but for their devices: the
fast group alone, the slow one alone, and both, which average their gradients over Gloo. In turns, so that what else
the machine does meets all of them, each trains for a window of real inner steps:

- each alone, the other core idle: what `efficiency` is measured against;
- both at once and apart, as learners of their own: they share caches and memory bandwidth, and nothing else;
- both averaging, once their shares have settled; beside it what `site_agent.core.mixture.judge` said beforehand.

Speeds are tokens per second, medians over the windows; `efficiency` is over the sum of the speeds that each has alone,
`efficiency_busy` over the sum of those that they have at once. Of a step with averaging: `fast_seconds` and
`slow_seconds` are the groups' own passes and optimizer steps, the slow one's sleep among them; `waiting_seconds` what
the fast one waits for the slow one, `exchange_seconds` the sum of gradients, `optimizer_seconds` the fast one's; the
rest is dealing out the batch, and clipping. `others_cores` is how many cores other programs kept busy: where it is not
near 0, the figures are theirs too. Speeds are only reported; it fails where several processes do not come to what one
comes to (`benchmarks.same`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import same
from benchmarks.machine import Others, arguments, copy_bytes_per_second, report, store
from benchmarks.ranks import Ranks
from lab.corpus import shakespeare
from site_agent.core.shares import SETTLED_STEPS

Window = dict[str, Any]
SLOWEST_STEPS = 2
"""At the least so many steps are in a window."""


@dataclass(frozen=True)
class Size:
    """What is trained, for how long a window, and how many of them."""

    width: int
    layers: int
    context: int
    rounds: int
    seconds: float


QUICK, FULL = Size(192, 4, 128, 3, 2.0), Size(256, 4, 128, 7, 6.0)
CASES = [(3, (16, 4, 48)), (1, (16,)), (8, (16, 32))]
QUICK_CASES = [(3, (16, 4)), (1, (16,)), (8, (16,))]
"""(how many times slower the slow group is, sequences of the site's batch)."""


SPEEDS = ("setting", "mode", "params", "fast", "slow", "tokens_per_second", "efficiency", "efficiency_busy")
"""Fields that all rows have; the others are of a step of both."""


@dataclass(frozen=True)
class Round:
    """A window of each kind."""

    fast: Window
    slow: Window
    fast_busy: Window
    slow_busy: Window
    averaged: Window


def tables(size: Size, batch: int) -> dict[str, dict[str, Any]]:
    """The run's config."""
    model = {"context": size.context, "width": size.width, "layers": size.layers, "heads": 4}
    return {
        "run": {"name": "mixed", "tokens": 10**9},
        "task": {"use": "byte-lm", **model},
        "inner": {"lr": 1e-3, "batch_size": batch},
        "rounds": {"fragments": 2},
    }


def measure(directory: Path, text: Path, size: Size, slower: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of groups of which one is so many times slower, for each of the site's batches."""
    throttle = 1.0 / slower
    each = {"device": ["cpu"]}
    pair = {"device": ["cpu", "cpu"], "group": ["fast", "slow"], "throttle": [1.0, throttle]}
    rows: list[dict[str, Any]] = []
    with Others() as others, ExitStack() as stack:
        fast, slow, both = (
            stack.enter_context(Ranks(directory / f"{name}-{slower}", devices, text))
            for name, devices in (("fast", each), ("slow", {**each, "throttle": throttle}), ("both", pair))
        )
        for batch in batches:
            for ranks in (fast, slow, both):
                ranks.tell("prepare", run=tables(size, batch))
            (parameters,) = {ranks.answer()["params"] for ranks in (fast, slow, both)}
            for ranks in (fast, slow):
                ranks.ask("steps", steps=SLOWEST_STEPS)
            judged = both.ask("survey")
            both.ask("steps", steps=SETTLED_STEPS + 1)
            rounds = [_round(fast, slow, both, size.seconds) for _ in range(size.rounds)]
            rows += rows_of(f"1 : {slower}, {batch} sequences", parameters, judged, rounds)
    return [{**row, "others_cores": others.cores} for row in rows]


def _round(fast: Ranks, slow: Ranks, both: Ranks, seconds: float) -> Round:
    window = {"seconds": seconds, "steps": SLOWEST_STEPS}
    alone = fast.ask("train", **window), slow.ask("train", **window)
    # The slow one's windows are longer, where they are not the same; the fast one is at work for as long.
    longer = {**window, "seconds": max(seconds, alone[1]["seconds"])}
    fast.tell("train", **longer)
    slow.tell("train", **longer)
    return Round(*alone, fast.answer(), slow.answer(), both.ask("train", **window))


def rows_of(setting: str, parameters: int, judged: Window, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Each alone, both apart, both averaging: three rows of the same fields."""
    last = rounds[-1].averaged

    def speed(*names: str) -> float:
        return median(_speed(each, names) for each in rounds)

    def share(names: Sequence[str], of: Sequence[str]) -> float:
        """Of a round at a time: what else the machine did was in both."""
        return median(_speed(each, names) / _speed(each, of) for each in rounds)

    def in_step(name: str) -> float:
        return float(median(each.averaged[name] for each in rounds))

    passes = [median(each.averaged["group_seconds"][group] for each in rounds) for group in range(2)]
    averaged = {
        "shares": " + ".join(map(str, last["shares"])),
        "step_seconds": in_step("step_seconds"),
        "fast_seconds": passes[0],
        "slow_seconds": passes[1],
        "waiting_seconds": in_step("waiting"),
        "exchange_seconds": in_step("exchange"),
        "exchange_bytes": 4 * parameters,  # that each sends, and as many that it receives: two parties in a ring
        "optimizer_seconds": in_step("optimizer"),
        "predicted_efficiency": judged["efficiency"],
        "predicted_exchange_seconds": judged["exchange_seconds"],
        "judged": judged["mode"],
    }
    alone, busy, together = ("fast", "slow"), ("fast_busy", "slow_busy"), ("averaged",)

    def row(mode: str, names: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
        fast, slow = (speed(name) for name in names) if len(names) > 1 else (None, None)
        return {
            "setting": setting,
            "mode": mode,
            "params": parameters,
            "fast": fast,
            "slow": slow,
            "tokens_per_second": speed(*names),
            "efficiency": share(names, alone),
            "efficiency_busy": share(names, busy),
            **more,
        }

    nothing = dict.fromkeys(averaged)
    return [
        row("each alone", alone, nothing),
        row("apart, at once", busy, nothing),
        row("averaging", together, averaged),
    ]


def _speed(each: Round, names: Sequence[str]) -> float:
    """Tokens per second in the windows of these names, added up."""
    windows: list[Window] = [getattr(each, name) for name in names]
    return float(sum(window["tokens"] / window["seconds"] for window in windows))


def _only(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[dict[str, Any]]:
    return [{field: row[field] for field in fields} for row in rows]


def main() -> None:
    """Prints its tables, and with --json writes the rows. Exit code 1 where something is not equal."""
    options = arguments("What a site of two unequal device groups makes of them.").parse_args()
    size, cases = (QUICK, QUICK_CASES) if options.quick else (FULL, CASES)
    copy = copy_bytes_per_second()
    text = shakespeare(Path(tempfile.gettempdir()) / "isthmus-corpus")
    with tempfile.TemporaryDirectory(prefix="isthmus-mixed-") as name:
        directory = Path(name)
        equal = same.gradients(directory, text, tables(size, 16), (12, 4))
        equal += same.contributions(directory, text, tables(size, 8))
        speeds = [row for slower, batches in cases for row in measure(directory, text, size, slower, batches)]
    report("several processes against one", copy, equal, None)
    report(f"two device groups, tokens/s, medians of {size.rounds}", copy, _only(speeds, SPEEDS), None)
    of_steps = [field for field in speeds[0] if field not in SPEEDS]
    averaging = [row for row in speeds if row["shares"] is not None]
    report("a step of both, averaging", copy, _only(averaging, ["setting", *of_steps]), None)
    if options.json:
        store(copy, [*speeds, *equal], options.json)
    unequal = [row["setting"] for row in equal if row["equal"] == "no"]
    if unequal:
        raise SystemExit("not equal: " + "; ".join(unequal))


if __name__ == "__main__":
    main()
