"""The weights of a state directory, as files that other programs load; the daemon may be running or not.

The state is rebuilt and written one fragment at a time, so that a run which is larger than memory can be exported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coordinator.outer.step import OuterState, Stepped
from coordinator.store.journal import StoredRound
from coordinator.store.recovery import recover
from coordinator.store.state_dir import StateDir
from coordinator.store.tensor_files import TensorWriter
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.files import DISK
from shared.fragments import F32, Fragment, Layout
from shared.task import load_task


@dataclass(frozen=True)
class Stored:
    """A run as its state directory holds it; `base` is where its config's relative paths count from."""

    config: RunConfig
    run_id: str
    base: Path
    layout: Layout
    states: Iterator[OuterState]
    """Every fragment's state in turn, rebuilt from checkpoints and journal when it is asked for."""


@contextmanager
def stored_run(path: Path) -> Iterator[Stored]:
    """The run in a state directory, for the length of the block and without a write.

    Raises ConfigError, CorruptError, OSError, also when its states are asked for.
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
            yield Stored(config, store.run_id, store.base, store.layout, states)
    finally:
        store.close()


def _leave_unpublished(round_: StoredRound, stepped: Stepped) -> None:
    """A reader publishes nothing; a round that was closed and not yet published is part of the state all the same."""


def export(path: Path, out: Path, form: Literal["safetensors", "hf"], *, published: bool) -> str:
    """Writes the weights to `out` (a file; for `hf` a directory) and says in one line what they are."""
    with stored_run(path) as stored:
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
