"""What the rows of `benchmarks.gpu` say: what is amiss with them, and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ASKED = 0.97
"""What sites are to reach of plain loops."""
LEAST_CONTRIBUTIONS = 2
"""Of each fragment."""
FIGURES = {
    "loops": ("seconds", "tokens_per_second", "median_tokens_per_second", "initial_loss", "loss", "peak_bytes"),
    "sites": (
        "params",
        "contributions",
        "tokens",
        "seconds",
        "tokens_per_second",
        "median_tokens_per_second",
        "training_share",
        "bytes_up",
        "bytes_down",
        "loop_tokens_per_second",
        "efficiency",
        "alone_efficiency",
        "peak_bytes",
        "loop_peak_bytes",
        "needed_bytes",
        "initial_eval_loss",
        "eval_loss",
    ),
    "encoding": ("params", "seconds", "encode_bytes_per_second", "seconds_per_gigabyte"),
}
"""Of each kind of row what must be there, finite and above zero."""
OF_DEVICE = ("copy_bytes_per_second", "device_copy_bytes_per_second", "device_memory_bytes")
Row = Mapping[str, Any]


def problems(document: Mapping[str, Any]) -> list[str]:
    """What is amiss, a sentence each; of speed it asks only that there is one."""
    rows: Sequence[Row] = document["rows"]
    about = document["machine"]
    # Accelerators need not say what was taken of their memory.
    silent = {"peak_bytes", "loop_peak_bytes"} if about["device_type"] != "cpu" else set()
    found = [f"no row of {kind}" for kind in FIGURES if not any(row["kind"] == kind for row in rows)]
    found += [f"machine: {name} is {about.get(name)}" for name in OF_DEVICE if not _sound(about.get(name))]
    for row in rows:
        wrong = [name for name in FIGURES[row["kind"]] if not _sound(row.get(name))]
        wrong = [name for name in wrong if not (name in silent and row.get(name) is None)]
        found += [f"{row['setting']}: {name} is {row.get(name)}" for name in wrong]
        if row["kind"] == "sites":
            found += [f"{row['setting']}: {problem}" for problem in _of_run(row)]
    return found


def _of_run(row: Row) -> Iterable[str]:
    if not row["finished"]:
        yield "the run did not finish"
    if not row["identical"] or row["repairs"]:
        yield f"anchors are not the coordinator's at every site ({row['repairs']} repaired)"
    if row["least_contributions"] < LEAST_CONTRIBUTIONS:
        yield f"a fragment has {row['least_contributions']} contributions; give more --seconds"
    losses = row["initial_eval_loss"], row["eval_loss"]
    if all(map(_sound, losses)) and losses[1] >= losses[0]:
        yield f"the held-out loss went from {row['initial_eval_loss']} to {row['eval_loss']}"


def _sound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def page(document: Mapping[str, Any]) -> str:
    """docs/results/gpu.md."""
    rows, about = document["rows"], document["machine"]
    loops, sites, encoding = ([row for row in rows if row["kind"] == kind] for kind in FIGURES)
    parts = [
        "# Sites on one accelerator, and plain training loops",
        INTRODUCTION,
        _NOTHING_YET if about["device_type"] == "cpu" else verdict(rows),
        _setting(about, sites[0]),
        _training(loops, sites),
        MEANING,
        _soundness(sites),
        _memory(sites, counted=about["device_type"] != "cpu"),
        _encoding(encoding, about),
        NEUTRAL,
    ]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
`benchmarks/gpu.sh` trains one model of 127 M parameters on one accelerator: by N processes that run a plain loop
(forward, backward, clip, step), by N sites of one run with the defaults of run.toml (`isthmus site run`, their
coordinator on the same machine), and by the loops again. It takes about half an hour (`--quick`: five minutes;
`--sites 2 3`, `--seconds`, `--batch-size` where memory is short) and writes this page and [gpu.json](gpu.json). Nothing
is fetched. Asked: sites train at least 97% of what loops do."""
_NOTHING_YET = """\
**No accelerator has been at hand so far, so none of this is measured.** Where there is none, the same command says so
and checks itself on the CPU with a tiny model (`--self-check`): that every figure is there, finite and above zero, that
the run finishes, that anchors are the coordinator's at every site, bit for bit, and that the loss falls. What follows
is what that printed. **Its speeds are no claims**: processes share the cores with each other, sites with their
coordinator too, and all of them with whatever else the machine has to do."""
MEANING = """\
Tokens per second are of all processes together. Loops: the median over six windows; of before and after, the faster one
is what sites are compared with. Sites: all the time from the end of the first cycle until the first fragment is
complete, so with every contribution, alignment and checkpoint (one in that time, where the default is one in five
minutes). Against as many loops: what Isthmus costs. Against one loop alone: that, and what processes cost each other
that share a device. Of several sites on one device each trains while another waits, which hides a part of what Isthmus
costs; one site that has the device to itself (`--sites 1`) hides nothing."""
NEUTRAL = """\
All of it is written for `torch.accelerator` and should run on whatever `[devices] device` finds: CUDA, ROCm, Ascend,
Cambricon, MUSA, Intel, Apple. For devices of torch's type `cuda` alone (NVIDIA, and AMD's through ROCm), with Triton
installed, are the one-pass encoders of int8 and int4; elsewhere those are torch operations, as all other codecs are.
Makes without bf16 are measured in fp32, and where a package does not count what its tensors take, peak memory stays
empty."""


