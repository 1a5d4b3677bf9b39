"""A mirror: what a run can be restored from on another machine, at any URL that fsspec knows.

    URL/RUN/checkpoints/p0000-v000000016.safetensors   blobs/ab/abcdef…   journal-000000000003.sqlite
    URL/RUN/mirror-000000000003.json                   what belongs together; written last

Each pass copies the newest checkpoint of every fragment, the contributions that came after it, and a backup of the
journal, and then writes the list of them: a pass that was cut off leaves the one before it as it was. Two passes are
kept. Files that never change are copied once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from coordinator.store.checkpoint import Checkpoints
from coordinator.store.files import file_digest
from coordinator.store.journal import Journal
from coordinator.store.state_dir import StateDir
from shared.errors import ConfigError, CorruptError, FaultError
from shared.files import DISK

log = logging.getLogger(__name__)

KEPT = 2
PIECE_BYTES = 8 << 20
FORMAT = 2


class Cancelled(Exception):
    """The copying was broken off because the coordinator stops."""


@dataclass(frozen=True)
class Pass:
    """One pass of a mirror, as its list says: names and sizes of its files, and what they are."""

    run: str
    lineage: str
    number: int
    written_at: float
    tokens: int
    versions: dict[int, int]
    journal: str
    journal_digest: str
    files: dict[str, int]

    def to_json(self) -> str:
        # (JSON's keys are text, and the seal goes by their order.)
        facts = json.loads(json.dumps({"format": FORMAT, **self.__dict__}))
        return json.dumps({"mirror": facts, "seal": _seal(facts)}, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> Pass:
        """Raises ValueError, KeyError, TypeError where it is not what was written."""
        document = json.loads(text)
        facts = document["mirror"]
        if document["seal"] != _seal(facts) or facts.pop("format") != FORMAT:
            raise ValueError("it is not what was written, or of another version of Isthmus")
        return cls(**{**facts, "versions": {int(p): int(v) for p, v in facts["versions"].items()}})


class Place:
    """A directory of a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where no installed package knows the URL."""
        import fsspec.core  # not for those who mirror nothing: it takes a tenth of a second

        self.url = url
        try:
            self.fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(f"[store] mirror: {url} is not a URL that can be written to: {error}") from None
        self.root = root.rstrip("/")

    def files(self, under: str = "") -> dict[str, int]:
        """Names (from here) and sizes of all files."""
        root = f"{self.root}/{under}" if under else self.root
        try:
            found: Mapping[str, Mapping[str, Any]] = self.fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        known = PurePosixPath(self.root)
        return {str(PurePosixPath(name).relative_to(known)): int(facts["size"]) for name, facts in found.items()}

    def read(self, name: str) -> bytes:
        content: bytes = self.fs.cat_file(f"{self.root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        self._make_parent(name)
        self.fs.pipe_file(f"{self.root}/{name}", content)

    def put(self, source: Path, name: str, cancelled: Callable[[], bool]) -> None:
        """Copies a file there in pieces. Raises Cancelled between two of them."""
        self._make_parent(name)
        target = self.fs.open(f"{self.root}/{name}", "wb")
        try:
            with source.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    if cancelled():
                        raise Cancelled
                    target.write(piece)
        except BaseException:
            # Without its end an object store never shows it; where it does show, its size tells.
            with suppress(Exception):
                target.discard() if hasattr(target, "discard") else target.close()
            raise
        target.close()

    def get(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(f"{self.root}/{name}", str(target))

    def remove(self, name: str) -> None:
        self.fs.rm_file(f"{self.root}/{name}")

    def _make_parent(self, name: str) -> None:
        self.fs.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)


class Mirror:
    """Mirrors the state directory of one run. `stage` belongs to the thread that prunes; `copy` to one of its own."""

    def __init__(self, place: Place, store: StateDir, keep_checkpoints: int) -> None:
        self._place, self._store = place, store
        self._checkpoints = store.checkpoints(keep_checkpoints)
        self._staging = store.path / "mirror"

    def stage(self) -> dict[int, int]:
        """Holds on to all that a pass copies, however the state directory changes meanwhile: hard links, and a backup
        of the journal. Returns the version of each fragment's checkpoint. Raises OSError."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir()
        backup = self._staging / "journal.sqlite"
        self._store.journal.back_up(backup)
        versions = {}
        journal = Journal(backup, read_only=True, checked=True)
        try:
            for fragment in self._store.layout.fragments:
                entry = self._checkpoints.entries(fragment.index)[0]
                versions[fragment.index] = entry.version
                _link(self._checkpoints.directory / entry.file, self._staging / "checkpoints" / entry.file)
                for digest in journal.contribution_blobs(fragment.index, entry.version):
                    _link(self._store.blobs.path(digest), self._staging / "blobs" / digest[:2] / digest)
        finally:
            journal.close()
        return versions

    def copy(
        self, versions: dict[int, int], tokens: int, at: float, cancelled: Callable[[], bool] = lambda: False
    ) -> Pass:
        """Copies what was staged, then the list of it, and removes what only older passes need. Raises Cancelled soon
        after `cancelled` says so, and whatever the file system raises."""
        run, place = self._store.run_id, self._place
        there = place.files(run)
        numbers = [number for name in there if (number := _number(name)) is not None]
        number = max(numbers, default=0) + 1
        staged = {str(p.relative_to(self._staging)): p for p in self._staging.rglob("*") if p.is_file()}
        journal = staged.pop("journal.sqlite")
        backup = f"journal-{number:012d}.sqlite"
        sources = {**staged, backup: journal}
        files = {name: path.stat().st_size for name, path in sources.items()}
        for name, path in sources.items():
            if there.get(f"{run}/{name}") != files[name]:
                place.put(path, f"{run}/{name}", cancelled)
        written = place.files(run)
        if short := next((name for name, size in files.items() if written.get(f"{run}/{name}") != size), None):
            raise OSError(f"{short} did not arrive whole at {place.url}")
        digest = file_digest(journal)
        done = Pass(run, self._store.lineage, number, at, tokens, versions, backup, digest, files)
        name = f"{run}/{_list_name(number)}"
        place.write(name, done.to_json().encode())
        if Pass.from_json(place.read(name)) != done:
            raise OSError(f"{name} did not arrive whole at {place.url}")
        self._tidy(written, done)
        shutil.rmtree(self._staging, ignore_errors=True)
        return done

    def _tidy(self, there: Mapping[str, int], done: Pass) -> None:
        """Removes what no kept pass names, with `done` the newest. Nothing, where a list cannot be read: it may name
        what is needed."""
        run = self._store.run_id
        found = [each for _, each in _passes(self._place, run)]
        lists = [name for name in (*there, f"{run}/{_list_name(done.number)}") if _is_list(name)]
        if len(found) != len(set(lists)):
            return
        passes = sorted(found, key=lambda each: each.number)[-KEPT:]
        kept = {f"{run}/{name}" for each in passes for name in (*each.files, _list_name(each.number))}
        for name in there.keys() - kept:
            with suppress(FileNotFoundError):
                self._place.remove(name)


