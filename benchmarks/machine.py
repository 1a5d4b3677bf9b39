"""What every benchmark says of the machine it ran on, and how it prints and stores its rows."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

COPY_BYTES = 256 << 20
REPEATS = 7
SLEEPER = """
import select, sys, time
lag, ended = 0.0, False
while not ended:
    due = time.monotonic() + 0.05
    ended = bool(select.select([sys.stdin], [], [], 0.05)[0])
    if not ended:
        lag = max(lag, time.monotonic() - due)
print(lag)
"""
MOST_COLUMNS = 6


def arguments(description: str) -> argparse.ArgumentParser:
    """The two options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="end within five minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    return parser


def touch_memory(size: int) -> None:
    """Takes up to `size` bytes of the free memory once, and gives them back. In a virtual machine a page that its host
    has not given yet, or has taken back, costs a fault there: files are then written at a third of the speed, which is
    no figure of ours. What was touched last is taken next, and stays for some seconds."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:")), 0)
    np.empty(max(1, min(size, free // 2)), dtype=np.uint8)[:: os.sysconf("SC_PAGE_SIZE")] = 1


class IdleLag:
    """How late a process that only sleeps is woken while this is open: `seconds` is its longest lag, the machine's own
    share in what an event loop under the same load is behind by."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> IdleLag:
        self._sleeper = subprocess.Popen(
            [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = float(self._sleeper.communicate("")[0])


class Others:
    """How many cores all others have kept busy while this was open, in the mean: `cores`. None where the system does
    not say. Children that are awaited within it are not others."""

    def __init__(self) -> None:
        self.cores: float | None = None

    def __enter__(self) -> Others:
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        busy, seconds = _busy_seconds(), time.monotonic() - self._began
        if busy is not None and self._busy is not None:
            self.cores = max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / seconds)


def _busy_seconds() -> float | None:
    """Of all cores since the machine's start."""
    try:
        return busy_ticks(Path("/proc/stat").read_text(encoding="ascii")) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None


def busy_ticks(stat: str) -> int:
    """Of all cores, from the text of /proc/stat; those that a host has taken for others are busy too."""
    user, nice, system, _, _, interrupts, soft, stolen = map(int, stat.split("\n", 1)[0].split()[1:9])
    return user + nice + system + interrupts + soft + stolen


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def copy_bytes_per_second() -> float:
    """Memory bandwidth of a plain copy on all cores, bytes read plus bytes written; median of several runs."""
    cores = os.cpu_count() or 1
    source, target = np.ones(COPY_BYTES, dtype=np.uint8), np.zeros(COPY_BYTES, dtype=np.uint8)
    cuts = np.linspace(0, COPY_BYTES, cores + 1).astype(int)
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(REPEATS):
            began = time.perf_counter()
            list(pool.map(lambda a, b: np.copyto(target[a:b], source[a:b]), cuts[:-1], cuts[1:]))
            times.append(time.perf_counter() - began)
    return 2 * COPY_BYTES / statistics.median(times)


def machine(copy: float) -> dict[str, Any]:
    """The `machine` object of the JSON."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "copy_bytes_per_second": copy,
        "torch": str(torch.__version__),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def report(title: str, copy: float, rows: Sequence[Mapping[str, Any]], file: Path | None) -> None:
    """Prints the rows as a table and, with `file`, writes machine and rows as JSON."""
    console = Console()
    if len(rows) > MOST_COLUMNS:
        # A row a line, as wide as it takes: for a terminal that wraps, or a file.
        console = Console(width=240)
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(_shown(row[field]) for field in rows[0]))
    else:
        table = Table(title=title, show_header=False)
        for field in rows[0]:
            table.add_row(field, *(_shown(row[field]) for row in rows))
    console.print(f"{_cpu()}, {os.cpu_count()} cores, copy {copy / 1e9:.1f} GB/s")
    console.print(table)
    if file is not None:
        store(copy, rows, file)


def store(copy: float, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Writes machine and rows as JSON."""
    document = {"machine": machine(copy), "rows": list(rows)}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
