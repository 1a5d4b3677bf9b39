from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import ConfigError
from site_agent.tasks import documents, token_files
from site_agent.tasks.corpus import Corpus
from site_agent.tasks.files import find_files
from site_agent.tasks.token_files import SUFFIXES, default_cache, read_tokens
from site_agent.tasks.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny import END, write_tokenizer

pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

TEXTS = ["the quick brown fox", "é", "to be, or not to be\nthat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def read(
    paths: Path,
    tokenizer: Tokenizer | None,
    cache: Path | None = None,
    *,
    text_key: str = "text",
    dtype: str = "uint16",
) -> Corpus:
    where = cache or paths.parent / "cache"
    return read_tokens(str(paths), tokenizer, 300, text_key=text_key, token_dtype=dtype, cache=where)


def ids(corpus: Corpus) -> list[int]:
    return [int(i) for piece in corpus.pieces(0, len(corpus)) for i in piece]


def packed(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    return [i for text in texts for i in (*tokenizer.encode([text])[0], 0)]


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def kept(data: Path) -> list[Path]:
    return sorted((data.parent / "cache").glob("*/*.npy"))


# ---- texts


def test_plain_texts_are_packed_with_the_end_of_text_behind_each(data: Path, tokenizer: Tokenizer) -> None:
    for name, text in zip("abc", TEXTS, strict=True):
        (data / f"{name}.txt").write_text(text)
    (data / "b1.md").write_text("")  # no document
    assert ids(read(data, tokenizer)) == packed(tokenizer, TEXTS)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "jsonl.zst", "json list", "parquet"])
def test_each_row_is_a_document_of_any_kind_of_file(data: Path, tokenizer: Tokenizer, kind: str) -> None:
    rows = [{"id": 1, "text": TEXTS[0]}, {"id": "two", "text": TEXTS[1], "more": {"a": []}}, {"text": TEXTS[2]}]
    path = data / f"odd [name]*.{kind.removesuffix(' list')}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": TEXTS}), path)
    elif kind == "json list":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines(rows)))
    elif kind == "jsonl.zst":
        import zstandard

        path.write_bytes(zstandard.ZstdCompressor().compress(lines(rows)))
    else:
        path.write_bytes(lines(rows))
    assert ids(read(data, tokenizer)) == packed(tokenizer, TEXTS)


def test_the_text_key_names_the_text(data: Path, tokenizer: Tokenizer) -> None:
    (data / "a.jsonl").write_bytes(lines([{"body": "fox", "text": "dog"}]))
    assert ids(read(data, tokenizer, text_key="body")) == packed(tokenizer, ["fox"])
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["dog"])


def test_a_tokenizer_without_an_end_of_text_packs_without_one(data: Path, tmp_path: Path) -> None:
    endless = load_tokenizer(write_tokenizer(tmp_path / "endless", end=None))
    (data / "a.jsonl").write_bytes(lines([{"text": "ab"}, {"text": "cd"}]))
    assert ids(read(data, endless)) == [i for each in endless.encode(["ab", "cd"]) for i in each]


def test_a_long_text_is_read_in_pieces_that_end_with_lines(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 10)
    monkeypatch.setattr(token_files, "BATCH_CHARACTERS", 25)
    (data / "a.txt").write_text("the quick brown\nfox\njumps over\r\n" + 25 * "x" + "\n")
    taken = ["the quick brown\n", "fox\njumps over\r\n", 20 * "x", 5 * "x" + "\n"]
    assert [text for text, ends in documents.pieces(find_files(str(data), SUFFIXES)[0], "text") if not ends] == taken
    assert ids(read(data, tokenizer)) == [*(i for each in tokenizer.encode(taken) for i in each), 0]


# ---- what is kept


