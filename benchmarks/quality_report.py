"""What the rows of `benchmarks.quality` say: the table, how much sooner one curve is anywhere than another, a plot."""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Curve = Sequence[Sequence[float]]
"""(virtual seconds, merged tokens, held-out loss) in order of time; the first point is the initial weights."""
LEVELS = 50
Pairs = Sequence[tuple[str, str]]
F64 = np.ndarray[Any, np.dtype[np.float64]]


def sooner(fast: Curve, slow: Curve) -> tuple[float, float] | None:
    """How many times sooner `fast` reaches a loss than `slow`: (least, median) over all losses that both have passed
    through, from the first measurement after the start on; None where there is none.

    Curves are read as their lowest loss so far, straight between measurements.
    """
    first = min(fast[1][2], slow[1][2]) if len(fast) > 1 and len(slow) > 1 else 0.0
    last = max(min(point[2] for point in fast), min(point[2] for point in slow))
    if last >= first:
        return None
    levels = np.linspace(last, first, LEVELS)
    ratios = _times(slow, levels) / _times(fast, levels)
    return float(ratios.min()), float(np.median(ratios))


def loss_at(curve: Curve, seconds: float) -> float:
    """The loss at a virtual time, straight between measurements; the last one after the end."""
    return float(np.interp(seconds, [point[0] for point in curve], [point[2] for point in curve]))


def _times(curve: Curve, levels: F64) -> F64:
    """When the curve's lowest loss so far first reaches each level."""
    seconds = np.array([point[0] for point in curve])
    losses = np.minimum.accumulate([point[2] for point in curve])
    # np.interp wants a rising x; where the loss stands still the earliest time counts.
    falling = np.concatenate(([True], losses[1:] < losses[:-1]))
    found: F64 = np.interp(-levels, -losses[falling], seconds[falling])
    return found


def table(rows: Sequence[Row], notes: Mapping[str, str], default: str, base: str, pairs: Pairs) -> Table:
    """Means over seeds, in the order of `notes`. `base` is what losses are compared with, `default` the setting whose
    end is the equal time, and `pairs` are (fast, slow) settings that are compared in time."""
    shown = Table(title=f"held-out loss at {rows[0]['budget']:,} tokens (nats per byte), virtual time")
    headings = (
        "setting",
        "loss",
        "± seeds",
        f"to {base}",
        "at equal time",
        "virtual s",
        "training",
        "sites",
        "cosine",
        "MB up",
        "MB down",
        "",
    )
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("setting", "") else "right")
    reference, end = _mean(rows, base, "eval_loss"), _mean(rows, default, "virtual_seconds")
    for name, note in notes.items():
        mine = [row for row in rows if row["setting"] == name]
        if not mine:
            continue
        losses = [row["eval_loss"] for row in mine]
        mean = statistics.mean(losses)
        shown.add_row(
            name,
            f"{mean:.4f}",
            f"{statistics.stdev(losses):.4f} ({len(losses)})" if len(losses) > 1 else "– (1)",
            f"{mean / reference - 1:+.1%}" if reference else "–",
            # (A run in real processes has no virtual time on its curve.)
            f"{statistics.mean(loss_at(row['curve'], end) for row in mine):.3f}"
            if end and mine[0]["curve"][-1][0]
            else "–",
            _optional(mine, "virtual_seconds", ",.0f"),
            _optional(mine, "training_share", ".0%"),
            _optional(mine, "sites_per_round", ".2f"),
            _optional(mine, "cosine", "+.2f"),
            _optional(mine, "bytes_up", ".0f", 1e-6),
            _optional(mine, "bytes_down", ".0f", 1e-6),
            note,
        )
    shown.caption = "\n".join(_in_time(rows, fast, slow) for fast, slow in pairs) or None
    return shown


def tables(rows: Sequence[Row], notes: Mapping[str, str], default: str, base: str, pairs: Pairs) -> list[Table]:
    """The table of each token budget."""
    budgets = sorted({row["budget"] for row in rows})
    return [table([row for row in rows if row["budget"] == budget], notes, default, base, pairs) for budget in budgets]


