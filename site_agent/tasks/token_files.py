"""Corpora of tokens: files that hold ids already, and texts that are tokenised once and kept.

What is tokenised is kept in a directory of its own under the cache, named by a digest of all that decides it. The
file in it is an ordinary flat `.npy` whose name is the digest of its ids: it has its name only when it is whole, and
what does not match its name is made anew. Documents are packed end to end, each with the end-of-text token behind it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from shared.errors import ConfigError
from shared.files import DISK
from site_agent.tasks.corpus import PIECE, Corpus, Tokens, check_sample, mapped, unreadable
from site_agent.tasks.documents import DOCUMENT_SUFFIXES, Piece, pieces
from site_agent.tasks.files import DataFile, find_files
from site_agent.tasks.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RAW_SUFFIXES = (".bin", ".npy")
SUFFIXES = (*DOCUMENT_SUFFIXES, *RAW_SUFFIXES)
FORMAT = 1
"""Of what is kept; another number and nothing that is there is used any more."""
BATCH_CHARACTERS, BATCH_PIECES = 1 << 22, 4096
"""Tokenised at once, by all cores."""
ENDS = 1 << 16
"""Bytes at each end of a file that count for whether it is the same: copies may keep sizes and times."""
REPORT_SECONDS = 30.0


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus" / "tokens"


def read_tokens(
    paths: str | Sequence[str],
    tokenizer: Tokenizer | None,
    vocabulary: int,
    *,
    text_key: str = "text",
    token_dtype: str = "uint16",
    cache: Path | None = None,
) -> Corpus:
    """The tokens of all files at `paths`, in their order. Raises ConfigError where they cannot be had: an unknown kind
    of file, texts without a tokenizer, ids outside the vocabulary, nothing at all."""
    files = find_files(paths, SUFFIXES)
    for file in files:
        if not file.is_a(SUFFIXES):
            raise ConfigError(
                f"[data] paths: {file.path} is of an unknown kind; it should end in one of {', '.join(SUFFIXES)}"
            )
    parts: list[tuple[str, Tokens]] = []
    try:
        for raw, run in itertools.groupby(files, key=lambda file: file.is_a(RAW_SUFFIXES)):
            group = list(run)
            if raw:
                parts += [(str(file.path), _raw(file.path, token_dtype)) for file in group]
            elif tokenizer is None:
                raise ConfigError(
                    f"[task] tokenizer: not set, and {group[0].path} is text; name a tokenizer.json, or give data that "
                    f"is tokenised already ({', '.join(RAW_SUFFIXES)})"
                )
            else:
                parts.append(_tokenised(group, tokenizer, text_key, cache or default_cache()))
    except OSError as error:
        raise unreadable(error) from error
    parts = [(name, ids) for name, ids in parts if len(ids)]
    if not parts:
        named = [paths] if isinstance(paths, str) else paths
        raise ConfigError(f"[data] paths: no tokens in {', '.join(map(repr, named))}; name files that are not empty")
    for name, ids in parts:
        check_sample(name, ids, vocabulary)
    return Corpus(tuple(ids for _, ids in parts), tuple(name for name, _ in parts), vocabulary, "tokens")


def _raw(path: Path, token_dtype: str) -> Tokens:
    """A file of ids, mapped as it is. Raises ConfigError where it holds something else, OSError."""
    try:
        if path.suffix.lower() == ".bin":
            return mapped(path, np.dtype(token_dtype).newbyteorder("<").str)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"[data] paths: {path} is no flat file of {token_dtype} or .npy: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"[data] paths: {path} holds {array.dtype} in the shape {array.shape}; save token ids as one flat array of "
            "integers"
        )
    return np.asarray(array)


# ---- what is tokenised, and kept


def _tokenised(files: Sequence[DataFile], tokenizer: Tokenizer, text_key: str, cache: Path) -> tuple[str, Tokens]:
    """Where the tokens of `files` are kept, and they; what is not there yet is made, by one process of this machine
    while the others wait."""
    directory = cache / _key(files, tokenizer, text_key)
    if (kept := _kept(directory)) is not None:
        return kept
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory / "lock"):
            if (kept := _kept(directory)) is not None:
                return kept
            for left in directory.glob(".*"):  # by a process that was killed
                left.unlink()
            _make(directory, files, tokenizer, text_key)
    except OSError as error:
        raise ConfigError(
            f"[data] cache: tokens cannot be kept in {cache} ({error.strerror or error}); name another directory, or "
            "make room there"
        ) from error
    kept = _kept(directory)
    if kept is None:
        raise ConfigError(f"[data] cache: what was written to {directory} is not what is there; see to that disk")
    return kept


def _key(files: Sequence[DataFile], tokenizer: Tokenizer, text_key: str) -> str:
    """A digest of all that decides the tokens; of the files' contents only the ends."""
    described = [[file.name, *_state(file.path)] for file in files]
    said = json.dumps([FORMAT, described, text_key, tokenizer.fingerprint()])
    return xxhash.xxh3_128(said.encode()).hexdigest()


