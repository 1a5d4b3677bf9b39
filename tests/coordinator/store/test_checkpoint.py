"""Checkpoints: what is loaded is what was saved, or the file is named and the one before it serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from coordinator.outer.optimizers import OuterRule
from coordinator.outer.step import OuterState, outer_step
from coordinator.store.checkpoint import Checkpoints, Entry
from coordinator.store.files import Blobs
from coordinator.store.journal import Journal
from coordinator.store.recovery import recover
from shared.errors import CorruptError
from shared.fragments import Fragment, Layout, TensorSpec
from tests.support.peak import peak_of

FRAGMENT = Fragment(0, (TensorSpec("a", (5, 4)), TensorSpec("b", (13,))))
OTHER = Fragment(1, (TensorSpec("c", (33,)),))
RULE = OuterRule("nesterov", 0.7, 0.9, "int8", 1)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", "run-1", keep=2)


def state_at(version: int, fragment: Fragment = FRAGMENT) -> OuterState:
    random = np.random.default_rng(version)
    master, momentum, published = (random.standard_normal(fragment.size).astype(np.float32) for _ in range(3))
    state = OuterState(fragment, master, published, {"momentum": momentum}, 3, version, tokens=10 * version)
    state.digest = state.digests().published
    return state


def newest_file(checkpoints: Checkpoints) -> Path:
    return checkpoints.directory / checkpoints.entries(0)[0].file


def assert_same(got: OuterState, wanted: OuterState) -> None:
    assert (got.version, got.tokens, got.digest) == (wanted.version, wanted.tokens, wanted.digest)
    assert (got.count, list(got.slots)) == (wanted.count, list(wanted.slots))
    assert got.master.tobytes() == wanted.master.tobytes()
    assert got.published.tobytes() == wanted.published.tobytes()
    assert all(got.slots[name].tobytes() == wanted.slots[name].tobytes() for name in wanted.slots)


def test_a_checkpoint_gives_back_the_same_bits(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    (entry,) = checkpoints.entries(0)
    assert entry == Entry(0, 16, "p0000-v000000016.safetensors")
    loaded = checkpoints.load(entry, FRAGMENT)
    assert_same(loaded, state_at(16))
    loaded.master += 1  # what was loaded can be stepped


def test_only_the_newest_n_of_each_fragment_are_kept(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(0, OTHER))
    for version in (0, 16, 32):
        checkpoints.save(state_at(version))
    assert [entry.version for entry in checkpoints.entries(0)] == [32, 16]
    assert [entry.version for entry in checkpoints.entries(1)] == [0]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == [
        "manifest.json",
        "p0000-v000000016.safetensors",
        "p0000-v000000032.safetensors",
        "p0001-v000000000.safetensors",
    ]


def test_the_same_version_may_be_saved_again(checkpoints: Checkpoints) -> None:
    for _ in range(3):
        checkpoints.save(state_at(16))
    assert [entry.version for entry in checkpoints.entries(0)] == [16]


def test_a_save_that_fails_leaves_the_checkpoints_that_were_there(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(state_at(16))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.store.checkpoint.write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(state_at(32))
    (entry,) = checkpoints.entries(0)
    assert_same(checkpoints.load(entry, FRAGMENT), state_at(16))
    assert len(list(checkpoints.directory.iterdir())) == 2


def test_neither_saving_nor_loading_takes_a_copy_of_the_fragment(checkpoints: Checkpoints) -> None:
    large = Fragment(0, (TensorSpec("a", (1 << 21,)),))
    state, vector = state_at(16, large), 4 * large.size
    with peak_of() as peak:
        checkpoints.save(state)
    assert peak.bytes < vector / 8
    with peak_of() as peak:
        loaded = checkpoints.load(checkpoints.entries(0)[0], large)
    assert peak.bytes < 3 * vector + vector / 8, "Θ, Θ̂ and the momentum, which are what was asked for"
    assert_same(loaded, state)


def test_a_checkpoint_with_other_vectors_than_a_state_has_is_refused(checkpoints: Checkpoints) -> None:
    """Their names become those of files."""
    state = state_at(16)
    state.slots["../../elsewhere"] = state.slots["momentum"]
    checkpoints.save(state)
    with pytest.raises(CorruptError, match="which is not what a state has"):
        checkpoints.load(checkpoints.entries(0)[0], FRAGMENT)


def test_a_flipped_bit_in_any_tensor_is_found_and_the_file_is_named(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    (entry,), path = checkpoints.entries(0), newest_file(checkpoints)
    sound = path.read_bytes()
    tensors = len(sound) - 3 * 4 * FRAGMENT.size
    for at in range(tensors, len(sound), 29):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(CorruptError, match=path.name):
            checkpoints.load(entry, FRAGMENT)


def test_a_flipped_bit_in_the_header_is_never_a_traceback(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    (entry,), path = checkpoints.entries(0), newest_file(checkpoints)
    sound, told = path.read_bytes(), list[bool]()
    for at in range(len(sound) - 3 * 4 * FRAGMENT.size):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
        try:
            loaded = checkpoints.load(entry, FRAGMENT)
        except CorruptError as error:
            told.append(path.name in str(error))
        else:
            loaded.tokens = 160  # see test_a_flipped_bit_in_the_token_count_is_found
            assert_same(loaded, state_at(16))
    assert len(told) > 300
    assert all(told)


def test_a_flipped_bit_in_the_token_count_is_found(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    (entry,), path = checkpoints.entries(0), newest_file(checkpoints)
    sound = path.read_bytes()
    assert sound.count(b'"160"') == 1
    path.write_bytes(sound.replace(b'"160"', b'"560"'))
    with pytest.raises(CorruptError):
        checkpoints.load(entry, FRAGMENT)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_a_file_that_is_not_whole_is_named(checkpoints: Checkpoints, damage: str) -> None:
    checkpoints.save(state_at(16))
    (entry,), path = checkpoints.entries(0), newest_file(checkpoints)
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "garbage":
            path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(CorruptError, match=path.name):
        checkpoints.load(entry, FRAGMENT)


def test_a_checkpoint_of_another_run_version_or_shape_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    (entry,) = checkpoints.entries(0)
    with pytest.raises(CorruptError, match="of run 'run-1', not 'run-2'"):
        Checkpoints(checkpoints.directory, "run-2", 2).load(entry, FRAGMENT)
    with pytest.raises(CorruptError, match=entry.file):
        checkpoints.load(Entry(0, 17, entry.file), FRAGMENT)
    with pytest.raises(CorruptError, match="shape of fragment 0"):
        checkpoints.load(entry, Fragment(0, (TensorSpec("a", (32,)),)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checkpoints": [{"fragment": 0}]}', '{"checkpoints": 3}', "\x00"])
def test_a_corrupt_manifest_is_told_and_made_good_by_the_files_beside_it(checkpoints: Checkpoints, text: str) -> None:
    assert checkpoints.manifest_fault() is not None
    checkpoints.save(state_at(16))
    assert checkpoints.manifest_fault() is None
    (checkpoints.directory / "manifest.json").write_text(text)
    told = checkpoints.manifest_fault()
    assert told is not None
    assert "manifest.json is corrupt: " in told
    assert "\n" not in told
    (entry,) = checkpoints.entries(0)
    assert checkpoints.load(entry, FRAGMENT).version == 16
    checkpoints.save(state_at(32))
    assert checkpoints.manifest_fault() is None
    assert [entry.version for entry in checkpoints.entries(0)] == [32, 16]


def test_a_manifest_names_the_run_and_every_file(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(16))
    manifest = json.loads((checkpoints.directory / "manifest.json").read_text())
    assert manifest == {
        "run": "run-1",
        "checkpoints": [{"fragment": 0, "version": 16, "file": "p0000-v000000016.safetensors"}],
    }


# ---- recovery falls back


def test_recovery_takes_the_checkpoint_before_a_broken_one_and_ends_in_the_same_bits(
    checkpoints: Checkpoints, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    journal, state = Journal(tmp_path / "journal.sqlite"), state_at(0)
    checkpoints.save(state)
    for version in (1, 2):
        journal.close_round(0, version, "complete", [], RULE, at=0.0)
        journal.publish(0, outer_step(state, [], RULE, "run-1", 0, pool), "delta", at=0.0)
    checkpoints.save(state)
    path = newest_file(checkpoints)
    assert path.name == "p0000-v000000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    published: list[object] = []
    (recovered,) = recover(
        Layout((FRAGMENT,)),
        journal,
        Blobs(tmp_path / "blobs"),
        checkpoints,
        "run-1",
        (),
        pool,
        lambda *each: published.append(each),
    )
    assert_same(recovered, state)
    assert published == [], "both versions were out already"
    first = checkpoints.directory / "p0000-v000000000.safetensors"
    first.write_bytes(b"")
    with pytest.raises(CorruptError, match=first.name):
        list(recover(Layout((FRAGMENT,)), journal, Blobs(tmp_path), checkpoints, "run-1", (), pool, lambda *_: None))
    journal.close()
