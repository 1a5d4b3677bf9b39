"""The coordinator's state directory: what is in it, whose it is, and that one process holds it.

journal.sqlite   blobs/   checkpoints/   snapshots/   uploads/ (spool, emptied at start)   lock
mirror/ (what is being copied to [store] mirror)   states/ (fragments at rest, made anew at each start: `resting`)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from coordinator.outer.step import OuterState
from coordinator.store.checkpoint import Checkpoints
from coordinator.store.files import Blobs
from coordinator.store.journal import Journal
from shared.config import RunConfig
from shared.errors import ConfigError, CorruptError
from shared.files import DISK, Disk
from shared.fragments import F32, Fragment, Layout, digest_flat
from shared.sharding import WHOLE, Slice

log = logging.getLogger(__name__)

PLACES = ("paths", "cache")
"""Options of a task that say where its data are, and not what is trained."""
SHARD, COUNT = "--shard", "the number of [run] coordinators"
"""What the identity of one of several coordinators has, and that of a single one has not."""


@dataclass(frozen=True)
class Initial:
    """What a run starts from: the layout, the flat fp32 weights of each fragment (made when they are asked for: the
    model is in memory already), the names of the tensors that are embeddings, the most tokens that a sequence can
    count (None: the task does not say), and what else must be the same at every site (`Task.fingerprint`)."""

    layout: Layout
    weights: Callable[[Fragment], F32]
    embeddings: list[str]
    sequence_tokens: int | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    def of(self, own: Slice) -> Initial:
        """The part of one of several coordinators."""
        return replace(self, layout=own.of_layout(self.layout))


class StateDir:
    """An opened state directory. `run_id`, `layout` and `checkpoints` are there once it belongs to a run."""

    def __init__(self, path: Path, *, read_only: bool = False, disk: Disk = DISK) -> None:
        self.path, self.disk = path, disk
        self._lock: int | None = None
        self._made = (False, False)
        if read_only:
            if not (path / "journal.sqlite").is_file():
                raise ConfigError(f"{path} is not a coordinator's state directory: it has no journal.sqlite")
        else:
            _make_directory(path)
        self.journal = Journal(path / "journal.sqlite", read_only=read_only, disk=disk)
        self.blobs = Blobs(path / "blobs", disk)
        self.snapshots = path / "snapshots"
        self.uploads = path / "uploads"
        self.states = path / "states"

    @classmethod
    def hold(cls, path: Path, disk: Disk = DISK) -> StateDir:
        """Opens `path` for a coordinator: no other may hold it. Raises ConfigError naming who does."""
        existed, empty = path.exists(), not (path / "journal.sqlite").exists()
        _make_directory(path)
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ConfigError(
                f"state directory {path} is held by another live coordinator (process {holder}); "
                "stop that one, or give this one its own --state"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        try:
            state = cls(path, disk=disk)
        except BaseException:
            os.close(descriptor)
            raise
        state._lock = descriptor
        state._made = (not existed, empty)
        for directory in (state.blobs.directory, state.snapshots):
            directory.mkdir(exist_ok=True)
        if (state.path / "mirror").exists():
            disk.remove(state.path / "mirror")
        disk.remove(state.states)
        # What a crash left of files that had no name yet.
        for beside in (state.path / "checkpoints").glob(".*"):
            disk.remove(beside)
        disk.remove(state.uploads)
        state.uploads.mkdir()
        return state

    def discard(self) -> None:
        """Closes it, and removes what opening it made where no run came of it: a refused start leaves nothing."""
        directory_is_new, was_empty = self._made
        nothing_came_of_it = was_empty and self.journal.meta("run") is None
        self.close()
        if nothing_came_of_it:
            for entry in self.path.iterdir():
                self.disk.remove(entry)
            if directory_is_new:
                self.path.rmdir()

    def close(self) -> None:
        self.journal.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @cached_property
    def run_id(self) -> str:
        run = self.journal.meta("run")
        if run is None:
            raise ConfigError(f"state directory {self.path} holds no run yet; start `isthmus coordinator serve` on it")
        return run

    @cached_property
    def lineage(self) -> str:
        """The name that the run began with; another than `run_id` where it was restored from a mirror. Checkpoints and
        sites know it by this one."""
        return self.journal.meta("lineage") or self.run_id

    @property
    def config(self) -> RunConfig:
        """The run's config as it was last served. Raises ConfigError where there is no run yet."""
        _ = self.run_id
        return RunConfig.model_validate_json(self.journal.meta("config") or "null", context="received")

    @property
    def slice(self) -> Slice:
        """Which fragments of the whole run are here: all, or those of one of several coordinators."""
        identity = json.loads(self.journal.meta("identity") or "{}")
        return Slice(identity.get(SHARD, 0), identity.get(COUNT, 1))

    @property
    def base(self) -> Path:
        """Where relative paths of the run's config count from."""
        return Path(self.journal.meta("base") or ".")

    @cached_property
    def layout(self) -> Layout:
        try:
            return Layout.from_wire(json.loads(self.journal.meta("layout") or "null"))
        except (TypeError, ValueError) as error:
            raise CorruptError(f"journal {self.journal.path} holds no readable layout: {error}") from None

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """The tensors that are embeddings; RDA merges them by the mean."""
        return frozenset(json.loads(self.journal.meta("embeddings") or "[]"))

    @property
    def sequence_tokens(self) -> int | None:
        """The most tokens that a sequence can count, where the task knew it."""
        known: int | None = json.loads(self.journal.meta("sequence_tokens") or "null")
        return known

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the task said as the run began, and every site's task must say: a start after that does not ask it
        again, so that it needs neither the task nor its files."""
        known: dict[str, str] = json.loads(self.journal.meta("fingerprint") or "{}")
        return known

    def initial_digest(self, fragment: int) -> str:
        """The digest of version 0 of a fragment."""
        digests: list[str] = json.loads(self.journal.meta("initial_digests") or "[]")
        return digests[fragment]

    def checkpoints(self, keep: int) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", self.lineage, keep, self.disk)

    def adopt_run(self, config: RunConfig, base: Path, build: Callable[[], Initial], own: Slice = WHOLE) -> bool:
        """Makes this directory the run's, or checks that it is. True where the run is new. `base` is where the config's
        relative paths count from; `own` is kept of what `build` gives.

        The journal learns of the run last: a start that dies half way leaves a directory that starts afresh.
        Raises ConfigError where the directory belongs to another run.
        """
        identity = identity_of(config, own)
        known = self.journal.meta("identity")
        if known is not None:
            self._check_identity(json.loads(known), identity)
            if config.model_dump_json() != (before := self.journal.meta("config")):
                log.info("the run's config was changed: %s", ", ".join(_changed(json.loads(before or "{}"), config)))
                self.journal.forget_sessions()
            self.journal.set_meta(config=config.model_dump_json(), base=str(base.resolve()))
            return False
        self._refuse_a_lost_journal()
        initial = build().of(own)
        layout = initial.layout
        name = config.run.name if own.count == 1 else f"{config.run.name}.{own.index}"
        run = f"{name}.{uuid.uuid4().hex[:12]}"
        checkpoints = Checkpoints(self.path / "checkpoints", run, config.store.keep_checkpoints, self.disk)
        self.disk.remove(checkpoints.directory)
        digests = [_save_initial(checkpoints, fragment, initial.weights(fragment)) for fragment in layout.fragments]
        self.journal.set_meta(
            run=run,
            identity=json.dumps(identity),
            config=config.model_dump_json(),
            base=str(base.resolve()),
            layout=json.dumps(layout.to_wire()),
            embeddings=json.dumps(initial.embeddings),
            sequence_tokens=json.dumps(initial.sequence_tokens),
            fingerprint=json.dumps(dict(initial.fingerprint)),
            initial_digests=json.dumps(digests),
        )
        return True

    def _refuse_a_lost_journal(self) -> None:
        """A start that died half way leaves version 0 and nothing else; more is a run whose journal is gone, and must
        not be taken for an empty directory. Raises CorruptError."""
        checkpoints = (self.path / "checkpoints").glob("p*-v*.safetensors")
        found = next((path for path in checkpoints if not path.stem.endswith("v000000000")), None)
        found = found or next(self.blobs.directory.glob("??/*"), None)
        if found is not None:
            raise CorruptError(
                f"journal {self.journal.path} is empty, and {found} says that a run was trained here; "
                "restore the journal from a backup, or name another --state"
            )

    def _check_identity(self, known: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key in sorted(known.keys() | wanted.keys()):
            if known.get(key) != wanted.get(key):
                raise ConfigError(
                    f"state directory {self.path} belongs to another run: there {key} is {known.get(key)!r}, "
                    f"here {wanted.get(key)!r}; give this run its own --state, or restore that value"
                )


def _save_initial(checkpoints: Checkpoints, fragment: Fragment, weights: F32) -> str:
    """Writes the checkpoint of version 0, where Θ = Θ̂ and the optimizer has nothing, and returns its digest."""
    state = OuterState(fragment, weights, weights, digest=digest_flat(weights, fragment.chunks()))
    checkpoints.save(state)
    return state.digest


def identity_of(config: RunConfig, own: Slice) -> dict[str, Any]:
    """What cannot change within a run's life; everything else may be changed at a restart. Where a task's
    data are is not part of what is trained, nor where coordinators can be reached of who they are."""
    task = {f"[task] {key}": value for key, value in config.task.options().items() if key not in PLACES}
    return {
        "[run] name": config.run.name,
        "[run] seed": config.run.seed,
        "[run] init": config.run.init,
        "[task] use": config.task.use,
        "[rounds] fragments": config.rounds.fragments,
        "[rounds] layout": config.rounds.layout,
        **task,
        **({SHARD: own.index, COUNT: own.count} if own.count > 1 else {}),
    }


def _changed(before: dict[str, Any], config: RunConfig) -> list[str]:
    """What a config says otherwise than the one before, for people; the mirror's URL may hold a secret."""
    found = []
    for table, keys in config.model_dump(mode="json").items():
        for key, value in keys.items():
            if before.get(table, {}).get(key) != value:
                found.append(f"[{table}] {key}" + ("" if key == "mirror" else f" = {value!r}"))
    return found


def _make_directory(path: Path) -> None:
    """Makes the directory, or makes sure that it is ours: parts of it are emptied at each start."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state directory {path} cannot be made: {error.strerror}; name another --state") from None
    strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in ("lock", "lost+found"))
    if strangers and not (path / "journal.sqlite").is_file():
        raise ConfigError(
            f"{path} is no coordinator's state directory and not empty (it has {strangers[0]}); name another --state"
        )
