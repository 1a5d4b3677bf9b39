"""The outbox: every contribution as it was sent, durable before its first byte leaves.

A site that dies goes on from its last checkpoint and trains the steps since again. What it had contributed of them is
in the outbox: where such a contribution comes up again, the very same bytes are sent, so that the coordinator knows it,
and what is trained now and is not in them stays in the error feedback. So nothing is delivered twice and nothing is
lost, whether or not the device trains to the same bits twice.

One file each, `NUMBER-pFRAGMENT.isthmus`, numbered in the order of their snapshots; kept until no kept checkpoint is
older.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import FormatError
from shared.files import Disk
from shared.wire import open_container
from site_agent.contribution import Address

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """A contribution in the outbox: its number, its fragment in the whole run, and what its header says."""

    number: int
    fragment: int
    base_version: int
    tokens: int
    steps: int


class Outbox:
    """The contributions of one site in one run. Used by one thread at a time for each number."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory, self._disk = directory, disk

    def load(self, addresses: Sequence[Address]) -> list[Record]:
        """What is there, in order, with where each fragment's are addressed to. Files that are damaged, half written,
        or of another run, are dropped."""
        records = []
        for leftover in self._directory.glob(".*"):
            self._disk.remove(leftover)
        for path in sorted(self._directory.glob("*.isthmus")):
            try:
                number, fragment = (int(part) for part in path.stem.split("-p"))
                with open_container(path, addresses[fragment].fragment) as container:
                    header = container.header
                    if (header.kind, header.run) != ("contribution", addresses[fragment].run):
                        raise FormatError("it is no contribution to this run")
                    container.screen()
            except (FormatError, ValueError, IndexError, OSError) as error:
                log.warning("the outbox's %s is of no use: %s", path, error)
                self._disk.remove(path)
                continue
            records.append(Record(number, fragment, header.base_version, header.tokens, header.steps))
        return records

    def put(self, number: int, fragment: int, body: bytes) -> None:
        """Writes a contribution, durably. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._disk.put(self._path(number, fragment), lambda path: _write(path, body))

    def read(self, number: int, fragment: int) -> bytes | None:
        """The bytes of a contribution; None where there is no such one."""
        try:
            return self._path(number, fragment).read_bytes()
        except OSError:
            return None

    def drop(self, number: int, fragment: int) -> None:
        """Forgets a contribution, durably: it was refused. Raises OSError."""
        self._disk.remove(self._path(number, fragment))
        if self._directory.is_dir():
            self._disk.sync_directory(self._directory)

    def prune(self, before: int) -> None:
        """Forgets the contributions with numbers below `before`."""
        for path in self._directory.glob("*.isthmus"):
            if path.stem.split("-")[0] < f"{before:012d}":
                self._disk.remove(path)

    def _path(self, number: int, fragment: int) -> Path:
        return self._directory / f"{number:012d}-p{fragment:04d}.isthmus"


class Replays:
    """The records that come up again, by fragment in order; and the number of the next contribution."""

    def __init__(self) -> None:
        self.next_number = 0
        self._pending: dict[int, list[Record]] = {}

    def restore(self, records: list[Record], state: Mapping[str, Any]) -> None:
        """From a checkpoint: what was pending in it still is, and what was sent after it is as well."""
        pending = {int(p): numbers for p, numbers in state["pending"].items()}
        next_number = int(state["next_number"])
        for record in records:
            if record.number >= next_number or record.number in pending.get(record.fragment, []):
                self._pending.setdefault(record.fragment, []).append(record)
        self.next_number = max([next_number, *(record.number + 1 for record in records)])

    def pending(self, fragment: int) -> list[Record]:
        return self._pending.get(fragment, [])

    def take(self, fragment: int) -> Record | None:
        """The next one that comes up again."""
        pending = self.pending(fragment)
        return pending.pop(0) if pending else None

    def forget(self, fragment: int) -> None:
        self._pending.pop(fragment, None)

    def next_base(self, fragment: int) -> int | None:
        """The version that the next one was made on."""
        pending = self.pending(fragment)
        return pending[0].base_version if pending else None

    def number(self) -> int:
        """A number for a new contribution."""
        self.next_number += 1
        return self.next_number - 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what is pending, by fragment, and the next number."""
        pending = {str(p): [record.number for record in records] for p, records in self._pending.items() if records}
        return {"next_number": self.next_number, "pending": pending}


def _write(path: Path, body: bytes) -> None:
    path.write_bytes(body)
