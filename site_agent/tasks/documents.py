"""Documents out of files: plain text, of which each file is one, and JSONL and Parquet, of which each row is one.

They come in pieces and are never whole in memory, unless a row is. JSONL and Parquet are read by the library
`datasets`, as streams: by its readers and not by `load_dataset`, which asks the network about every call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from site_agent.tasks.corpus import TEXT_SUFFIXES
from site_agent.tasks.files import DataFile
from site_agent.tasks.options import library

JSON_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
PARQUET_SUFFIXES = (".parquet",)
DOCUMENT_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)
PIECE_CHARACTERS = 1 << 16
"""A long text is tokenised in pieces of so many characters and the rest of the line (at most as many again). It is
part of what the tokens are, so another number needs another FORMAT in token_files.py."""

Piece = tuple[str, bool]
"""Text, and whether its document ends with it."""


def pieces(file: DataFile, text_key: str) -> Iterator[Piece]:
    """The documents of `file`. Raises ConfigError where it cannot be read, or a row has no text under `text_key`."""
    if not file.path.stat().st_size:
        return iter(())
    if file.is_a(TEXT_SUFFIXES):
        return _plain(file.path)
    if file.is_a(PARQUET_SUFFIXES):
        return _rows(file.path, "parquet", text_key)
    return _rows(file.path, "json", text_key)


def _plain(path: Path) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8", newline="") as text:
            while piece := text.read(PIECE_CHARACTERS):
                yield piece + text.readline(PIECE_CHARACTERS), False
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"[data] paths: {path} is not UTF-8 ({error.reason}); convert it, or train on bytes, without a tokenizer"
        ) from None
    yield "", True


def _rows(path: Path, kind: str, text_key: str) -> Iterator[Piece]:
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        # The library takes some names for patterns or addresses, and leaves lock files where it may put something.
        suffixes = (*JSON_SUFFIXES, *PARQUET_SUFFIXES)
        plain = Path(scratch) / f"rows{next(suffix for suffix in suffixes if path.name.lower().endswith(suffix))}"
        plain.symlink_to(path.resolve())
        try:
            for number, row in enumerate(_stream(plain, kind, text_key), start=1):
                text = row.get(text_key)
                if not isinstance(text, str):
                    raise ConfigError(
                        f"[data] paths: row {number} of {path} has no text under {text_key!r} (its keys: "
                        f"{', '.join(map(str, row))}); correct the row, or name the key with text_key"
                    )
                yield text, True
        except KeyError as error:
            raise ConfigError(
                f"[data] paths: {path} has no column {text_key!r} (its columns: {error.args[0]}); name the one that "
                "holds the text with text_key"
            ) from None
        except (ConfigError, GeneratorExit):
            raise
        except Exception as error:  # whatever the library and those below it raise of a file that is not what it says
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"[data] paths: {path} cannot be read as {kind}: {said}; correct the file") from error


def _stream(path: Path, kind: str, text_key: str) -> Any:
    """Rows as dicts. Raises KeyError with the columns where there are columns and `text_key` is none of them."""
    library("datasets")
    options = {"streaming": True, "cache_dir": str(path.parent)}
    if kind == "json":
        return library("datasets.io.json").JsonDatasetReader(str(path), **options).read()
    reader = library("datasets.io.parquet").ParquetDatasetReader
    columns = reader(str(path), **options).read().column_names
    if text_key not in columns:
        raise KeyError(", ".join(columns))
    return reader(str(path), columns=[text_key], **options).read()