def write_markdown(heading: str, shown: Sequence[Table], sentences: Sequence[str], file: Path) -> None:
    """The tables and what is said below them as a page."""
    page = [f"# {heading}"]
    for one in shown:
        console = Console(file=io.StringIO(), width=400)
        with console.capture() as captured:
            console.print(_plain(one))
        said = [f"- {sentence}" for sentence in str(one.caption or "").splitlines()]
        page += [f"## {one.title}", _without_margins(captured.get()), "\n".join(said)]
    page += ["\n".join(f"- {sentence}" for sentence in sentences)]
    file.write_text("\n\n".join(part for part in page if part) + "\n", encoding="utf-8")


def _plain(shown: Table) -> Table:
    """The same table as Markdown draws it, without title and caption."""
    plain = copy.copy(shown)
    plain.title = plain.caption = None
    plain.box = box.MARKDOWN
    return plain


def _without_margins(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _in_time(rows: Sequence[Row], fast: str, slow: str) -> str:
    """Seed by seed, so that a lead of one does not hide that another has none."""
    curves = {name: {row["seed"]: row["curve"] for row in rows if row["setting"] == name} for name in (fast, slow)}
    both = sorted(curves[fast].keys() & curves[slow].keys())
    found = [lead for seed in both if (lead := sooner(curves[fast][seed], curves[slow][seed])) is not None]
    if not found:
        return f"{fast} beside {slow}: not measured"
    least, median = min(lead[0] for lead in found), statistics.mean(lead[1] for lead in found)
    together = sooner(*(mean_curve([row for row in rows if row["setting"] == name]) for name in (fast, slow)))
    on_means = f"; their means over seeds: at least {together[0]:.2f}, median {together[1]:.2f}" if together else ""
    return (
        f"{fast} gets to any loss at least {least:.2f} times as soon as {slow}, in each of {len(found)} seeds "
        f"(median {median:.2f}){on_means}"
    )


def mean_curve(rows: Sequence[Row]) -> Curve:
    """Point by point over seeds; where they have not equally many, the first and the last always count."""
    if not rows:
        return []
    curves = [np.array(row["curve"]) for row in rows]
    points = min(len(curve) for curve in curves)
    kept = [np.concatenate((curve[: points - 1], curve[-1:])) for curve in curves]
    mean: list[list[float]] = np.mean(kept, axis=0).tolist()
    return mean


def plot(rows: Sequence[Row], order: Sequence[str], bold: Mapping[str, str], tokens: int, file: Path) -> None:
    """Loss over virtual time and over tokens: each setting's mean over seeds, `bold` ones in their colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(16, 7.5), sharey=True)
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    here = [row for row in rows if row["budget"] == tokens]
    ends = []
    for number, name in enumerate(name for name in order if any(row["setting"] == name for row in here)):
        seconds, merged, losses = np.array(mean_curve([row for row in here if row["setting"] == name])).T
        ends.append(losses[-1])
        style: dict[str, Any] = {"color": colours[number % 20], "linewidth": 1.1}
        style |= {"linestyle": "-" if number < 20 else "--"}
        if name in bold:
            style = {"color": bold[name], "linewidth": 2.6, "zorder": 3}
        axes[0].plot(seconds[1:], losses[1:], label=name, **style)
        axes[1].plot(merged[1:], losses[1:], **style)
    axes[0].set(xlabel="virtual seconds (log)", ylabel="held-out loss, nats per byte", xscale="log")
    axes[1].set(xlabel="merged tokens")
    if ends:
        axes[0].set_ylim(min(ends) - 0.03, min(ends) + 1.0)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{tokens:,} tokens of Shakespeare; means over seeds")
    figure.legend(loc="outside lower center", fontsize=8, ncols=6)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _mean(rows: Sequence[Row], name: str, field: str) -> float | None:
    values = [row[field] for row in rows if row["setting"] == name]
    return statistics.mean(values) if values else None


def _optional(rows: Sequence[Row], field: str, form: str, scale: float = 1.0) -> str:
    values = [row[field] * scale for row in rows if row.get(field) is not None]
    return format(statistics.mean(values), form) if values else "–"
