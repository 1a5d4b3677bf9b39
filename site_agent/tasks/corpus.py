"""A corpus: one flat array of token ids, however many files it lies in. Bytes of text are tokens too, of 256 kinds.

Files are mapped, not read, so a corpus may be larger than memory. Where there are many small ones they are joined in
memory: a process may have some tens of thousands of mappings, and a page of each is read at once anyway.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import ConfigError
from site_agent.tasks.files import DataFile, find_files

Tokens = npt.NDArray[np.integer[Any]]
Ints = npt.NDArray[np.int64]

BYTES = 256
"""The vocabulary of a text that is not tokenised."""
TEXT_SUFFIXES = (".txt", ".md")
SMALL_FILE = 16 << 20
"""Bytes below which neighbouring files are joined in memory."""
PIECE = 1 << 20
"""Tokens that are looked at at once where all of them are."""
SAMPLES, SAMPLE_TOKENS = 16, 4096


@dataclass(frozen=True)
class Corpus:
    """The ids in `parts`, one array (N,) of integers after the other, all below `vocabulary`; `names` says where each
    part is from, `unit` what an id is."""

    parts: tuple[Tokens, ...]
    names: tuple[str, ...]
    vocabulary: int = BYTES
    unit: str = "bytes of text"

    def __len__(self) -> int:
        return self._bounds[-1]

    @cached_property
    def _bounds(self) -> list[int]:
        """Where each part begins, and the end."""
        return [0, *itertools.accumulate(map(len, self.parts))]

    def pieces(self, start: int, stop: int) -> Iterator[Tokens]:
        """The ids from `start` up to `stop`, a part at a time."""
        part = bisect_right(self._bounds, start) - 1
        while start < stop:
            piece = self.parts[part][start - self._bounds[part] : stop - self._bounds[part]]
            yield piece
            start += len(piece)
            part += 1

    def gather(self, starts: Ints, length: int) -> Ints:
        """The ids from each of `starts`, (B, length). Raises ConfigError where one is outside the vocabulary."""
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            done = 0
            for piece in self.pieces(start, start + length):
                row[done : done + len(piece)] = piece
                done += len(piece)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.vocabulary):
            inside = ((rows >= 0) & (rows < self.vocabulary)).all(axis=1)
            part = bisect_right(self._bounds, int(starts[int(np.argmin(inside))])) - 1
            raise outside(self.names[part], rows, self.vocabulary)
        return rows

    def digest(self, seed: str) -> str:
        """32 hexadecimal digits of `seed` and the ids, whatever files and integers they are kept in. Reads it all."""
        digest = xxhash.xxh3_128(seed.encode())
        for start in range(0, len(self), PIECE):
            for piece in self.pieces(start, min(start + PIECE, len(self))):
                kept = np.ascontiguousarray(piece, dtype="u1" if self.vocabulary == BYTES else "<u4")
                digest.update(kept.data)
        return digest.hexdigest()


def outside(name: str, ids: Tokens, vocabulary: int) -> ConfigError:
    """What to tell of the ids of file `name`, of which some are outside the vocabulary."""
    wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    return ConfigError(
        f"[data] paths: {name} has token id {wrong}, outside the model's vocabulary of {vocabulary}; it was made with "
        "another tokenizer, or its integers are not what token_dtype says"
    )


def check_sample(name: str, ids: Tokens, vocabulary: int) -> None:
    """Raises ConfigError where a sample of `ids` (N,), evenly over them, has one outside the vocabulary."""
    for start in np.linspace(0, max(0, len(ids) - SAMPLE_TOKENS), SAMPLES, dtype=np.int64).tolist():
        sample = ids[start : start + SAMPLE_TOKENS]
        if len(sample) and not (int(sample.min()) >= 0 and int(sample.max()) < vocabulary):
            raise outside(name, sample, vocabulary)


def read_bytes(paths: str | Sequence[str]) -> Corpus:
    """All files at `paths`, byte for byte, one after the other. Raises ConfigError where a path names nothing, or where
    there is no text at all."""
    files = find_files(paths, TEXT_SUFFIXES)
    try:
        parts = list(_joined([(file, mapped(file.path, "u1")) for file in files]))
    except OSError as error:
        raise unreadable(error) from error
    if not parts:
        named = [paths] if isinstance(paths, str) else paths
        raise ConfigError(f"[data] paths: no text in {', '.join(map(repr, named))}; name files that are not empty")
    return Corpus(tuple(ids for _, ids in parts), tuple(name for name, _ in parts))


def mapped(path: Path, dtype: str) -> Tokens:
    """The file as an array (N,). Raises OSError, ValueError (its size is no multiple of the dtype's)."""
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def unreadable(error: OSError) -> ConfigError:
    return ConfigError(f"[data] paths: {error.filename} cannot be read ({error.strerror}); see to its permissions")


def _joined(files: Sequence[tuple[DataFile, Tokens]]) -> Iterator[tuple[str, Tokens]]:
    """Named parts without the empty ones, runs of small ones in one."""
    some = [(file, ids) for file, ids in files if len(ids)]
    for small, run in itertools.groupby(some, key=lambda each: len(each[1]) < SMALL_FILE):
        group = list(run)
        if small and len(group) > 1:
            yield f"{group[0][0].path} and what follows", np.concatenate([ids for _, ids in group])
        else:
            yield from ((str(file.path), ids) for file, ids in group)
