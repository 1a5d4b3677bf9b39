"""How much memory there is, and is left: the machine's, or less by the control groups that the process is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.memory import available_bytes, memory_bytes

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""
V1, V2 = "memory.limit_in_bytes", "memory.max"


def found(tmp_path: Path, groups: str | None, **limits: object) -> int:
    """`limits`: what the files under the root hold."""
    for name, says in limits.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{says}\n")
    if groups is not None:
        (tmp_path / "self").write_text(groups)
    return memory_bytes(tmp_path / "self", tmp_path / "cgroup")


def test_a_machine_without_control_groups_has_all_of_its_memory(tmp_path: Path) -> None:
    assert found(tmp_path, None) == WHOLE
    assert memory_bytes() > 0, "of this one"


@pytest.mark.parametrize(("says", "limit"), [("max", WHOLE), (1 << 20, 1 << 20), (2 * WHOLE, WHOLE)])
@pytest.mark.parametrize("groups", ["0::/\n", None])
def test_a_container_that_sees_its_group_at_the_root(
    tmp_path: Path, groups: str | None, says: object, limit: int
) -> None:
    assert found(tmp_path, groups, **{V2: says}) == limit


@pytest.mark.parametrize(("own", "slice_", "limit"), [(3, 5, 3), (5, 3, 3), ("max", 3, 3), (3, "max", 3)])
def test_the_least_of_the_groups_around_a_service_counts(
    tmp_path: Path, own: object, slice_: object, limit: int
) -> None:
    groups = "0::/system.slice/isthmus.service\n"
    limits = {f"system.slice/isthmus.service/{V2}": own, f"system.slice/{V2}": slice_, f"user.slice/{V2}": 1}
    assert found(tmp_path, groups, **limits) == limit


@pytest.mark.parametrize(
    ("own", "above", "root", "limit"),
    [
        (3, UNLIMITED, UNLIMITED, 3),
        (UNLIMITED, 3, UNLIMITED, 3),
        (UNLIMITED, UNLIMITED, UNLIMITED, WHOLE),
        (5, 4, 3, 3),
    ],
)
def test_version_1_has_the_memory_in_a_tree_of_its_own(
    tmp_path: Path, own: int, above: int, root: int, limit: int
) -> None:
    groups = "9:name=systemd:/\n8:pids:/x\n4:hugetlb,memory:/docker/abc\n0::/\n"
    limits = {f"memory/docker/abc/{V1}": own, f"memory/docker/{V1}": above, f"memory/{V1}": root, f"memory/x/{V1}": 1}
    assert found(tmp_path, groups, **limits) == limit


def test_a_container_whose_path_is_the_machines_finds_its_limit_at_the_root(tmp_path: Path) -> None:
    assert found(tmp_path, "4:memory:/docker/abc\n", **{f"memory/{V1}": 7}) == 7


@pytest.mark.parametrize(
    "groups",
    ["", "\n", "nonsense", "0::", "0::/../../x", "4:memory:/a:b/../..", "0::/\0x", "0::/" + "x/" * 3000, "\udcff"],
)
def test_nothing_that_is_not_understood_keeps_a_program_from_starting(tmp_path: Path, groups: str) -> None:
    (tmp_path / "self").write_bytes(groups.encode(errors="surrogateescape"))
    assert found(tmp_path, None, **{V2: "many", f"memory/{V1}": -1}) == WHOLE
    for directory in ("x", "a/b"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "x" / V2).write_text("1")
    assert memory_bytes(tmp_path / "self", tmp_path / "a" / "b") == WHOLE, "it does not look outside"


def left(tmp_path: Path, groups: str, machine: str, **files: object) -> int:
    (tmp_path / "meminfo").write_text(machine)
    found(tmp_path, groups, **files)
    return available_bytes(tmp_path / "self", tmp_path / "cgroup", tmp_path / "meminfo")


def test_what_is_available_is_the_machines_where_no_group_is_tighter(tmp_path: Path) -> None:
    machine = "MemTotal:       64 kB\nMemFree:        1 kB\nMemAvailable:   16 kB\n"
    assert left(tmp_path, "0::/a\n", machine) == 16 * 1024
    assert left(tmp_path, "0::/a\n", machine, **{"a/memory.max": 1 << 20, "a/memory.current": 1 << 10}) == 16 * 1024
    assert left(tmp_path, "0::/a\n", machine, **{"a/memory.max": "max"}) == 16 * 1024
    assert 0 < available_bytes() <= WHOLE, "of this one"


def test_the_tightest_group_says_what_is_left_and_its_idle_cache_counts_as_free(tmp_path: Path) -> None:
    machine = "MemAvailable:   16 kB\n"
    own = {"a/b/memory.max": 900, "a/b/memory.current": 500}
    around = {"a/memory.max": 1000, "a/memory.current": 950, "a/memory.stat": "anon 700\ninactive_file 200\n"}
    assert left(tmp_path, "0::/a/b\n", machine, **own) == 400
    assert left(tmp_path, "0::/a/b\n", machine, **own, **around) == 250
    assert left(tmp_path, "0::/a/b\n", machine, **{"a/b/memory.current": 1000}) == 0, "never less than nothing"


def test_what_is_available_in_version_1(tmp_path: Path) -> None:
    files = {f"memory/x/{V1}": 1000, "memory/x/memory.usage_in_bytes": 600}
    files["memory/x/memory.stat"] = "inactive_file 1\ntotal_inactive_file 50\n"
    assert left(tmp_path, "4:memory:/x\n", "MemAvailable: 16 kB\n", **files) == 450


@pytest.mark.parametrize("machine", ["", "MemAvailable:\n", "MemAvailable: many kB\n", "MemAvailable: -1 kB\n"])
def test_a_machine_that_does_not_say_what_is_available_is_taken_whole(tmp_path: Path, machine: str) -> None:
    assert left(tmp_path, "0::/\n", machine) == WHOLE
