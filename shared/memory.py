"""How much memory this process may have: the machine's, bounded by the control groups that the process is in.

A container, a unit of systemd and a job of Slurm are such groups; what the machine has is no measure there, and who
takes more is killed without a word. Both versions of control groups are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
"""Names the groups of this process."""
ROOT = Path("/sys/fs/cgroup")
"""Where their files are."""
MACHINE = Path("/proc/meminfo")


def memory_bytes(groups: Path = GROUPS, root: Path = ROOT) -> int:
    """Bytes of memory that this process may have: the machine's, or what its container, or a control group around it,
    may."""
    limits = (_number(group.limit) for group in _groups(groups, root))
    return min([_whole(), *(limit for limit in limits if limit is not None)])


def available_bytes(groups: Path = GROUPS, root: Path = ROOT, machine: Path = MACHINE) -> int:
    """Bytes that this process could take now without anything being swapped or killed: what the machine can give, or
    what a control group around it has left. Cached files that nobody has used lately count as free."""
    free = [_machine_has(machine)]
    for group in _groups(groups, root):
        limit, used = _number(group.limit), _number(group.used)
        if limit is not None and used is not None:
            free.append(limit - used + (_field(group.counts, group.cache) or 0))
    return max(0, min(free))


@dataclass(frozen=True)
class _Group:
    """A control group's files: what it may take, what it has taken, and its counts, of which `cache` is what the kernel
    gives back when it must."""

    limit: Path
    used: Path
    counts: Path
    cache: str


def _groups(groups: Path, root: Path) -> Iterator[_Group]:
    """The process's own group and all around it, in version 2 and version 1 of control groups, whether they are there
    or not. (A container often sees its own group at the root, and the path to it as the machine has it.)"""
    try:
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in ["0::/", *lines]:
        _, _, kinds_and_path = line.partition(":")
        kinds, _, path = kinds_and_path.partition(":")
        names = [name for name in path.split("/") if name]
        if ".." in names:  # outside of what is to be seen here
            names = []
        for depth in range(len(names) + 1):
            if not kinds:
                at = root.joinpath(*names[:depth])
                yield _Group(at / "memory.max", at / "memory.current", at / "memory.stat", "inactive_file")
            elif "memory" in kinds.split(","):
                at = root.joinpath("memory", *names[:depth])
                used = at / "memory.usage_in_bytes"
                yield _Group(at / "memory.limit_in_bytes", used, at / "memory.stat", "total_inactive_file")


def _whole() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _machine_has(machine: Path) -> int:
    """What Linux says that it can give; all of the memory where nothing says so."""
    kibibytes = _field(machine, "MemAvailable:")
    return _whole() if kibibytes is None else kibibytes * 1024


def _number(file: Path) -> int | None:
    """The number above 0 that the file holds; None where there is none: version 2 says "max" of no limit."""
    try:
        number = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return number if number > 0 else None


def _field(file: Path, name: str) -> int | None:
    """The whole number after `name` in a file of names and numbers; None where there is none."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except (OSError, ValueError):
        return None
    values = (line.split()[1:2] for line in lines if line.split()[:1] == [name])
    found = next(values, None)
    return int(found[0]) if found and found[0].isdecimal() else None
