"""Whether a state directory still is what its run made of it: the journal executed again, and every digest compared."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.outer.step import OuterState
from coordinator.store.checkpoint import Checkpoints, Entry
from coordinator.store.journal import StoredRound
from coordinator.store.recovery import execute
from coordinator.store.state_dir import StateDir
from shared.errors import CorruptError
from shared.fragments import Fragment


@dataclass
class Verified:
    """What was found of one run. `faults` are sentences, each of which names its file or version."""

    run: str
    versions: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each fragment the oldest version that is still kept whole, and the newest."""
    rounds: int = 0
    checkpoints: int = 0
    blobs: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = ", ".join(f"{p}: {first} to {last}" for p, (first, last) in sorted(self.versions.items()))
        verdict = "all digests agree" if not self.faults else f"{len(self.faults)} faults"
        return (
            f"run {self.run}: {self.rounds} rounds executed again, {self.checkpoints} checkpoints and {self.blobs} "
            f"blobs read (versions by fragment: {kept}); {verdict}"
        )


def verify(path: Path, executor: Executor | None = None) -> Verified:
    """Reads all that the state directory keeps, and executes every round again from the oldest checkpoint on, chunks in
    parallel on `executor` (None: one of its own). Writes nothing; a daemon may be using the directory. Raises
    ConfigError, CorruptError (of the journal), OSError."""
    store = StateDir(path, read_only=True)
    try:
        found = Verified(store.run_id)
        checkpoints = store.checkpoints(store.config.store.keep_checkpoints)
        if (fault := checkpoints.manifest_fault()) is not None:
            found.faults.append(fault)
        with ExitStack() as stack:
            pool = executor or stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
            for fragment in store.layout.fragments:
                _verify_fragment(store, checkpoints, fragment, found, pool)
        _verify_blobs(store, found)
        return found
    finally:
        store.close()


def _verify_fragment(
    store: StateDir, checkpoints: Checkpoints, fragment: Fragment, found: Verified, executor: Executor
) -> None:
    p = fragment.index
    # (Once more than needed, so that there is one state at a time in memory.)
    entries = checkpoints.entries(p)[::-1]
    sound = [entry for entry in entries if _is_sound(store, checkpoints, entry, fragment, found)]
    if not sound:
        found.faults.append(
            f"fragment {p} has no sound checkpoint in {checkpoints.directory}; restore it from a backup"
        )
        return
    state = checkpoints.load(sound[0], fragment)
    first = state.version
    while (round_ := store.journal.round(p, state.version + 1)) is not None:
        try:
            _verify_round(store, state, round_, executor)
            found.rounds += 1
        except CorruptError as error:
            if _is_pruned(store, round_):
                # A living daemon has newer checkpoints by now, and let go of what came before them.
                _verify_fragment(store, checkpoints, fragment, found, executor)
                return
            found.faults.append(str(error))
            later = [entry for entry in sound if entry.version >= round_.version]
            if not later:
                break
            del state  # before another is in memory
            state = checkpoints.load(later[0], fragment)
    found.versions[p] = first, state.version


def _is_pruned(store: StateDir, round_: StoredRound) -> bool:
    """Whether what the round merged is not kept any more."""
    needed = store.journal.needed_blobs()
    members = [store.journal.contribution(id_) for id_, _ in round_.members]
    return any(stored is None or stored.blob not in needed for stored in members)


def _is_sound(store: StateDir, checkpoints: Checkpoints, entry: Entry, fragment: Fragment, found: Verified) -> bool:
    """Whether the checkpoint holds what the journal says of its version."""
    try:
        state = checkpoints.load(entry, fragment)
    except CorruptError as error:
        if entry in checkpoints.entries(entry.fragment):  # (A living daemon drops old ones.)
            found.faults.append(str(error))
        return False
    found.checkpoints += 1
    round_ = store.journal.round(entry.fragment, entry.version)
    recorded = None if round_ is None else round_.digests
    agrees = state.digest == store.initial_digest(entry.fragment) if entry.version == 0 else state.digests() == recorded
    if not agrees:
        found.faults.append(
            f"checkpoint {checkpoints.directory / entry.file} is whole, and is not what the journal recorded of "
            f"version {entry.version}; restore it from a backup"
        )
    return agrees


def _verify_round(store: StateDir, state: OuterState, round_: StoredRound, executor: Executor) -> None:
    """Executes a round on `state`. Raises CorruptError where anything comes out other than the journal says."""
    stepped = execute(state, round_, store.journal, store.blobs, store.run_id, store.embeddings, executor)
    if round_.published_at is not None and stepped.digests != round_.digests:
        raise CorruptError(
            f"version {round_.version} of fragment {round_.fragment} came out different when it was executed again; "
            "the journal, a blob or a checkpoint was changed: restore the state directory from a backup"
        )


def _verify_blobs(store: StateDir, found: Verified) -> None:
    for digest in sorted(store.journal.needed_blobs()):
        try:
            store.blobs.verify(digest)
            found.blobs += 1
        except CorruptError as error:
            # (Removed by a living daemon since the list was made, it is none that is needed.)
            if digest in store.journal.needed_blobs() and str(error) not in found.faults:
                found.faults.append(str(error))
