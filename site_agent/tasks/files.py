"""The files that a task's `paths` stand for, in an order that is the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError


@dataclass(frozen=True)
class DataFile:
    """A file, and its name without the place of the directory it was found in, with / between the parts.

    The path is the one that was given, not where a link leads: a file's name says what is in it, and stores that keep
    contents under their digests link to files that have no such name.
    """

    path: Path
    name: str

    def is_a(self, suffixes: Sequence[str]) -> bool:
        return self.path.name.lower().endswith(tuple(suffixes))


def find_files(paths: str | Sequence[str], suffixes: Sequence[str]) -> list[DataFile]:
    """All files at `paths`, each once: files as they are named, of directories those that end in one of `suffixes`, by
    their names. Raises ConfigError where a path names nothing."""
    named = [paths] if isinstance(paths, str) else list(paths)
    if not named:
        kinds = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise ConfigError(f"[data] paths: not set; name a file, a directory of {kinds}, or a pattern")
    found: dict[Path, DataFile] = {}
    for name in named:
        for file in _files(name, suffixes):
            found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _files(name: str, suffixes: Sequence[str]) -> list[DataFile]:
    path = Path(name).expanduser()
    if path.exists():
        found = [path]
    elif any(sign in name for sign in "*?["):
        try:
            found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        except ValueError as error:
            raise ConfigError(f"[data] paths: {name!r} is no pattern ({error}); correct it") from error
    else:
        found = []
    if not found:
        raise ConfigError(f"[data] paths: no file, directory or pattern {name!r} in {Path.cwd()}; correct the path")
    files = [file for place in found for file in (_in_directory(place, suffixes) if place.is_dir() else [_file(place)])]
    if not files:
        kinds = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise ConfigError(f"[data] paths: no {kinds} in {name!r} (from {Path.cwd()}); name one that has some")
    return files


def _file(path: Path) -> DataFile:
    return DataFile(path.absolute(), path.name)


def _in_directory(directory: Path, suffixes: Sequence[str]) -> list[DataFile]:
    """Sorted by the path inside the directory: the directory's own place must not change the order."""
    inside = (DataFile(file.absolute(), file.relative_to(directory).as_posix()) for file in directory.rglob("*"))
    return sorted((file for file in inside if file.is_a(suffixes) and file.path.is_file()), key=lambda file: file.name)
