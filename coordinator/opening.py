"""The fragments' states as a coordinator begins with them: a new run's, or recovered."""

from __future__ import annotations

import logging
from pathlib import Path

from coordinator.machine import Machine
from coordinator.outer.optimizers import SLOTS
from coordinator.outer.step import OuterState, Stepped, warm_up
from coordinator.store.journal import StoredRound
from coordinator.store.recovery import VectorsOf, in_memory, recover
from coordinator.store.resting import is_mapped, map_states, state_bytes
from coordinator.store.state_dir import Initial, StateDir
from coordinator.workers import Workers
from shared.config import RunConfig
from shared.sharding import Slice

log = logging.getLogger(__name__)


def open_states(
    config: RunConfig, store: StateDir, workers: Workers, machine: Machine, base: Path, own: Slice
) -> list[OuterState]:
    """States that are ready to step, every kernel compiled; what the journal does not name is swept.

    `base` is where relative files in the config count from, `own` this coordinator's part of the run. Raises
    ConfigError, CorruptError, OSError.
    """

    def initial() -> Initial:
        # Imported for a new run only: it needs torch, and nothing else in the daemon does.
        from coordinator.initial import initial_weights

        return initial_weights(config, base)

    new = store.adopt_run(config, base, initial, own)
    warm_up()

    def publish(round_: StoredRound, stepped: Stepped) -> None:
        store.journal.publish(round_.fragment, stepped, store.blobs.put(*stepped.delta), machine.wall())

    began = machine.clock()
    checkpoints = store.checkpoints(config.store.keep_checkpoints)
    journal, blobs, run, embeddings = store.journal, store.blobs, store.run_id, store.embeddings
    vectors_of = _vectors_of(config, store, machine)
    states = list(
        recover(store.layout, journal, blobs, checkpoints, run, embeddings, workers.chunks, publish, vectors_of)
    )
    for state in states:
        state.adopt(config.outer.optimizer)
        state.vectors.rest()
    if strays := store.blobs.sweep(store.journal.needed_blobs()):
        log.info("removed %d blobs that nothing names", strays)
    seconds, versions = machine.clock() - began, [state.version for state in states]
    log.info("run %s: %s, versions %s, in %.2f s", store.run_id, "new" if new else "recovered", versions, seconds)
    return states


def _vectors_of(config: RunConfig, store: StateDir, machine: Machine) -> VectorsOf:
    """Where the fragments rest. Raises OSError where that is on disk and the disk has no room for it."""
    fragments, slots = store.layout.fragments, SLOTS[config.outer.optimizer]
    needed = sum(state_bytes(fragment, slots) for fragment in fragments)
    if not is_mapped(config.store.resting, needed, machine.memory()):
        return in_memory
    homes = map_states(store.states, fragments, slots, store.disk)
    log.info("fragments rest in mapped files: %.3g GB under %s", needed / 1e9, store.states)
    return lambda fragment: homes[fragment.index]
