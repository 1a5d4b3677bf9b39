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

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coordinator.outer.step import Digests, OuterState
from shared.errors import CorruptError
from shared.files import DISK, Disk
from shared.fragments import Fragment

log = logging.getLogger(__name__)

SLOT = "slot."
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
        self._disk.put(self.directory / entry.file, lambda beside: save_file(tensors, beside, metadata))
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

    def load(self, entry: Entry, fragment: Fragment) -> OuterState:
        """The state in a checkpoint, verified. Raises CorruptError naming the file."""
        path = self.directory / entry.file
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (OSError, SafetensorError) as error:
            raise CorruptError(f"checkpoint {path} cannot be read: {error}") from None
        if metadata.pop("metadata_digest", None) != _digest(metadata):
            raise CorruptError(f"checkpoint {path} is corrupt: its metadata does not match its digest")
        if any(a.dtype != np.float32 or a.shape != (fragment.size,) for a in arrays.values()):
            raise CorruptError(f"checkpoint {path} does not have the shape of fragment {fragment.index}")
        try:
            state = OuterState(
                fragment,
                arrays.pop("master"),
                arrays.pop("published"),
                {name.removeprefix(SLOT): values for name, values in arrays.items()},
                int(metadata["count"]),
                int(metadata["version"]),
                int(metadata["tokens"]),
                metadata["published_digest"],
            )
            expected = Digests(metadata["published_digest"], metadata["master_digest"], metadata["optimizer_digest"])
        except (KeyError, ValueError) as error:
            raise CorruptError(f"checkpoint {path} lacks its metadata: {error}") from None
        if metadata.get("run") != self.run or state.version != entry.version:
            raise CorruptError(f"checkpoint {path} is of run {metadata.get('run')!r}, not {self.run!r}")
        if state.digests() != expected:
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


def _digest(metadata: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(metadata, sort_keys=True).encode())


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
