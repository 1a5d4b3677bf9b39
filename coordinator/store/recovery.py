"""Recovery: the newest sound checkpoint of each fragment, and every journaled round since, executed again.

Each re-executed round must end in the digests that the journal recorded, or recovery stops: weights that
cannot be explained are never trained on. A round that was closed and not published is carried out now.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack

from coordinator.outer.merge import Weighted
from coordinator.outer.step import OuterState, Room, Stepped, outer_step
from coordinator.outer.vectors import Vectors
from coordinator.store.checkpoint import Checkpoints
from coordinator.store.files import Blobs
from coordinator.store.journal import Journal, StoredRound
from shared.errors import CorruptError, FormatError
from shared.fragments import Fragment, Layout
from shared.wire import open_container

log = logging.getLogger(__name__)

Publish = Callable[[StoredRound, Stepped], None]
VectorsOf = Callable[[Fragment], Vectors]
"""Where a fragment's state is to be."""


def in_memory(fragment: Fragment) -> Vectors:
    return Vectors()


def execute(
    state: OuterState,
    round_: StoredRound,
    journal: Journal,
    blobs: Blobs,
    run: str,
    embeddings: Collection[str],
    executor: Executor,
    room: Room | None = None,
) -> Stepped:
    """Carries out a journaled round on `state`, from the contributions' blobs; `room`: see `outer_step`. Raises
    CorruptError."""
    with ExitStack() as stack:
        weighted = []
        for id_, weight in round_.members:
            stored = journal.contribution(id_)
            if stored is None:
                raise CorruptError(
                    f"the journal's round {round_.fragment}/{round_.version} names no contribution {id_}"
                )
            path = blobs.sound(stored.blob)
            try:
                container = stack.enter_context(open_container(path, state.fragment))
            except FormatError as error:
                raise CorruptError(f"blob {path} is not a sound contribution: {error}") from None
            weighted.append(Weighted(container, weight, stored.norm))
        return outer_step(state, weighted, round_.rule, run, round_.tokens, executor, embeddings, room)


def recover(
    layout: Layout,
    journal: Journal,
    blobs: Blobs,
    checkpoints: Checkpoints,
    run: str,
    embeddings: Collection[str],
    executor: Executor,
    publish: Publish,
    vectors_of: VectorsOf = in_memory,
) -> Iterator[OuterState]:
    """The state of every fragment as the journal has it, each made when it is asked for and at rest then; `publish`
    gets a round that was left unpublished."""
    for fragment in layout.fragments:
        yield _recover_fragment(
            fragment, journal, blobs, checkpoints, run, embeddings, executor, publish, vectors_of(fragment)
        )


def _recover_fragment(
    fragment: Fragment,
    journal: Journal,
    blobs: Blobs,
    checkpoints: Checkpoints,
    run: str,
    embeddings: Collection[str],
    executor: Executor,
    publish: Publish,
    vectors: Vectors,
) -> OuterState:
    state = _newest_sound(fragment, checkpoints, vectors)
    for round_ in journal.rounds(fragment.index, after=state.version):
        if round_.version != state.version + 1:
            raise CorruptError(
                f"journal {journal.path}: fragment {fragment.index} has version {round_.version} after {state.version}"
            )
        stepped = execute(state, round_, journal, blobs, run, embeddings, executor)
        if round_.published_at is None:
            publish(round_, stepped)
        elif stepped.digests != round_.digests:
            raise CorruptError(
                f"version {round_.version} of fragment {fragment.index} came out different when it was executed again; "
                "a blob or checkpoint was changed: restore the state directory from a backup"
            )
    vectors.rest()
    return state


def _newest_sound(fragment: Fragment, checkpoints: Checkpoints, vectors: Vectors) -> OuterState:
    entries = checkpoints.entries(fragment.index)
    if not entries:
        raise CorruptError(
            f"{checkpoints.directory} lists no checkpoint of fragment {fragment.index}; restore it from a backup"
        )
    for entry in entries:
        try:
            return checkpoints.load(entry, fragment, vectors)
        except CorruptError as error:
            failure = error
            log.warning("%s; trying the one before", error)
    raise failure