def _state(path: Path) -> tuple[int, int, str]:
    about = path.stat()
    with path.open("rb") as file:
        ends = file.read(ENDS)
        file.seek(max(0, about.st_size - ENDS))
        ends += file.read(ENDS)
    return about.st_size, about.st_mtime_ns, xxhash.xxh3_128(ends).hexdigest()


def _kept(directory: Path) -> tuple[str, Tokens] | None:
    """The tokens in `directory`, whole; files that are not are removed."""
    for path in sorted(directory.glob("*.npy")):
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False) if path.stat().st_size else None
        except (OSError, ValueError):
            ids = None
        if (
            ids is not None
            and ids.ndim == 1
            and _digest([ids[at : at + PIECE] for at in range(0, len(ids), PIECE)]) == path.stem
        ):
            return str(path), np.asarray(ids)
        log.warning("%s is damaged; its text is tokenised anew", path)
        path.unlink(missing_ok=True)
    return None


def _digest(arrays: Iterable[Tokens]) -> str:
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """No other process of this machine is in here with the same `lock`; where the file system knows no locks, one may
    be, which costs work and nothing else."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process tokenises the same text; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.debug("no locks in %s", lock.parent)
        yield


def _make(directory: Path, files: Sequence[DataFile], tokenizer: Tokenizer, text_key: str) -> None:
    size, began = sum(file.path.stat().st_size for file in files), time.monotonic()
    log.info("tokenising %d files (%.1f MB) with %s into %s", len(files), size / 1e6, tokenizer.path, directory)
    dtype = np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")
    count = 0

    def fill(beside: Path) -> str:
        nonlocal count
        digest = xxhash.xxh3_128()
        with beside.open("wb") as out:
            _header(out, dtype, 0)
            for ids in _batches(files, tokenizer, text_key):
                array = np.fromiter(itertools.chain.from_iterable(ids), dtype=dtype)
                digest.update(array.data)
                out.write(array.data)
                count += len(array)
            _header(out, dtype, count)
        return f"{digest.hexdigest()}.npy"

    DISK.put_as(directory, fill)
    log.info("tokenised: %d tokens in %.0f s", count, time.monotonic() - began)


def _header(out: BinaryIO, dtype: np.dtype[np.integer], count: int) -> None:
    """The head of a flat .npy, at the file's beginning. NumPy leaves room in it for any count: its length is fixed."""
    out.seek(0)
    np.lib.format.write_array_header_1_0(
        out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )


def _batches(files: Sequence[DataFile], tokenizer: Tokenizer, text_key: str) -> Iterator[list[list[int]]]:
    """The ids of all documents, a few million characters at a time; progress is logged."""
    batch: list[Piece] = []
    characters = tokens = 0
    reported = time.monotonic()
    for index, file in enumerate(files):
        for piece in pieces(file, text_key):
            batch.append(piece)
            characters += len(piece[0])
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_PIECES:
                ids = _encoded(batch, tokenizer)
                tokens += sum(map(len, ids))
                yield ids
                batch, characters = [], 0
            if time.monotonic() - reported > REPORT_SECONDS:
                log.info("file %d of %d, %d tokens so far", index + 1, len(files), tokens)
                reported = time.monotonic()
    if batch:
        yield _encoded(batch, tokenizer)


def _encoded(batch: Sequence[Piece], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each piece, with the end of text behind those that end a document."""
    end = [tokenizer.end.id] if tokenizer.end else []
    encoded = tokenizer.encode([text for text, _ in batch])
    return [ids + end if ends else ids for ids, (_, ends) in zip(encoded, batch, strict=True)]
