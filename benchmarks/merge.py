"""How fast the coordinator merges, beside what the machine's memory allows, and how much memory it takes.

One outer step of one fragment as in production: K contributions on disk, decoded and merged by weight, Nesterov,
delta encoded, published weights moved along, digests taken. Each row runs in a process of its own, so that its peak
memory is its own.

`bytes_moved` is what must cross the memory bus at least: every contribution read once, Θ, momentum and Θ̂ read and
written once, the delta written once. `bound_fraction` is bytes_moved / copy bandwidth / seconds. (RDA has to read the
contributions twice more and keep their sum; its fraction is of the same bytes.)
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import arguments, copy_bytes_per_second, report
from coordinator.outer.merge import Weighted
from coordinator.outer.optimizers import OuterRule
from coordinator.outer.rules import Merge
from coordinator.outer.step import OuterState, Room, outer_step, warm_up
from shared.fragments import CHUNK_ELEMENTS, Fragment, TensorSpec
from shared.wire import Header, encode_flat, open_container, tensor_table

DISTINCT = 4
"""Different contributions on disk; a larger K reads them in turn."""
STATE_BYTES = 24
"""Bytes per parameter of Θ, momentum and Θ̂, each read once and written once in fp32."""


def measure(
    parameters: int, contributions: int, upload: str, publish: str, merge: Merge, repeats: int, paths: list[str]
) -> dict[str, Any]:
    """One row: the median over `repeats` outer steps; contributions are read from `paths`, in turn."""
    warm_up()
    fragment = _fragment(parameters)
    master = np.random.default_rng(0).standard_normal(fragment.size, dtype=np.float32)
    state = OuterState(fragment, master, master.copy())
    rule, room = OuterRule("nesterov", 0.7, 0.9, publish, 0, merge=merge), Room()
    files = [Path(paths[n % len(paths)]) for n in range(contributions)]
    times, sent = [], 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in range(repeats):
            with ExitStack() as stack:
                weighted = [
                    Weighted(stack.enter_context(open_container(file, fragment)), 1 / contributions, 1.0)
                    for file in files
                ]
                began = time.perf_counter()
                stepped = outer_step(state, weighted, rule, "benchmark", 0, pool, room=room)
                times.append(time.perf_counter() - began)
            sent = stepped.delta_size
    read = sum(file.stat().st_size for file in files)
    seconds = statistics.median(times)
    return {
        "params": fragment.size,
        "contributions": contributions,
        "upload": upload,
        "publish": publish,
        "merge": merge,
        "seconds": seconds,
        "params_per_second": fragment.size / seconds,
        "bytes_moved": read + STATE_BYTES * fragment.size + sent,
        "bytes_up_per_param": read / contributions / fragment.size,
        "bytes_down_per_param": sent / fragment.size,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _fragment(parameters: int) -> Fragment:
    side = 1024
    return Fragment(0, tuple(TensorSpec(f"layer.{n:04d}", (side, side)) for n in range(max(1, parameters // side**2))))


def _contribution(directory: Path, fragment: Fragment, n: int, codec: str) -> Path:
    header = Header(
        kind="contribution",
        run="benchmark",
        site=f"site-{n}",
        fragment=0,
        base_version=0,
        version=0,
        digest="0" * 32,
        codec=codec,
        zstd=False,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(fragment),
        tokens=1,
        steps=1,
        sizes=[],
    )
    delta = 1e-3 * np.random.default_rng(n + 1).standard_normal(fragment.size, dtype=np.float32)
    path = directory / f"{codec}-{n}.isthmus"
    path.write_bytes(encode_flat(header, fragment, delta, 0))
    return path


def _apart(*case: Any) -> dict[str, Any]:
    """`measure(*case)` in a process of its own."""
    code = "import json, sys; from benchmarks.merge import measure; print(json.dumps(measure(*json.load(sys.stdin))))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, input=json.dumps(case), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    row: dict[str, Any] = json.loads(run.stdout)
    return row


def main() -> None:
    """Prints the table, and with --json writes it."""
    options = arguments(__doc__ or "").parse_args()
    parameters, repeats = 50_000_000, 5 if options.quick else 11
    copy = copy_bytes_per_second()
    cases: list[tuple[int, str, str, Merge]] = [
        (4, "int4", "int8", "mean"),
        (2, "int4", "int8", "mean"),
        (64, "int4", "int8", "mean"),
        (4, "fp32", "fp32", "mean"),
        (4, "int4", "int8", "rda"),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        fragment = _fragment(parameters)
        paths = {
            codec: [str(_contribution(Path(directory), fragment, n, codec)) for n in range(DISTINCT)]
            for codec in ("int4", "fp32")
        }
        for contributions, upload, publish, merge in cases:
            row = _apart(parameters, contributions, upload, publish, merge, repeats, paths[upload])
            row["bound_fraction"] = row["bytes_moved"] / copy / row["seconds"]
            rows.append(row)
    report(f"outer step of one fragment, medians of {repeats}", copy, rows, options.json)
    small, large = rows[1]["peak_rss_bytes"], rows[2]["peak_rss_bytes"]
    print(f"peak memory with K=64: {large / 1e6:,.0f} MB, {large / small - 1:+.1%} against K=2")


if __name__ == "__main__":
    main()
