"""The weights of a run, as files that other programs load; the daemon may be running or not.

Where several coordinators hold the run, its weights are put together from all their state directories.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from coordinator.outer.step import OuterState, Stepped
from coordinator.store.journal import StoredRound
from coordinator.store.recovery import recover
from coordinator.store.state_dir import StateDir, identity_of
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.files import DISK
from shared.fragments import F32
from shared.sharding import WHOLE, Slice, interleave
from shared.task import load_task


@dataclass(frozen=True)
class Stored:
    """A run as its state directory holds it; `base` is where its config's relative paths count from."""

    config: RunConfig
    run_id: str
    base: Path
    states: list[OuterState]
    slice: Slice = WHOLE


def read_states(path: Path) -> Stored:
    """The run, with every fragment's state rebuilt from checkpoints and journal, without a write.

    Raises ConfigError, CorruptError, OSError.
    """
    store = StateDir(path, read_only=True)
    try:
        config = store.config
        checkpoints = store.checkpoints(config.store.keep_checkpoints)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            states = recover(
                store.layout,
                store.journal,
                store.blobs,
                checkpoints,
                store.run_id,
                store.embeddings,
                pool,
                _leave_unpublished,
            )
        return Stored(config, store.run_id, store.base, states, store.slice)
    finally:
        store.close()


def read_run(paths: Sequence[Path]) -> Stored:
    """The whole run: of one state directory, or of those of all its coordinators, in any order. Raises what
    `read_states` raises, and ConfigError where they do not make up one run."""
    stored = [read_states(path) for path in paths]
    first, found = stored[0], dict[int, int]()
    for n, part in enumerate(stored):
        _refuse_another_run(paths[0], first, paths[n], part)
        shard = part.slice.index
        if shard in found:
            raise ConfigError(
                f"{paths[found[shard]]} and {paths[n]} are both of coordinator {shard}; name the state directory of "
                "each coordinator once"
            )
        found[shard] = n
    missing = [str(shard) for shard in range(first.slice.count) if shard not in found]
    if missing:
        raise ConfigError(
            f"{paths[0]} is of coordinator {first.slice.index} of {first.slice.count}, from 0; name with --with the "
            f"state directory of coordinator {' and that of '.join(missing)} too"
        )
    parts = [stored[found[shard]] for shard in sorted(found)]
    run_id, states = "+".join(part.run_id for part in parts), interleave([part.states for part in parts])
    return Stored(first.config, run_id, first.base, states)


def _refuse_another_run(path: Path, first: Stored, other_path: Path, other: Stored) -> None:
    """Raises ConfigError naming the key in which two state directories differ beyond which coordinator's they are."""
    here, there = (identity_of(each.config, Slice(0, each.slice.count)) for each in (first, other))
    for key in sorted(here.keys() | there.keys(), reverse=True):
        if here.get(key) != there.get(key):
            raise ConfigError(
                f"{path} and {other_path} are of different runs: {key} is {here.get(key)!r} in the one and "
                f"{there.get(key)!r} in the other"
            )


def _leave_unpublished(round_: StoredRound, stepped: Stepped) -> None:
    """A reader publishes nothing; a round that was closed and not yet published is part of the state all the same."""


def named_weights(states: list[OuterState], *, published: bool) -> dict[str, F32]:
    """All tensors by name: the masters Θ, or with `published` the Θ̂ that the sites hold."""
    arrays: dict[str, F32] = {}
    for state in states:
        arrays.update(state.fragment.unflatten(state.published if published else state.master))
    return arrays


def export(paths: Sequence[Path], out: Path, form: Literal["safetensors", "hf"], *, published: bool) -> str:
    """Writes the weights of the run in these state directories to `out` (a file; for `hf` a directory) and says in one
    line what they are."""
    stored = read_run(paths)
    config, run, states = stored.config, stored.run_id, stored.states
    weights = named_weights(states, published=published)
    versions = [state.version for state in states]
    metadata = {
        "format": "pt",
        "run": run,
        "weights": "published" if published else "master",
        "versions": ",".join(map(str, versions)),
        "tokens": str(sum(state.tokens for state in states) // len(states)),
    }
    if form == "hf":
        files = load_task(config.task.use, config.task.options(), stored.base).hf_files()
        if files is None:
            raise ConfigError(f"task {config.task.use!r} has no Hugging Face form; use --format safetensors")
        _write(out / "model.safetensors", weights, metadata)
        for name, content in files.items():
            (out / name).write_bytes(content)
    else:
        _write(out / "model.safetensors" if out.is_dir() else out, weights, metadata)
    kind = "published" if published else "master"
    return f"{out}: {kind} weights of run {run}, versions {versions}, {metadata['tokens']} tokens"


def _write(path: Path, weights: Mapping[str, F32], metadata: dict[str, str]) -> None:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        DISK.put(path, lambda beside: save_file(tensors, beside, metadata))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