def test_the_same_files_give_the_same_tokens_wherever_they_are(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, text in {"b/1.txt": "one", "a.jsonl": '{"text": "two"}\n', "b.md": "three"}.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(text)
    here = read(data, tokenizer)
    shutil.copytree(data, tmp_path / "elsewhere" / "other")
    there = read(tmp_path / "elsewhere" / "other", tokenizer)
    assert ids(here) == ids(there) == packed(tokenizer, ["two", "three", "one"])
    assert here.digest("") == there.digest("")


def test_texts_are_tokenised_once_and_mapped(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "a.txt").write_text(TEXTS[0])
    with caplog.at_level(logging.INFO):
        first = read(data, tokenizer)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["tokenising", "tokenised:"]
    monkeypatch.setattr(token_files, "_encoded", None)
    again = read(data, tokenizer)
    assert ids(again) == ids(first)
    assert not again.parts[0].flags.owndata
    assert again.parts[0].dtype == np.uint16
    assert np.load(kept(data)[0]).tolist() == ids(first)  # an ordinary .npy


def test_a_copy_with_its_times_uses_what_was_kept(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (data / "a.txt").write_text(TEXTS[0])
    cache = tmp_path / "cache"
    read(data, tokenizer)
    shutil.copytree(data, tmp_path / "copy")  # keeps times
    read(tmp_path / "copy", tokenizer, cache=cache)
    assert len(kept(data)) == 1


def test_whatever_decides_the_tokens_makes_another_corpus(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = data / "a.jsonl"
    file.write_bytes(lines([{"text": "fox", "body": "dog"}]))
    about = file.stat()
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["fox"])
    assert ids(read(data, tokenizer, text_key="body")) == packed(tokenizer, ["dog"])
    file.write_bytes(lines([{"text": "cat", "body": "dog"}]))  # as long as before, and with its time
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["cat"])
    other = load_tokenizer(write_tokenizer(tmp_path / "other", 258))
    assert ids(read(data, other)) == packed(other, ["cat"])
    file.rename(data / "b.jsonl")
    read(data, tokenizer)
    assert len(kept(data)) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "no array"])
def test_what_is_damaged_is_made_anew(
    data: Path, tokenizer: Tokenizer, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "a.txt").write_text(TEXTS[0])
    good = ids(read(data, tokenizer))
    path = kept(data)[0]
    content = path.read_bytes()
    spoiled = {
        "empty": b"",
        "cut": content[:-2],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "no array": b"\x80\x04pickle",
    }
    path.write_bytes(spoiled[damage])
    (path.parent / ".left").write_bytes(b"of a process that was killed")
    assert ids(read(data, tokenizer)) == good
    assert kept(data) == [path]
    assert path.read_bytes() == content
    assert not (path.parent / ".left").exists()
    assert "is damaged; its text is tokenised anew" in caplog.text


def test_what_fails_half_way_leaves_nothing_that_counts(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "BATCH_PIECES", 1)
    (data / "a.jsonl").write_bytes(lines([{"text": "fox"}, {"text": "dog"}, {"n": 3}]))
    with pytest.raises(ConfigError, match="row 3"):
        read(data, tokenizer)
    assert kept(data) == []
    (data / "a.jsonl").write_bytes(lines([{"text": "fox"}, {"text": "dog"}, {"text": "cat"}]))
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["fox", "dog", "cat"])


def test_a_vocabulary_past_16_bits_is_kept_in_32(data: Path, tokenizer: Tokenizer) -> None:
    (data / "a.txt").write_text(TEXTS[0])
    large = dataclasses.replace(tokenizer, vocabulary=70_000)
    assert read(data, large).parts[0].dtype == np.uint32


