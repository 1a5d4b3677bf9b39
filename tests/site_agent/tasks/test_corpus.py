"""Corpora: files as one flat array of ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import ConfigError
from site_agent.tasks import corpus as corpora
from site_agent.tasks.corpus import Corpus, check_sample, read_bytes


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def content(corpus: Corpus) -> bytes:
    return b"".join(piece.tobytes() for piece in corpus.pieces(0, len(corpus)))


def read(paths: str | list[str]) -> bytes:
    return content(read_bytes(paths))


def ids(*values: int, dtype: str = "u2") -> np.ndarray:
    return np.array(values, dtype=dtype)


# ---- bytes


def test_a_directory_is_read_recursively_in_the_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a" / "z.MD", "Z")
    write(tmp_path / "c.py", "no text")
    assert read(str(tmp_path)) == b"ZB"


def test_a_list_keeps_its_order_and_reads_no_file_twice(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.txt", "1"), write(tmp_path / "two.txt", "2")
    assert read([str(two), str(one), str(tmp_path), str(tmp_path / "*.txt")]) == b"21"


def test_patterns_and_relative_paths_start_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "plays" / "x.txt", "X")
    write(tmp_path / "plays" / "deep" / "y.log", "Y")
    monkeypatch.chdir(tmp_path)
    assert read("plays/x.txt") == b"X"
    assert read(["plays/*.txt", "**/*.log"]) == b"XY"
    assert read(str(tmp_path / "pl*")) == b"X"


def test_the_place_of_a_directory_does_not_change_the_corpus(tmp_path: Path) -> None:
    for root in (tmp_path / "site-a", tmp_path / "elsewhere" / "b"):
        for name in ("a-b/1.txt", "a/2.txt", "a.txt", "Z.txt"):
            write(root / name, name)
    there, here = read_bytes(str(tmp_path / "site-a")), read_bytes(str(tmp_path / "elsewhere" / "b"))
    assert content(there) == content(here)


def test_an_empty_file_among_others_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "text")
    assert read(str(tmp_path)) == b"text"


def test_one_file_is_mapped_and_never_written(tmp_path: Path) -> None:
    corpus = read_bytes(str(write(tmp_path / "a.txt", "text")))
    assert not corpus.parts[0].flags.owndata
    assert not corpus.parts[0].flags.writeable


@pytest.mark.parametrize("paths", ["missing.txt", "*.txt", "full", "empty.txt", [], "a**"])
def test_paths_without_text_are_named_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str | list[str]
) -> None:
    write(tmp_path / "full" / "of.py", "code")
    write(tmp_path / "empty.txt" / "also" / "not.bin", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^\[data\] paths: .*; (name|correct) [^\n]+$") as refused:
        read_bytes(paths)
    assert not isinstance(paths, str) or paths in str(refused.value)


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"empty\.txt.*not empty"):
        read_bytes(str(write(tmp_path / "empty.txt", "")))


def test_large_files_are_mapped_and_small_neighbours_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have so many mappings and no more."""
    monkeypatch.setattr(corpora, "SMALL_FILE", 4)
    for name, text in {"1": "a", "2": "", "3": "bc", "4": "large", "5": "larger", "6": "d"}.items():
        write(tmp_path / f"{name}.txt", text)
    corpus = read_bytes(str(tmp_path))
    assert [part.tobytes() for part in corpus.parts] == [b"abc", b"large", b"larger", b"d"]
    assert [part.flags.owndata for part in corpus.parts] == [True, False, False, False]
    assert content(corpus) == b"abclargelargerd"


def test_a_file_whose_name_is_a_link_to_one_without_is_still_of_its_kind(tmp_path: Path) -> None:
    """Stores that keep contents by digest link to them."""
    write(tmp_path / "blobs" / "1f2e", "text")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / "blobs" / "1f2e")
    assert read(str(tmp_path / "data")) == b"text"


# ---- ids in several parts


PARTS = Corpus((ids(1, 2, 3), ids(4), ids(5, 6, dtype="u4"), ids(7, dtype="i8")), ("a", "b", "c", "d"), 8, "tokens")


@pytest.mark.parametrize("length", [1, 2, 4, 7])
def test_a_window_may_lie_in_any_number_of_parts(length: int) -> None:
    starts = np.arange(8 - length)
    rows = PARTS.gather(starts, length)
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(1 + start, 1 + start + length)) for start in starts]
    assert [i for piece in PARTS.pieces(2, 5) for i in piece] == [3, 4, 5]


def test_the_digest_is_of_the_ids_and_not_of_how_they_are_kept() -> None:
    joined = Corpus((np.arange(1, 8, dtype="i4"),), ("one",), 8, "tokens")
    assert joined.digest("") == PARTS.digest("")
    assert joined.digest("x") != PARTS.digest("")
    assert Corpus((np.arange(7, dtype="i4"),), ("one",), 8, "tokens").digest("") != PARTS.digest("")


@pytest.mark.parametrize("wrong", [8, -1])
def test_an_id_outside_the_vocabulary_is_told_when_it_is_gathered(wrong: int) -> None:
    corpus = Corpus((ids(1, 2), ids(3, wrong, dtype="i4")), ("good.npy", "bad.npy"), 8, "tokens")
    assert corpus.gather(np.array([0, 1]), 2).tolist() == [[1, 2], [2, 3]]
    with pytest.raises(ConfigError, match=rf"bad\.npy has token id {wrong}, outside .* of 8; "):
        corpus.gather(np.array([0, 2]), 2)


@pytest.mark.parametrize("at", [0, 500_000, 999_999])
def test_a_sample_finds_ids_of_another_vocabulary(at: int) -> None:
    tokens = np.zeros(1_000_000, dtype="u2")
    check_sample("a.bin", tokens, 100)
    tokens[max(0, at - 70_000) : at + 70_000] = 100
    with pytest.raises(ConfigError, match=r"a\.bin has token id 100, outside .* token_dtype"):
        check_sample("a.bin", tokens, 100)