@dataclass(frozen=True)
class Restored:
    """What `restore` made."""

    run: str
    before: str
    versions: dict[int, int]
    tokens: int
    written_at: float

    def __str__(self) -> str:
        at = datetime.fromtimestamp(self.written_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        versions = ", ".join(str(version) for _, version in sorted(self.versions.items()))
        return (
            f"restored run {self.before} as it was mirrored at {at}: {self.tokens} tokens, versions {versions} and the "
            f"contributions after them. It is run {self.run} from now on; its sites follow by themselves"
        )


def restore(url: str, path: Path, check: Callable[[Path], list[str]]) -> Restored:
    """Makes the state directory `path` from the newest pass of a mirror that is whole, or from the one before.

    `check` names what is wrong with a state directory. The restored run goes by another name: its next versions may
    be other bits than those that were published under the old one. Raises ConfigError, CorruptError, FaultError.
    """
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} is there and not empty; restore into a directory of its own")
    place = Place(url)
    try:
        passes = _newest_first(place)
        beside = path.with_name(path.name + ".restoring")
        for where, each in passes:
            shutil.rmtree(beside, ignore_errors=True)
            try:
                restored = _restore_pass(place, where, each, beside)
                if faults := check(beside):
                    raise CorruptError(faults[0])
            except (CorruptError, FileNotFoundError) as error:
                shutil.rmtree(beside, ignore_errors=True)
                log.warning("pass %d of %s is of no use: %s", each.number, each.run, error)
                failure = error
                continue
            if path.exists():
                path.rmdir()
            beside.rename(path)
            DISK.sync_directory(path.resolve().parent)
            return restored
    except (OSError, ValueError) as error:
        raise FaultError(f"{url} cannot be read: {error}") from error
    raise CorruptError(f"no pass of the mirror at {url} is whole; the last one: {failure}")


