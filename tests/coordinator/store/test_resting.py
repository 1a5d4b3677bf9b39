"""Fragments at rest in mapped files: the same bits as in memory, memory that is given back, and a full disk that is
told before anything depends on it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.outer.optimizers import SLOTS, OuterRule
from coordinator.outer.step import OuterState, Weighted, outer_step
from coordinator.outer.vectors import Vectors
from coordinator.store.checkpoint import Checkpoints
from coordinator.store.resting import MappedVectors, is_mapped, map_states, state_bytes
from shared.fragments import CHUNK_ELEMENTS, F32, Fragment, TensorSpec
from shared.wire import Header, encode_flat, open_container, tensor_table

FRAGMENT = Fragment(3, (TensorSpec("a", (CHUNK_ELEMENTS + 1,)), TensorSpec("b", (70, 3))))
RULES = [
    OuterRule("nesterov", 0.7, 0.9, "int8", 1),
    OuterRule("nesterov", 0.7, 0.9, "int4", 0, merge="rda", correction="heloco"),
    OuterRule("delayed-nesterov", 0.7, 0.9, "int8", 0, period=2),
    OuterRule("adam", 0.1, 0.9, "fp32", 0),
    OuterRule("sgd", 0.7, 0.0, "bf16", 0),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def values(seed: int) -> F32:
    return np.random.default_rng(seed).standard_normal(FRAGMENT.size, dtype=np.float32)


def sent(seed: int, weight: float) -> Weighted:
    header = Header(
        kind="contribution",
        run="run",
        site="a",
        fragment=FRAGMENT.index,
        base_version=0,
        version=0,
        digest="0" * 32,
        codec="int4",
        zstd=False,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(FRAGMENT),
        tokens=1,
        steps=1,
        sizes=[],
    )
    return Weighted(open_container(encode_flat(header, FRAGMENT, values(seed), 0), FRAGMENT), weight, 1.0)


def begun(checkpoints: Checkpoints, vectors: Vectors) -> OuterState:
    """Version 0, as a coordinator loads it."""
    checkpoints.save(OuterState.initial(FRAGMENT, values(99)))
    return checkpoints.load(checkpoints.entries(FRAGMENT.index)[0], FRAGMENT, vectors)


@pytest.mark.parametrize("first", RULES, ids=lambda rule: f"{rule.optimizer}-{rule.merge}")
@pytest.mark.parametrize("second", [RULES[0], RULES[3]], ids=lambda rule: rule.optimizer)
def test_steps_and_checkpoints_are_the_same_bits_mapped_or_in_memory(
    tmp_path: Path, pool: ThreadPoolExecutor, first: OuterRule, second: OuterRule
) -> None:
    """Also where the optimizer changes on the way, and the momentum begins anew in a file that has been in use."""
    ends = []
    for name, vectors in (
        ("memory", Vectors()),
        ("mapped", map_states(tmp_path / "states", [FRAGMENT], SLOTS[first.optimizer])[FRAGMENT.index]),
    ):
        checkpoints = Checkpoints(tmp_path / name, "run", keep=1)
        state, deltas = begun(checkpoints, vectors), []
        for version, rule in enumerate([first, first, second, replace(first, lr=0.5)]):
            contributions = [sent(2 * version, 0.4), sent(2 * version + 1, 0.6)]
            deltas.append(outer_step(state, contributions, rule, "run", 1, pool).delta)
            vectors.rest()
        checkpoints.save(state)
        vectors.rest()
        file = checkpoints.directory / checkpoints.entries(FRAGMENT.index)[0].file
        ends.append((deltas, state.digests(), file.read_bytes()))
    assert ends[0] == ends[1]


def test_a_checkpoint_that_is_broken_leaves_nothing_in_the_one_before_it(tmp_path: Path) -> None:
    """Recovery reads the older one into the same files."""
    checkpoints, vectors = Checkpoints(tmp_path / "checkpoints", "run", keep=1), MappedVectors(tmp_path, FRAGMENT)
    state = begun(checkpoints, vectors)
    for name in ("master", "published"):
        vectors.empty(name, FRAGMENT.size).fill(7)
    again = checkpoints.load(checkpoints.entries(FRAGMENT.index)[0], FRAGMENT, vectors)
    assert again.master.tobytes() == again.published.tobytes() == values(99).tobytes()
    assert state.master[0] == again.master[0], "one file, whoever looks at it"


def test_a_vector_of_zeros_is_zero_whatever_its_file_was_used_for(tmp_path: Path) -> None:
    vectors = MappedVectors(tmp_path, FRAGMENT)
    vectors.zeros("momentum", FRAGMENT.size).fill(3)
    vectors.rest()
    assert not vectors.zeros("momentum", FRAGMENT.size).any()
    (tmp_path / "p0003.variance").write_bytes(b"\x55" * 4 * FRAGMENT.size)
    assert not vectors.zeros("variance", FRAGMENT.size).any()


# ---- memory


def resident(path: Path) -> int:
    """Bytes of this process's memory that are of a mapped file."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head:
            mine = rest[-1] == str(path)
        elif mine and head == "Rss:":
            found += int(rest[0]) << 10
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is resident")
def test_a_fragment_at_rest_takes_no_memory_and_holds_what_it_held(tmp_path: Path) -> None:
    vectors = MappedVectors(tmp_path, FRAGMENT)
    array, path = vectors.empty("master", FRAGMENT.size), tmp_path / "p0003.master"
    array[:] = values(1)
    assert resident(path) >= 4 * FRAGMENT.size
    vectors.rest()
    assert resident(path) == 0
    assert array.tobytes() == values(1).tobytes()


