"""Weights put together from the state directories of several coordinators, or refused by what is amiss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from coordinator.export import export, stored_run
from coordinator.outer.step import OuterState
from coordinator.store.state_dir import Initial, StateDir
from shared.config import RunConfig, parse
from shared.errors import ConfigError
from shared.fragments import F32, Fragment, Layout
from shared.sharding import WHOLE, Slice

NAMES = ["a", "b", "c", "d", "e"]
LAYOUT = Layout.from_wire([[(name, [2])] for name in NAMES])


def numbered(fragment: Fragment) -> F32:
    """Weights that say which tensor they are, whatever the fragment's number is."""
    return np.full(2, NAMES.index(fragment.tensors[0].name), np.float32)


def initial() -> Initial:
    return Initial(LAYOUT, numbered, [], None)


def state(path: Path, own: Slice, **run: Any) -> Path:
    """The state directory of a coordinator that owns `own` of a run of five fragments."""
    tables = {
        "run": {"name": "tiny", "tokens": 100, **run},
        "task": {"use": "none"},
        "rounds": {"fragments": 5},
    }
    store = StateDir.hold(path)
    store.adopt_run(parse(RunConfig, tables, "run.toml"), path, initial, own)
    store.close()
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [state(tmp_path / f"shard-{index}", Slice(index, 3)) for index in range(3)]


def states_of(paths: Sequence[Path]) -> list[OuterState]:
    with stored_run(paths) as stored:
        return list(stored.states)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_sharded_model_is_put_together_whichever_directory_is_named_first(
    tmp_path: Path, shards: list[Path], order: tuple[int, ...]
) -> None:
    said = export([shards[index] for index in order], tmp_path / "w.safetensors", "safetensors", published=False)
    assert "versions [0, 0, 0, 0, 0]" in said
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: [float(n)] * 2 for n, name in enumerate(NAMES)
        }
        names = [part.rpartition(".")[0] for part in file.metadata()["run"].split("+")]
    assert names == ["tiny.0", "tiny.1", "tiny.2"]


def test_fragments_are_those_of_the_run_in_their_order(tmp_path: Path, shards: list[Path]) -> None:
    parts, whole = states_of(shards[::-1]), states_of([state(tmp_path / "whole", WHOLE)])
    assert [each.fragment.tensors for each in parts] == [each.fragment.tensors for each in whole]
    assert [each.master.tolist() for each in parts] == [each.master.tolist() for each in whole]


def test_a_shard_that_is_missing_is_named(shards: list[Path]) -> None:
    with pytest.raises(ConfigError, match="name with --with the state directory of coordinator 0 and that of 2 too"):
        states_of(shards[1:2])
    with pytest.raises(ConfigError, match="the state directory of coordinator 1 too"):
        states_of([shards[2], shards[0]])


def test_a_shard_that_is_given_twice_is_named(tmp_path: Path, shards: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"shard-1 and .*shard-1 are both of coordinator 1"):
        states_of([*shards, shards[1]])
    whole = state(tmp_path / "whole", WHOLE)
    with pytest.raises(ConfigError, match="both of coordinator 0"):
        states_of([whole, whole])


@pytest.mark.parametrize(
    ("own", "run", "says"),
    [
        (Slice(2, 3), {"name": "other"}, r"\[run\] name is 'tiny' in the one and 'other' in the other"),
        (Slice(2, 3), {"seed": 7}, r"\[run\] seed is 0 in the one and 7 in the other"),
        (Slice(1, 2), {}, r"the number of \[run\] coordinators is 3 in the one and 2 in the other"),
        (WHOLE, {}, r"the number of \[run\] coordinators is 3 in the one and None in the other"),
    ],
)
def test_a_shard_of_another_run_is_refused_by_the_key_that_differs(
    tmp_path: Path, shards: list[Path], own: Slice, run: dict[str, Any], says: str
) -> None:
    other = state(tmp_path / "other", own, **run)
    with pytest.raises(ConfigError, match=rf"shard-0 and .*other are of different runs: {says}"):
        states_of([*shards[:2], other])
