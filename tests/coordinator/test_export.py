"""Exported weights are those of the run, and take memory for one fragment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from coordinator.export import export
from coordinator.outer.optimizers import OuterRule
from coordinator.store.state_dir import Initial, StateDir
from shared.config import RunConfig, parse
from shared.fragments import F32, Fragment, Layout
from tests.support.peak import peak_of

SIDE, FRAGMENTS = 512, 6
VECTOR = 4 * (2 * SIDE * SIDE + 3)
LAYOUT = Layout.from_wire(
    [[(f"{p}.a", [SIDE, SIDE]), (f"{p}.b", [3]), (f"{p}.c", [SIDE * SIDE])] for p in range(FRAGMENTS)]
)


def weights(fragment: Fragment) -> F32:
    return np.random.default_rng(fragment.index).standard_normal(fragment.size, dtype=np.float32)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    tables = {"run": {"name": "large", "tokens": 10}, "task": {"use": "none"}, "rounds": {"fragments": FRAGMENTS}}
    store = StateDir.hold(tmp_path / "state")
    store.adopt_run(parse(RunConfig, tables, "run.toml"), tmp_path, lambda: Initial(LAYOUT, weights, [], None))
    store.close()
    return tmp_path / "state"


@pytest.mark.parametrize("published", [False, True])
def test_other_programs_read_what_was_exported(state: Path, tmp_path: Path, published: bool) -> None:
    store = StateDir(state)
    # A round of nothing, so that one version is another and the weights are the same.
    store.journal.close_round(1, 1, "complete", [], OuterRule("sgd", 1.0, 0.0, "fp32", 0), at=0.0)
    store.close()
    said = export([state], tmp_path / "out.safetensors", "safetensors", published=published)
    wanted: dict[str, F32] = {}
    for fragment in LAYOUT.fragments:
        wanted |= fragment.unflatten(weights(fragment))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in wanted.items())
    assert all(found[name].shape == array.shape for name, array in wanted.items())
    with safe_open(tmp_path / "out.safetensors", framework="np") as file:
        metadata = file.metadata()
    kind = "published" if published else "master"
    assert (metadata["weights"], metadata["versions"], metadata["format"]) == (kind, "0,1,0,0,0,0", "pt")
    assert f"{kind} weights of run {metadata['run']}, versions [0, 1, 0, 0, 0, 0], 0 tokens" in said


def test_an_export_holds_one_fragment_at_a_time(state: Path, tmp_path: Path) -> None:
    with peak_of() as peak:
        export([state], tmp_path / "out.safetensors", "safetensors", published=False)
    assert 2 * VECTOR < peak.bytes < 3 * VECTOR, "Θ and Θ̂ of a fragment, and chunks"