def test_who_else_wants_the_same_text_waits_for_it(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads here, processes in life: the lock does not know the difference."""
    (data / "a.txt").write_text(TEXTS[0])
    asked, both, made = [0], threading.Event(), [0]
    alone, make = token_files._alone, token_files._make

    def asking(lock: Path) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            both.set()
        return alone(lock)

    def making(*given: Any) -> None:
        made[0] += 1
        assert both.wait(30)
        make(*given)

    monkeypatch.setattr(token_files, "_alone", asking)
    monkeypatch.setattr(token_files, "_make", making)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ids(read(data, tokenizer)), range(2))
    assert first == second == packed(tokenizer, TEXTS[:1])
    assert made == [1]


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "isthmus" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "isthmus" / "tokens"


def test_a_cache_that_cannot_be_is_told(data: Path, tokenizer: Tokenizer) -> None:
    (data / "a.txt").write_text(TEXTS[0])
    with pytest.raises(ConfigError, match=r"\[data\] cache: tokens cannot be kept in .*; name another directory"):
        read(data, tokenizer, cache=data / "a.txt")


# ---- ids as they are


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_flat_file_of_ids_is_mapped_as_it_is(data: Path, dtype: str) -> None:
    np.arange(300, dtype=dtype).tofile(data / "a.bin")
    corpus = read(data, None, dtype=dtype)
    assert ids(corpus) == list(range(300))
    assert not corpus.parts[0].flags.owndata
    assert not (data.parent / "cache").exists()


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "i8", ">u4"])
def test_an_array_file_of_any_integers_is_mapped_as_it_is(data: Path, dtype: str) -> None:
    np.save(data / "a.npy", np.arange(200).astype(dtype))
    corpus = read(data, None)
    assert ids(corpus) == list(range(200))
    assert not corpus.parts[0].flags.owndata


def test_ids_and_texts_keep_their_order(data: Path, tokenizer: Tokenizer) -> None:
    (data / "a.txt").write_text("fox")
    np.save(data / "b.npy", np.array([7, 8]))
    (data / "c.txt").write_text("dog")
    (data / "d.bin").write_bytes(b"")
    assert ids(read(data, tokenizer)) == [*packed(tokenizer, ["fox"]), 7, 8, *packed(tokenizer, ["dog"])]


# ---- what will not do


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"n": 1}\n',
            r"row 2 of .*a\.jsonl has no text under 'text' .*text_key",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"row 1 of .*a\.jsonl has no text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": broken\n', r"a\.jsonl cannot be read as json: .*; correct the file"),
        ("a.json.gz", b"no gzip", r"a\.json\.gz cannot be read as json: .*; correct the file"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read as parquet: .*; correct the file"),
        ("a.txt", b"fine \xff\xfe", r"a\.txt is not UTF-8 .*convert it, or train on bytes"),
        ("a.jsonl", b"", r"no tokens in .*name files that are not empty"),
        ("a.bin", b"odd", r"a\.bin is no flat file of uint16 or \.npy"),
        (
            "a.bin",
            b"\xff\xff\xff\xff",
            r"a\.bin has token id 65535, outside .* vocabulary of 300; .*token_dtype",
        ),
        ("a.npy", b"\x80\x04pickle", r"a\.npy is no flat file of uint16 or \.npy"),
        ("a.csv", b"text\na\n", r"a\.csv is of an unknown kind; it should end in one of \.txt, .*\.parquet, \.bin"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_that_will_not_do_are_named_with_a_remedy(
    data: Path, tokenizer: Tokenizer, name: str, content: bytes, said: str
) -> None:
    (data / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        read(data / name, tokenizer, data.parent / "cache")
    assert str(refused.value).startswith("[data] paths: ")
    assert "\n" not in str(refused.value)


def test_a_column_that_is_not_there_is_told_with_those_that_are(data: Path, tokenizer: Tokenizer) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3]}), data / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'text' \(its columns: body, n\); .*text_key"):
        read(data, tokenizer)


@pytest.mark.parametrize("array", [np.zeros((2, 3), "u2"), np.zeros(3, "f4")])
def test_an_array_that_is_no_flat_array_of_integers_is_refused(data: Path, array: Any) -> None:
    np.save(data / "a.npy", array)
    with pytest.raises(ConfigError, match=r"a\.npy holds .*; save token ids as one flat array of integers"):
        read(data, None)


def test_text_without_a_tokenizer_is_refused(data: Path) -> None:
    (data / "a.txt").write_text("fox")
    with pytest.raises(ConfigError, match=r"\[task\] tokenizer: not set, and .*a\.txt is text; name a tokenizer\.json"):
        read(data, None)


def test_without_the_library_rows_say_what_to_install(
    data: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "a.jsonl").write_bytes(lines([{"text": "fox"}]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'datasets cannot be imported .*pip install "isthmus\[hf\]"'):
        read(data, tokenizer)
    (data / "a.jsonl").unlink()
    (data / "a.txt").write_text("fox")
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["fox"])


def test_the_end_of_text_stands_where_it_is_written(data: Path, tokenizer: Tokenizer) -> None:
    (data / "a.txt").write_text(f"fox{END}dog")
    assert ids(read(data, tokenizer)) == packed(tokenizer, ["fox", "dog"])
