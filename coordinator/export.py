"""The weights of a run, as files that other programs load; the daemon may be running or not.

The state is rebuilt and written one fragment at a time, so that a run which is larger than memory can be exported.
Where several coordinators hold the run, its weights are put together from all their state directories.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coordinator.outer.step import OuterState, Stepped
from coordinator.store.journal import StoredRound
from coordinator.store.recovery import recover
from coordinator.store.state_dir import StateDir, identity_of
from coordinator.store.tensor_files import TensorWriter
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.files import DISK
from shared.fragments import F32, Fragment, Layout
from shared.sharding import Slice, interleave
from shared.task import load_task


@dataclass(frozen=True)
class Stored:
    """A run as its state directories hold it; `base` is where its config's relative paths count from."""

    config: RunConfig
    run_id: str
    base: Path
    layout: Layout
    states: Iterator[OuterState]
    """Every fragment's state in turn, rebuilt from checkpoints and journal when it is asked for."""


@contextmanager
def stored_run(paths: Sequence[Path]) -> Iterator[Stored]:
    """The run in a state directory, or in those of all its coordinators, in any order; for the length of the block and
    without a write.

    Raises ConfigError (also where they do not make up one run), CorruptError, OSError, also when its states are asked
    for.
    """
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(StateDir(path, read_only=True))) for path in paths]
        parts = _in_order(stores)
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
        states = [_states(store, pool) for store in parts]
        layout = Layout(tuple(interleave([store.layout.fragments for store in parts])))
        in_turn = (next(states[p % len(parts)]) for p in range(len(layout.fragments)))
        yield Stored(parts[0].config, "+".join(store.run_id for store in parts), parts[0].base, layout, in_turn)


def _states(store: StateDir, pool: ThreadPoolExecutor) -> Iterator[OuterState]:
    checkpoints = store.checkpoints(store.config.store.keep_checkpoints)
    return recover(
        store.layout,
        store.journal,
        store.blobs,
        checkpoints,
        store.run_id,
        store.embeddings,
        pool,
        _leave_unpublished,
    )


def _in_order(stores: Sequence[StateDir]) -> list[StateDir]:
    """The state directories of all coordinators of one run, by shard. Raises ConfigError."""
    first, found = stores[0], dict[int, StateDir]()
    for store in stores:
        _refuse_another_run(first, store)
        shard = store.slice.index
        if shard in found:
            raise ConfigError(
                f"{found[shard].path} and {store.path} are both of coordinator {shard}; name the state directory of "
                "each coordinator once"
            )
        found[shard] = store
    missing = [str(shard) for shard in range(first.slice.count) if shard not in found]
    if missing:
        raise ConfigError(
            f"{first.path} is of coordinator {first.slice.index} of {first.slice.count}, from 0; name with --with the "
            f"state directory of coordinator {' and that of '.join(missing)} too"
        )
    return [found[shard] for shard in sorted(found)]


def _refuse_another_run(first: StateDir, other: StateDir) -> None:
    """Raises ConfigError naming the key in which two state directories differ beyond which coordinator's they are."""
    here, there = (identity_of(each.config, Slice(0, each.slice.count)) for each in (first, other))
    for key in sorted(here.keys() | there.keys(), reverse=True):
        if here.get(key) != there.get(key):
            raise ConfigError(
                f"{first.path} and {other.path} are of different runs: {key} is {here.get(key)!r} in the one and "
                f"{there.get(key)!r} in the other"
            )


def _leave_unpublished(round_: StoredRound, stepped: Stepped) -> None:
    """A reader publishes nothing; a round that was closed and not yet published is part of the state all the same."""


def export(paths: Sequence[Path], out: Path, form: Literal["safetensors", "hf"], *, published: bool) -> str:
    """Writes the weights of the run in these state directories to `out` (a file; for `hf` a directory) and says in one
    line what they are."""
    with stored_run(paths) as stored:
        if form == "hf":
            config = stored.config
            files = load_task(config.task.use, config.task.options(), stored.base).hf_files()
            if files is None:
                raise ConfigError(f"task {config.task.use!r} has no Hugging Face form; use --format safetensors")
            metadata = _write(out / "model.safetensors", stored, published=published)
            for name, content in files.items():
                (out / name).write_bytes(content)
        else:
            metadata = _write(out / "model.safetensors" if out.is_dir() else out, stored, published=published)
        versions = json.loads(f"[{metadata['versions']}]")
        return (
            f"{out}: {metadata['weights']} weights of run {stored.run_id}, versions {versions}, "
            f"{metadata['tokens']} tokens"
        )


def _write(path: Path, stored: Stored, *, published: bool) -> dict[str, str]:
    """Writes all tensors by name: the masters Θ, or with `published` the Θ̂ that the sites hold. Returns the file's
    metadata."""
    fragments = stored.layout.fragments
    shapes = {tensor.name: tensor.shape for fragment in fragments for tensor in fragment.tensors}

    def metadata(versions: Sequence[int], tokens: Sequence[int]) -> dict[str, str]:
        return {
            "format": "pt",
            "run": stored.run_id,
            "weights": "published" if published else "master",
            "versions": ",".join(map(str, versions)),
            "tokens": str(sum(tokens) // len(tokens)),
        }

    versions, tokens = [], []

    def fill(beside: Path) -> None:
        # A state's version shows only when it is rebuilt; no number of the journal's is longer than this.
        longest = [2**63] * len(fragments)
        with TensorWriter(beside, shapes, metadata(longest, longest)) as writer:
            for state in stored.states:
                _write_fragment(writer, state.fragment, state.published if published else state.master)
                versions.append(state.version)
                tokens.append(state.tokens)
                del state  # before the next one is in memory
            writer.finish(metadata(versions, tokens))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        DISK.put(path, fill)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    return metadata(versions, tokens)


def _write_fragment(writer: TensorWriter, fragment: Fragment, flat: F32) -> None:
    for name, array in fragment.unflatten(flat).items():
        writer.write(name, array)
