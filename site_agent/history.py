"""The history: the deltas that this site has taken up since its oldest kept checkpoint.

A site that dies trains the steps since its last checkpoint again, and each contribution that comes up again must come
up on the version that it was made on: made on another, what is trained now and what was sent then have nothing to do
with each other, and their difference is no error feedback but damage. The coordinator keeps its deltas for so many
versions only, whatever time a site takes to come back.

One file each, `pFRAGMENT-vVERSION.isthmus`: the delta that leads to that version, as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shared.files import Disk


class History:
    """The deltas of one site in one run. Used by one thread at a time for each fragment."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory, self._disk = directory, disk

    def put(self, fragment: int, version: int, data: bytes) -> None:
        """Writes the delta to `version`, durably. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._disk.put(self._path(fragment, version), lambda path: _write(path, data))

    def read(self, fragment: int, version: int) -> bytes | None:
        """The delta to `version`; None where there is none."""
        try:
            return self._path(fragment, version).read_bytes()
        except OSError:
            return None

    def drop(self, fragment: int, version: int) -> None:
        """Forgets a delta: it is damaged. Raises OSError."""
        self._disk.remove(self._path(fragment, version))

    def covers(self, fragment: int, after: int, upto: int) -> bool:
        """Whether every delta is there that leads from version `after` to version `upto`."""
        return all(self._path(fragment, version).exists() for version in range(after + 1, upto + 1))

    def prune(self, oldest: Mapping[int, int]) -> None:
        """Forgets what leads up to the version of each fragment that is needed no more."""
        for fragment, version in oldest.items():
            kept = self._path(fragment, version + 1).name
            for path in self._directory.glob(f"p{fragment:04d}-v*.isthmus"):
                if path.name < kept:
                    self._disk.remove(path)

    def clear(self) -> None:
        """Forgets everything: there is nothing to go back to."""
        self._disk.remove(self._directory)

    def _path(self, fragment: int, version: int) -> Path:
        return self._directory / f"p{fragment:04d}-v{version:012d}.isthmus"


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
