"""Checkpoints: Θ, Θ̂ and the outer optimizer's slots of one fragment in one safetensors file each, and a manifest.

A fragment is checkpointed by itself, right after its own outer step, so that no moment has to write the
whole model while every round waits. The file's metadata names run, version, tokens and digests, and a file
is used only once its bytes have reproduced these digests.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from coordinator.outer.optimizers import SLOTS
from coordinator.outer.step import Digests, OuterState
from coordinator.outer.vectors import Vectors
from coordinator.store.tensor_files import open_tensors, write_tensors
from shared.errors import CorruptError
from shared.files import DISK, Disk
from shared.fragments import Fragment

log = logging.getLogger(__name__)

SLOT = "slot."
_VECTORS = {"master", "published", *(SLOT + name for names in SLOTS.values() for name in names)}
_NAME = re.compile(r"p([0-9]{4,})-v([0-9]{9,})\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A kept checkpoint as the manifest lists it."""

    fragment: int
    version: int
    file: str


class Checkpoints:
    """The checkpoint files of one run, in one directory."""

    def __init__(self, directory: Path, run: str, keep: int, disk: Disk = DISK) -> None:
        self.directory, self.run, self.keep, self._disk = directory, run, keep, disk

    def entries(self, fragment: int) -> list[Entry]:
        """The fragment's kept checkpoints, newest first. Where the manifest is unreadable, what is there instead: each
        file says what it is, and is used only once its bytes have proved it."""
        return sorted((e for e in self._manifest() if e.fragment == fragment), key=lambda e: -e.version)

    def save(self, state: OuterState) -> None:
        """Writes a checkpoint of `state`, lists it, and drops the oldest beyond `keep`. Raises OSError."""
        entry = Entry(
            state.fragment.index, state.version, f"p{state.fragment.index:04d}-v{state.version:09d}.safetensors"
        )
        digests = state.digests()
        metadata = {
            "run": self.run,
            "fragment": str(entry.fragment),
            "version": str(state.version),
            "tokens": str(state.tokens),
            "count": str(state.count),
            "published_digest": digests.published,
            "master_digest": digests.master,
            "optimizer_digest": digests.optimizer,
        }
        metadata["metadata_digest"] = _digest(metadata)
        tensors = {"master": state.master, "published": state.published}
        tensors |= {SLOT + name: values for name, values in state.slots.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        self._disk.put(self.directory / entry.file, lambda beside: write_tensors(beside, tensors, metadata))
        mine = [entry, *(e for e in self.entries(entry.fragment) if e.version != entry.version)]
        others = [e for e in self._manifest() if e.fragment != entry.fragment]
        kept, dropped = mine[: self.keep], mine[self.keep :]
        self._list([*others, *kept])
        for entry in dropped:
            self._disk.remove(self.directory / entry.file)

    def list_what_is_there(self) -> None:
        """Writes the manifest anew from the files beside it. Raises OSError."""
        self._list(self._found())

    def _list(self, entries: Iterable[Entry]) -> None:
        listing = json.dumps({"run": self.run, "checkpoints": [asdict(e) for e in entries]})
        self._disk.put(self.directory / "manifest.json", lambda beside: _write_text(beside, listing))

    def load(self, entry: Entry, fragment: Fragment, vectors: Vectors | None = None) -> OuterState:
        """The state in a checkpoint, read straight into `vectors` (None: memory) and verified. Raises CorruptError
        naming the file, and OSError where `vectors` has no room."""
        path, vectors = self.directory / entry.file, vectors or Vectors()
        try:
            file = open_tensors(path)
        except (OSError, ValueError) as error:
            raise CorruptError(f"checkpoint {path} cannot be read: {error}") from None
        with file:
            facts = _facts(path, file.metadata)
            if (facts.run, facts.version) != (self.run, entry.version):
                raise CorruptError(f"checkpoint {path} is of run {facts.run!r}, not {self.run!r}")
            if set(file.shapes.values()) != {(fragment.size,)}:
                raise CorruptError(f"checkpoint {path} does not have the shape of fragment {fragment.index}")
            # Names become those of files where states rest: only those that a state can have.
            if not {"master", "published"} <= file.shapes.keys() <= _VECTORS:
                raise CorruptError(f"checkpoint {path} holds {', '.join(file.shapes)}, which is not what a state has")
            arrays = {name: vectors.empty(name.removeprefix(SLOT), fragment.size) for name in file.shapes}
            try:
                for name, array in arrays.items():
                    file.read_into(name, array)
            except (OSError, ValueError) as error:
                raise CorruptError(f"checkpoint {path} cannot be read: {error}") from None
        state = OuterState(
            fragment,
            arrays.pop("master"),
            arrays.pop("published"),
            {name.removeprefix(SLOT): values for name, values in arrays.items()},
            facts.count,
            facts.version,
            facts.tokens,
            facts.digests.published,
            vectors,
        )
        if state.digests() != facts.digests:
            raise CorruptError(f"checkpoint {path} is corrupt: its tensors do not match their digests")
        return state

    def _manifest(self) -> list[Entry]:
        path = self.directory / "manifest.json"
        if not path.exists():
            return []
        try:
            listing = json.loads(path.read_text(encoding="utf-8"))
            return [Entry(int(e["fragment"]), int(e["version"]), str(e["file"])) for e in listing["checkpoints"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("manifest %s is corrupt (%s); going by the files beside it", path, error)
        return self._found()

    def _found(self) -> list[Entry]:
        found = [(_NAME.fullmatch(file.name), file.name) for file in self.directory.glob("*.safetensors")]
        return [Entry(int(match[1]), int(match[2]), name) for match, name in found if match is not None]

    def manifest_fault(self) -> str | None:
        """What is wrong with the manifest, if anything is."""
        path = self.directory / "manifest.json"
        try:
            [Entry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["checkpoints"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"manifest {path} is corrupt: {error}; the next checkpoint mends it"
        return None


@dataclass(frozen=True)
class _Facts:
    """What a checkpoint's metadata says of it."""

    run: str
    version: int
    tokens: int
    count: int
    digests: Digests


def _facts(path: Path, metadata: dict[str, str]) -> _Facts:
    """Raises CorruptError where the metadata is not what was written."""
    written = {key: value for key, value in metadata.items() if key != "metadata_digest"}
    if metadata.get("metadata_digest") != _digest(written):
        raise CorruptError(f"checkpoint {path} is corrupt: its metadata does not match its digest")
    try:
        digests = Digests(written["published_digest"], written["master_digest"], written["optimizer_digest"])
        version, tokens, count = (int(written[name]) for name in ("version", "tokens", "count"))
        return _Facts(written["run"], version, tokens, count, digests)
    except (KeyError, ValueError) as error:
        raise CorruptError(f"checkpoint {path} lacks its metadata: {error}") from None


def _digest(metadata: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(metadata, sort_keys=True).encode())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
