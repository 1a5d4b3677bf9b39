"""What the demo shows: the run as it goes, and the table at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lab.demo import Results


def progress_view(status: dict[str, Any] | None, seconds: float, traffic: dict[str, tuple[int, int]]) -> RenderableType:
    """The run at a glance; `traffic` is (bytes up, bytes down) over each site's link."""
    if status is None:
        return Text(f"starting the coordinator and {len(traffic)} sites… {seconds:.0f} s")
    rate = status["tokens"] / seconds if seconds else 0.0
    loss = "–" if status["eval_loss"] is None else f"{status['eval_loss']:.3f}"
    head = Text(
        f"{status['state']} · {status['tokens']:,} of {status['tokens_budget']:,} tokens · {rate:,.0f} tokens/s · "
        f"{status['outer_steps']} outer steps · eval loss {loss} · {seconds:.0f} s"
    )
    sites = Table("site", "state")
    for heading in ("inner steps", "s/step", "steps a cycle", "training", "train loss", "up", "down"):
        sites.add_column(heading, justify="right")
    for site in status["sites"]:
        up, down = traffic.get(site["name"], (0, 0))
        sites.add_row(
            site["name"],
            site["state"],
            f"{site['steps']:,}",
            f"{site['step_seconds']:.3f}" if site["step_seconds"] else "–",
            "–" if site["pace"] is None else f"{site['pace']:.1f}",
            f"{site['training_share']:.1%}",
            "–" if site["loss"] is None else f"{site['loss']:.3f}",
            _bytes(up),
            _bytes(down),
        )
    bar = ProgressBar(total=status["tokens_budget"], completed=min(status["tokens"], status["tokens_budget"]), width=60)
    versions = Text("versions " + " ".join(str(f["version"]) for f in status["fragments"]))
    # A bar of a fixed width ends without a line of its own; in a grid it is one.
    line = Table.grid()
    line.add_row(bar)
    return Group(head, line, sites, versions)


def result_view(results: Results) -> RenderableType:
    """The table that the demo ends with."""
    sent = results.bytes_up + results.bytes_down
    gap = results.eval_loss / results.baseline_eval_loss - 1
    table = Table("", title=f"{len(results.sites)} sites, {results.tokens:,} tokens")
    for heading in ("Isthmus", "data-parallel"):
        table.add_column(heading, justify="right")
    table.add_row(
        "eval loss before (nats/byte)", f"{results.initial_eval_loss:.3f}", f"{results.initial_eval_loss:.3f}"
    )
    table.add_row("eval loss after", f"{results.eval_loss:.3f} ({gap:+.1%})", f"{results.baseline_eval_loss:.3f}")
    table.add_row(
        "bytes up + down",
        f"{_bytes(results.bytes_up)} + {_bytes(results.bytes_down)}",
        f"{_bytes(results.data_parallel_bytes)} ({results.data_parallel_bytes / max(1, sent):.0f}x)",
    )
    table.add_row("outer steps", str(results.outer_steps), "–")
    table.add_row("anchors identical at every site", "yes" if results.anchors_identical else "NO", "–")
    sites = Table("site")
    for heading in ("inner steps", "tokens", "share of time training", "up", "down"):
        sites.add_column(heading, justify="right")
    for site in results.sites:
        sites.add_row(
            site.name,
            f"{site.inner_steps:,}",
            f"{site.tokens:,}",
            f"{site.training_share:.1%}",
            _bytes(site.bytes_up),
            _bytes(site.bytes_down),
        )
    note = Text("Training includes the pauses that make a site as slow as it is meant to be.", style="dim")
    return Group(table, sites, note)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