@pytest.mark.parametrize(
    ("resting", "needed", "memory", "mapped"),
    [
        ("auto", 50, 100, False),
        ("auto", 51, 100, True),
        ("memory", 1000, 100, False),
        ("mapped", 1, 100, True),
    ],
)
def test_auto_maps_what_takes_more_than_half_of_the_memory(
    resting: str, needed: int, memory: int, mapped: bool
) -> None:
    assert is_mapped(resting, needed, memory) is mapped  # type: ignore[arg-type]


def test_a_state_of_ten_billion_parameters_is_120_gigabytes_with_nesterov() -> None:
    fragment = Fragment(0, (TensorSpec("a", (10**10,)),))
    assert state_bytes(fragment, SLOTS["nesterov"]) == 120 * 10**9


# ---- disk


def test_the_room_of_a_vector_is_taken_when_it_is_made(tmp_path: Path) -> None:
    map_states(tmp_path / "states", [FRAGMENT], ["momentum"])
    files = {path.name: path.stat().st_blocks * 512 for path in (tmp_path / "states").iterdir()}
    assert files.keys() == {"p0003.master", "p0003.published", "p0003.momentum"}
    assert all(size >= 4 * FRAGMENT.size for size in files.values())


def test_a_disk_without_room_is_told_with_what_it_takes_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = os.posix_fallocate, []

    def full(descriptor: int, offset: int, size: int) -> None:
        taken.append(size)
        if len(taken) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    other = replace(FRAGMENT, index=4)
    with pytest.raises(OSError, match=r"states has no room .*\(No space left on device\).* need 0.0063 GB of disk and"):
        map_states(tmp_path / "states", [FRAGMENT, other], ["momentum"])
    assert list(tmp_path.iterdir()) == []
    assert sum(taken) == 5 * 4 * FRAGMENT.size


def test_what_no_disk_can_hold_is_refused(tmp_path: Path) -> None:
    """With the system's own refusal."""
    endless = Fragment(0, (TensorSpec("a", (1 << 52,)),))
    with pytest.raises(OSError, match="has no room"):
        map_states(tmp_path / "states", [endless], [])
