"""How much memory the coordinator takes: the fragment in work and a constant, however large the run and however many
sites.

Each row in a process of its own. A run at a fiftieth of 10 billion parameters in 24 fragments: its start, and rounds of
4 int4 contributions to all of its fragments, with the fragments at rest in memory and in mapped files, through the real
coordinator (intake, screening, merges, checkpoints, snapshots; HTTP left out), and once more with 16. Then the states
of a run of 10 billion parameters over files that are sparse, so that they fit this disk, and one of its fragments in
work.

`computed_bytes` is what should be resident: what a process has that has no run yet (`baseline_rss_bytes`), the states
that are not at rest in files, and the delta of the fragment in work. `peak_rss_bytes` counts mapped pages, which the
kernel may take away as it needs them; `peak_anonymous_bytes` is what it may not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.apart import apart
from benchmarks.machine import arguments, copy_bytes_per_second, machine

SITES, MORE = 4, 16
FRAGMENTS = 24
SMALL = (8, 1024)
"""Matrices in a fragment and their side: 24 of them are 201 M parameters."""
LARGE = (25, 4096)
"""The same: 24 are 10.07 B, one is 419 M."""
PARAMETERS, MACHINE_BYTES = 10**10, 64 * 10**9


def main() -> None:
    """Prints the table, and with --json writes it."""
    options = arguments(__doc__ or "").parse_args()
    count = 2 if options.quick else 6
    copy = copy_bytes_per_second()
    # Not on a file system in memory, where /tmp often is: what is measured would be measured there.
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".memory-") as directory:
        layers, side = SMALL
        run = (f"{directory}/run", layers * FRAGMENTS, side, FRAGMENTS)
        sections = apart("resident", "made", directory, layers, side, SITES, False)
        rows = [apart("resident", "started", *run, SITES)]
        rows += [apart("resident", "rounds", *run, sections, resting, count) for resting in ("memory", "mapped")]
        rows.append(apart("resident", "rounds", *run, sections * (MORE // SITES), "mapped", 1))
        layers, side = LARGE
        whole = apart("resident", "made", directory, layers, side, SITES, True)
        large = Path(directory) / "large"
        large.mkdir()
        rows.append(apart("resident", "stepped", str(large), layers, side, FRAGMENTS, whole))
    print(shown(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(copy), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(computed(rows[0]["baseline_rss_bytes"], rows[-1]["baseline_rss_bytes"]))


def shown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, bytes in MB."""
    columns = {
        "resting": "setting",
        "M params": "params",
        "K": "contributions",
        "computed": "computed_bytes",
        "peak RSS": "peak_rss_bytes",
        "anonymous": "peak_anonymous_bytes",
        "at rest": "rss_at_rest_bytes",
        "a process": "baseline_rss_bytes",
        "seconds": "seconds",
    }
    lines = ["MB; of each row the peak of its process", "".join(f"{name:>10}" for name in columns)]
    for row in rows:
        cells = [row[field] if field == "setting" else _number(field, row[field]) for field in columns.values()]
        lines.append("".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _number(field: str, value: float) -> str:
    return f"{value / 1e6 if field.endswith('bytes') or field == 'params' else value:,.0f}"


def computed(at_start: int, baseline: int) -> str:
    """What a run of 10 B parameters takes, by the same arithmetic, in GB."""
    fragment, gb = PARAMETERS / FRAGMENTS, 1e9
    rows = {
        "all states in memory (Θ, Θ̂, momentum)": 12 * PARAMETERS,
        "mapped: a fragment's state": 12 * fragment,
        "  its delta (int8)": (1 + 1 / 32) * fragment,
        "  what a process has": baseline,
        "  together": (13 + 1 / 32) * fragment + baseline,
        "  with RDA, one more vector": (17 + 1 / 32) * fragment + baseline,
        "start of a new run: the model in fp32 and a fragment": 4 * (PARAMETERS + fragment) + at_start,
        "disk: states at rest": 12 * PARAMETERS,
        "disk: two checkpoints of each fragment and one more": 24 * PARAMETERS + 12 * fragment,
    }
    lines = [f"{PARAMETERS / 1e9:g} B parameters, P = {FRAGMENTS}, on {MACHINE_BYTES / 1e9:g} GB: GB"]
    return "\n".join(lines + [f"  {name:<55} {value / gb:8.2f}" for name, value in rows.items()])


if __name__ == "__main__":
    main()
