"""The state directory: whose it is, that one process holds it, and that no start damages it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.store.checkpoint import Checkpoints
from coordinator.store.state_dir import Initial, StateDir
from shared.config import RunConfig, parse
from shared.errors import ConfigError, CorruptError, IsthmusError
from shared.fragments import Layout
from shared.sharding import WHOLE, Slice
from tests.support.peak import peak_of

FACTS = {"tokenizer": "91bc"}
LAYOUT = Layout.from_wire([[("a", [3])], [("b", [2, 2])]])


def config(**tables: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "run": {"name": "tiny", "tokens": 100, "seed": 1},
        "task": {"use": "none", "width": 8},
        "rounds": {"fragments": 2},
    }
    for table, keys in tables.items():
        values.setdefault(table, {}).update(keys)
    return parse(RunConfig, values, "run.toml")


def initial() -> Initial:
    values = {"a": 1.0, "b": 2.0}
    return Initial(LAYOUT, lambda f: np.full(f.size, values[f.tensors[0].name], np.float32), ["b"], 64, FACTS)


def adopted(path: Path, run: RunConfig, own: Slice = WHOLE) -> str:
    """The run id that `path` has once a coordinator of `run` has opened it."""
    store = StateDir.hold(path)
    try:
        store.adopt_run(run, path, initial, own)
        return store.run_id
    finally:
        store.close()


def test_a_changed_config_is_told_without_the_mirrors_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adopted(tmp_path, config())
    caplog.set_level(logging.INFO)
    adopted(tmp_path, config())
    assert caplog.messages == []
    changes = {"wire": {"upload": "int8"}, "store": {"mirror": "s3://key:secret@far/away"}}
    adopted(tmp_path, config(**changes))
    assert caplog.messages == ["the run's config was changed: [wire] upload = 'int8', [store] mirror"]


# ---- one holder


def test_a_directory_that_is_held_is_refused_and_names_the_holder(tmp_path: Path) -> None:
    first = StateDir.hold(tmp_path)
    with pytest.raises(ConfigError, match=rf"held by another live coordinator \(process {os.getpid()}\); stop that"):
        StateDir.hold(tmp_path)
    first.close()
    StateDir.hold(tmp_path).close()


def test_readers_and_the_token_command_do_not_need_the_hold(tmp_path: Path) -> None:
    first = StateDir.hold(tmp_path)
    StateDir(tmp_path).close()
    StateDir(tmp_path, read_only=True).close()
    first.close()


def test_the_spool_is_emptied_at_start(tmp_path: Path) -> None:
    StateDir.hold(tmp_path).close()
    (tmp_path / "uploads" / "half").write_bytes(b"half")
    store = StateDir.hold(tmp_path)
    assert list(store.uploads.iterdir()) == []
    store.close()


def test_what_a_crash_left_is_removed_at_start(tmp_path: Path) -> None:
    """Scratch files of fragments at rest, and checkpoints that had no name yet: both may be large."""
    adopted(tmp_path, config())
    (tmp_path / "states").mkdir()
    left = [tmp_path / "states" / "p0000.accumulated", tmp_path / "checkpoints" / ".0f"]
    for path in left:
        path.write_bytes(b"half")
    StateDir(tmp_path, read_only=True).close()
    assert all(path.exists() for path in left), "not by a reader: a coordinator may be alive"
    StateDir.hold(tmp_path).close()
    assert not any(path.exists() for path in left)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_new_run_holds_one_fragment_besides_its_model(tmp_path: Path) -> None:
    layout = Layout.from_wire([[(f"{p}.a", [1 << 20])] for p in range(5)])
    ones = Initial(layout, lambda fragment: np.ones(fragment.size, np.float32), [])
    store = StateDir.hold(tmp_path)
    with peak_of() as peak:
        store.adopt_run(config(rounds={"fragments": 5}), tmp_path, lambda: ones)
    assert peak.bytes < 1.25 * 4 * layout.fragments[0].size
    store.close()


def test_a_reader_of_something_else_is_told_so_and_makes_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="is not a coordinator's state directory"):
            StateDir(path, read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be made: .*; name another --state"):
            StateDir.hold(path)


def test_a_hold_that_fails_lets_go(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"garbage " * 1000)
    for _ in range(2):
        with pytest.raises(CorruptError):
            StateDir.hold(tmp_path)


# ---- one run


def test_a_new_directory_becomes_the_runs_and_is_its_own_at_the_next_start(tmp_path: Path) -> None:
    store = StateDir.hold(tmp_path)
    assert store.adopt_run(config(), tmp_path, initial) is True
    run = store.run_id
    assert run.startswith("tiny.")
    assert store.layout == LAYOUT
    assert store.config == config()
    store.close()
    store = StateDir.hold(tmp_path)

    def never() -> Initial:
        raise AssertionError("weights are built once in a run's life")

    assert store.adopt_run(config(), tmp_path, never) is False
    assert store.run_id == run
    (state,) = (store.checkpoints(2).load(e, LAYOUT.fragments[1]) for e in store.checkpoints(2).entries(1))
    assert state.master.tolist() == state.published.tolist() == [2.0] * 4
    assert store.initial_digest(1) == state.digest
    store.close()


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("[run] name", {"run": {"name": "other"}}),
        ("[run] seed", {"run": {"seed": 2}}),
        ("[run] init", {"run": {"init": "w.safetensors"}}),
        ("[task] use", {"task": {"use": "other"}}),
        ("[task] width", {"task": {"width": 9}}),
        ("[task] depth", {"task": {"depth": 1}}),
        ("[rounds] fragments", {"rounds": {"fragments": 3}}),
        ("[rounds] layout", {"rounds": {"layout": "strided"}}),
    ],
)
def test_the_directory_of_another_run_is_refused_by_the_key_that_differs(
    tmp_path: Path, key: str, changed: dict[str, dict[str, Any]]
) -> None:
    run = adopted(tmp_path, config())
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ConfigError) as caught:
        adopted(tmp_path, config(**changed))
    assert "belongs to another run" in str(caught.value)
    assert key in str(caught.value)
    assert files == {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert adopted(tmp_path, config()) == run, "and it is none the worse"


@pytest.mark.parametrize(
    "changed",
    [
        {"run": {"tokens": 999}},
        {"outer": {"lr": 0.5}},
        {"wire": {"upload": "int8"}},
        {"task": {"paths": ["elsewhere"]}},
        {"task": {"cache": "elsewhere"}},
    ],
)
def test_what_may_change_within_a_run_may_change_at_a_restart(
    tmp_path: Path, changed: dict[str, dict[str, Any]]
) -> None:
    run = adopted(tmp_path, config())
    assert adopted(tmp_path, config(**changed)) == run
    store = StateDir(tmp_path, read_only=True)
    assert store.config == config(**changed)
    store.close()


def test_what_the_task_said_as_the_run_began_stays_the_runs(tmp_path: Path) -> None:
    """A start after that does not ask the task: it may not be here, nor its files."""
    adopted(tmp_path, config())
    store = StateDir.hold(tmp_path)
    store.adopt_run(config(), tmp_path, lambda: pytest.fail("the task was asked"))
    assert (store.fingerprint, store.sequence_tokens, store.embeddings) == (FACTS, 64, {"b"})
    store.close()


def test_one_of_several_coordinators_keeps_its_own_fragments_and_numbers_them_from_0(tmp_path: Path) -> None:
    run = adopted(tmp_path, config(), Slice(1, 2))
    assert run.startswith("tiny.1.")
    store = StateDir(tmp_path, read_only=True)
    assert store.slice == Slice(1, 2)
    assert store.layout == Layout.from_wire([[("b", [2, 2])]])
    (state,) = (store.checkpoints(2).load(e, store.layout.fragments[0]) for e in store.checkpoints(2).entries(0))
    assert state.published.tolist() == [2.0] * 4
    assert store.initial_digest(0) == state.digest
    store.close()


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        (Slice(0, 2), Slice(1, 2), "there --shard is 0, here 1"),
        (Slice(0, 2), Slice(0, 3), "there the number of [run] coordinators is 2, here 3"),
        (Slice(0, 2), WHOLE, "there --shard is 0, here None"),
        (WHOLE, Slice(0, 2), "there --shard is None, here 0"),
    ],
)
def test_the_directory_of_another_shard_is_refused(tmp_path: Path, was: Slice, becomes: Slice, says: str) -> None:
    run = adopted(tmp_path, config(), was)
    with pytest.raises(ConfigError, match=re.escape(says)):
        adopted(tmp_path, config(), becomes)
    assert adopted(tmp_path, config(), was) == run


def test_coordinators_may_move_to_other_urls(tmp_path: Path) -> None:
    urls = [["https://a:1", "https://b:1"], ["https://a:2", "https://c:1"]]
    runs = {adopted(tmp_path, config(run={"coordinators": each}), Slice(1, 2)) for each in urls}
    assert len(runs) == 1


def test_a_start_that_died_half_way_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoints.save

    def dies(self: Checkpoints, state: Any) -> None:
        if state.fragment.index == 1:
            raise OSError(28, "No space left on device")
        real(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dies)
        with pytest.raises(OSError, match="No space"):
            adopted(tmp_path, config())
    store = StateDir(tmp_path, read_only=True)
    with pytest.raises(ConfigError, match="holds no run yet; start `isthmus coordinator serve`"):
        _ = store.run_id
    store.close()
    adopted(tmp_path, config(run={"name": "another"}))
    store = StateDir(tmp_path, read_only=True)
    assert [len(store.checkpoints(2).entries(p)) for p in (0, 1)] == [1, 1]
    store.close()


def test_the_config_of_a_directory_without_a_run_is_told_in_one_sentence(tmp_path: Path) -> None:
    StateDir(tmp_path).close()  # what `token add` makes
    store = StateDir(tmp_path, read_only=True)
    try:
        with pytest.raises(IsthmusError):
            _ = store.config
    finally:
        store.close()


def test_a_directory_that_is_somebody_elses_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("uploads", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"no coordinator's state directory and not empty \(it has checkpoints\)"):
        adopted(tmp_path, config())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", "holiday.jpg", "holiday.jpg", "uploads"]


def test_a_token_in_somebody_elses_directory_does_not_empty_it(tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "holiday.jpg").write_bytes(b"precious")
    with contextlib.suppress(ConfigError):
        StateDir(tmp_path).close()  # as `token add` opens it
    with contextlib.suppress(ConfigError):
        adopted(tmp_path, config())
    assert (tmp_path / "uploads" / "holiday.jpg").exists()


def test_checkpoints_are_not_dropped_where_the_journal_is_missing(tmp_path: Path) -> None:
    adopted(tmp_path, config())
    for file in tmp_path.glob("journal.sqlite*"):
        file.unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        adopted(tmp_path, config())
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
