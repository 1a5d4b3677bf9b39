"""Where the processor time of processes goes, by Linux `perf`: samples of their stacks, sorted into kinds of work.

perf needs root or a lenient kernel.perf_event_paranoid, and symbols of the kernel; where it cannot be had, nothing is
known and nothing is claimed.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

HERTZ = 1999
"""No divisor of anything that repeats on its own."""
KINDS = ("kernels", "digests", "tcp", "files", "names", "zstd", "python", "other")
"""What `kind_of` sorts into: numba's kernels, XXH3 of weights, the kernel's network stack, reading, writing and syncing
of files, BLAKE3 of what comes and goes, zstd, the interpreter, everything else."""
_KERNEL = (
    (
        "tcp",
        re.compile(r"\b(tcp_|inet6?_|sock_|__sys_recv|__sys_send|do_sendfile|net_rx|__napi|do_softirq|__do_softirq)"),
    ),
    ("files", re.compile(r"\b(vfs_|ext4_|xfs_|btrfs_|overlay|ovl_|filemap_|generic_perform|do_fsync|file_write)")),
)
_USER = (
    ("kernels", re.compile(r"\[JIT\]|perf-\d+\.map|//anon")),
    ("digests", re.compile(r"xxhash")),
    ("names", re.compile(r"blake3")),
    ("zstd", re.compile(r"zstd")),
    ("python", re.compile(r"libpython|python3|\.cpython-")),
)


def kind_of(stack: Sequence[str]) -> str:
    """One of KINDS, for a sample's frames from the innermost out, as `perf script` prints them.

    A sample in the kernel is what its system call was for, whatever the innermost function happened to be.
    """
    inside = [frame for frame in stack if "[kernel" in frame]
    if inside:
        text = "\n".join(inside)
        return next((kind for kind, pattern in _KERNEL if pattern.search(text)), "other")
    return next((kind for kind, pattern in _USER if stack and pattern.search(stack[0])), "other")


def shares(samples: Iterable[tuple[float, Sequence[str]]], windows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The share of each of KINDS in the samples (time, stack) that lie within `windows`; empty where there are none."""
    counts = Counter(kind_of(stack) for at, stack in samples if any(begin <= at <= end for begin, end in windows))
    total = sum(counts.values())
    return {kind: counts[kind] / total for kind in KINDS} if total else {}


class Profile:
    """Samples `processes` while it is open; `shares` afterwards, of the times (CLOCK_MONOTONIC) that are asked for."""

    def __init__(self, processes: Sequence[int], directory: Path) -> None:
        self._file, self._perf = directory / "perf.data", None
        if shutil.which("perf") is None:
            return
        clock = ["-k", "CLOCK_MONOTONIC", "-e", "cpu-clock", "-F", str(HERTZ), "-g"]
        of = ["-o", str(self._file), "-p", ",".join(map(str, processes))]
        self._perf = subprocess.Popen(
            ["perf", "record", *clock, *of], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._perf is not None:
            self._perf.send_signal(signal.SIGINT)
            self._perf.communicate()

    def shares(self, windows: Sequence[tuple[float, float]]) -> dict[str, float]:
        """See `shares`; empty where there is no perf, or it may not look."""
        if self._perf is None or not self._file.exists():
            return {}
        fields = ["-F", "comm,tid,time,ip,sym,dso"]
        read = subprocess.run(["perf", "script", "-i", str(self._file), *fields], capture_output=True, text=True)
        return shares(_samples(read.stdout), windows)


def _samples(text: str) -> Iterable[tuple[float, list[str]]]:
    """Time in seconds and frames of each sample in the output of `perf script`."""
    for block in text.split("\n\n"):
        head, *frames = block.strip().splitlines() or [""]
        if frames and (found := re.search(r"\s(\d+\.\d+):", head)):
            yield float(found[1]), [frame.strip() for frame in frames]