def verdict(rows: Sequence[Row]) -> str:
    """Whether sites reach what is asked of them."""
    least = min(row["efficiency"] for row in rows if row["kind"] == "sites")
    word = "Reached" if least >= ASKED else "**Not reached**"
    return f"{word}: sites train at least {least:.1%} of what as many loops do, and {ASKED:.0%} is asked."


def _setting(about: Row, row: Row) -> str:
    return (
        f"{about['device']} ({about['device_type']}, {about['device_memory_bytes'] / 1e9:.0f} GB), "
        f"{about['precision']}; {about['cpu']}, {about['cores']} cores; torch {about['torch']}, {about['date']}. "
        f"{row['params'] / 1e6:.1f} M parameters, {row['batch_size']} sequences a step, H = {row['steps']}, "
        f"{row['upload']} up, {row['publish']} down."
    )


def _training(loops: Sequence[Row], sites: Sequence[Row]) -> str:
    heads = (
        "",
        "tokens/s",
        "spread of windows",
        "of as many loops",
        "of one loop alone",
        "share of time in inner steps",
    )
    lines = [
        [row["setting"], _count(row["median_tokens_per_second"]), f"{row['spread']:.1%}", "", "", ""] for row in loops
    ]
    for row in sites:
        shares = ", ".join(f"{share:.1%}" for share in row["training_shares"])
        speed, spread = _count(row["tokens_per_second"]), f"{row['spread']:.1%}"
        lines.append(
            [row["setting"], speed, spread, f"{row['efficiency']:.1%}", f"{row['alone_efficiency']:.1%}", shares]
        )
    return _table(heads, lines)


def _soundness(sites: Sequence[Row]) -> str:
    heads = (
        "",
        "finished",
        "anchors identical",
        "held-out loss",
        "tokens",
        "contributions (of a fragment)",
        "MB up, down",
    )
    lines = [
        [
            row["setting"],
            _yes(row["finished"]),
            _yes(row["identical"] and not row["repairs"]),
            f"{row['initial_eval_loss']:.3f} → {row['eval_loss']:.3f}",
            _count(row["tokens"]),
            f"{row['contributions']} (at least {row['least_contributions']})",
            f"{row['bytes_up'] / 1e6:,.1f}, {row['bytes_down'] / 1e6:,.1f}",
        ]
        for row in sites
    ]
    return _table(heads, lines)


def _memory(sites: Sequence[Row], *, counted: bool) -> str:
    """`counted`: it is what tensors took on a device."""
    note = (
        (
            "The most memory that tensors of one process took on the device. What a site takes beyond a loop is error "
            "feedback, snapshots and an alignment; `site_agent.core.memory` foresees how much, and without activations "
            "it is a bound from below."
        )
        if counted
        else "Memory: on a CPU the most that the process has had resident, with all libraries, so not what is foreseen."
    )
    heads = ("", "a loop", "a site", "difference", "foreseen difference", "foreseen for a site, without activations")
    lines = [
        [
            row["setting"],
            _megabytes(row["loop_peak_bytes"]),
            _megabytes(row["peak_bytes"]),
            _megabytes(_difference(row["peak_bytes"], row["loop_peak_bytes"])),
            _megabytes(row["needed_beyond_loop_bytes"]),
            _megabytes(row["needed_bytes"]),
        ]
        for row in sites
    ]
    return f"{note}\n\n{_table(heads, lines)}"


def _encoding(rows: Sequence[Row], about: Row) -> str:
    by_codec: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_codec.setdefault(row["upload"], {})[row["setting"].rsplit(", ", 1)[1]] = row
    ways = list(dict.fromkeys(way for found in by_codec.values() for way in found))
    copy = about["device_copy_bytes_per_second"]
    note = (
        f"Encoding a contribution with error feedback ({rows[0]['params'] / 1e6:.1f} M parameters, medians), in "
        f"milliseconds a gigabyte of fp32. A copy within the device's memory moves {copy / 1e9:,.0f} GB/s, reading and "
        f"writing: {2e12 / copy:.2f} ms a gigabyte. What the two ways are: [encode_device.md](encode_device.md)."
    )
    lines = [
        [codec, *(f"{1e3 * found[way]['seconds_per_gigabyte']:,.2f}" for way in ways)]
        for codec, found in by_codec.items()
    ]
    return f"{note}\n\n{_table(('codec', *ways), lines)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _yes(value: object) -> str:
    return "yes" if value else "**no**"


def _difference(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.0f} MB"
