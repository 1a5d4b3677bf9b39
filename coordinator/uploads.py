"""Uploads in progress: where their bytes are spooled and which parts are here.

Bounded per site, so that nobody fills the disk with uploads that never commit. The id is derived from what
is uploaded, so a repeated open finds the upload that is already there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from shared.files import DISK, Disk
from shared.protocol import PART_BYTES, SMALLEST_PART_BYTES, OpenUpload

IDLE_SECONDS = 3600.0
"""An upload that no byte has reached for this long is dropped."""


def upload_id(opening: OpenUpload) -> str:
    """32 hexadecimal digits that are the same for the same contribution, whoever asks how often."""
    facts = (opening.run, opening.site, opening.fragment, opening.base_version, opening.size, opening.digest)
    return sha256("\n".join(str(fact) for fact in facts).encode()).hexdigest()[:32]


@dataclass
class SpooledUpload:
    """One upload. Under its `lock` parts are written and the whole is committed, one at a time, so that what was
    screened is what is merged."""

    id: str
    opening: OpenUpload
    path: Path
    disk: Disk
    part_bytes: int
    touched: float
    parts: set[int] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def part_count(self) -> int:
        return -(-self.opening.size // self.part_bytes)

    def part_range(self, part: int) -> tuple[int, int]:
        """(offset, size) of a part in bytes."""
        offset = part * self.part_bytes
        return offset, min(self.part_bytes, self.opening.size - offset)

    @property
    def complete(self) -> bool:
        return len(self.parts) == self.part_count

    def cut_finer(self, part_bytes: int) -> None:
        """Parts of `part_bytes` from now on where that is less; what is here stays here."""
        pieces = self.part_bytes // part_bytes
        if pieces > 1:
            self.parts = {pieces * part + n for part in self.parts for n in range(pieces)}
            self.part_bytes = part_bytes
            self.parts &= set(range(self.part_count))

    def write(self, offset: int, pieces: Sequence[bytes]) -> None:
        """Writes `pieces`, one after the other, at their place; the commit syncs them. Raises OSError."""
        self.disk.write_at(self.path, offset, pieces)


class Uploads:
    """The uploads in progress, by id; at most `per_site` of each site, the longest idle one giving way."""

    def __init__(self, directory: Path, per_site: int, disk: Disk = DISK) -> None:
        self.directory, self.per_site, self._disk = directory, per_site, disk
        self.part_bytes = PART_BYTES
        self._open: dict[str, SpooledUpload] = {}

    def get(self, id_: str) -> SpooledUpload | None:
        return self._open.get(id_)

    def open(self, id_: str, opening: OpenUpload, now: float) -> SpooledUpload:
        upload = self._open.get(id_)
        if upload is None:
            self._drop_idle(opening.site, now)
            upload = SpooledUpload(id_, opening, self.directory / id_, self._disk, self.part_bytes, now)
            self._open[id_] = upload
        upload.cut_finer(_halved(self.part_bytes, opening.part_size))
        upload.opening = opening  # the newest session of the site may go on with what an earlier one began
        upload.touched = now
        return upload

    def close(self, upload: SpooledUpload) -> None:
        """Forgets the upload and removes what is left of its spool."""
        self._open.pop(upload.id, None)
        self._disk.remove(upload.path)

    def _drop_idle(self, site: str, now: float) -> None:
        for upload in [u for u in self._open.values() if now - u.touched > IDLE_SECONDS and not u.lock.locked()]:
            self.close(upload)
        mine = [u for u in self._open.values() if u.opening.site == site and not u.lock.locked()]
        for upload in sorted(mine, key=lambda u: u.touched)[: max(0, len(mine) - self.per_site + 1)]:
            self.close(upload)


def _halved(largest: int, wanted: int) -> int:
    """The size of parts nearest to `wanted`: `largest`, halved as often as it takes and as parts may be."""
    size = largest
    while size > wanted and size % 2 == 0 and size // 2 >= min(largest, SMALLEST_PART_BYTES):
        size //= 2
    return size