def _restore_pass(place: Place, where: str, each: Pass, path: Path) -> Restored:
    """The pass whose list lies in the directory `where`. Raises CorruptError, OSError."""
    for name, size in each.files.items():
        target = path / ("journal.sqlite" if name == each.journal else name)
        if ".." in PurePosixPath(name).parts or not target.is_relative_to(path):
            raise CorruptError(f"{name} is no file of a mirror")
        place.get(str(PurePosixPath(where, name)), target)
        if target.stat().st_size != size:
            raise CorruptError(f"{name} has {target.stat().st_size} bytes and should have {size}")
    if file_digest(path / "journal.sqlite") != each.journal_digest:
        raise CorruptError(f"{each.journal} is not what was written")
    (path / "blobs").mkdir(exist_ok=True)
    run = f"{each.lineage.rpartition('.')[0]}.{uuid.uuid4().hex[:12]}"
    journal = Journal(path / "journal.sqlite")
    try:
        journal.restored(run, each.lineage, each.versions)
    finally:
        journal.close()
    checkpoints = Checkpoints(path / "checkpoints", each.lineage, KEPT)
    checkpoints.list_what_is_there()
    for file in path.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return Restored(run, each.run, each.versions, each.tokens, each.written_at)


def _newest_first(place: Place) -> list[tuple[str, Pass]]:
    """The passes of the one lineage that is mirrored there, with their directories. Raises ConfigError."""
    passes = sorted(_passes(place, ""), key=lambda found: -found[1].written_at)
    lineages = sorted({each.lineage for _, each in passes})
    if not passes:
        raise ConfigError(f"{place.url} holds no mirror of a run")
    if len(lineages) > 1:
        raise ConfigError(
            f"{place.url} holds mirrors of several runs; name the directory of one: {', '.join(lineages)}"
        )
    return passes


def _passes(place: Place, under: str) -> Iterator[tuple[str, Pass]]:
    """Those whose lists can be read, with the directories that these lie in."""
    for name in place.files(under):
        if _is_list(name):
            try:
                yield name.rpartition("/")[0], Pass.from_json(place.read(name))
            except (ValueError, KeyError, TypeError) as error:
                log.warning("%s/%s cannot be read: %s", place.url, name, error)


def _is_list(name: str) -> bool:
    return name.endswith(".json") and _number(name) is not None


def _list_name(number: int) -> str:
    return f"mirror-{number:012d}.json"


def _number(name: str) -> int | None:
    """Of a list or a journal, which pass it belongs to."""
    stem = PurePosixPath(name).stem
    digits = stem.removeprefix("mirror-").removeprefix("journal-")
    return int(digits) if digits != stem and digits.isdecimal() else None


def _seal(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _link(source: Path, target: Path) -> None:
    """A second name for a file that never changes; a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
