from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from site_agent.tasks.tokenizer import load_tokenizer
from tests.support.tiny import END, write_tokenizer

pytest.importorskip("tokenizers")


def beside(directory: Path, **config: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def changed(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}, indent=4))


def test_a_file_and_its_directory_are_the_same_tokenizer(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(path)
    assert load_tokenizer(tmp_path).digest == tokenizer.digest
    assert tokenizer.vocabulary == 300
    ids = tokenizer.encode(["the quick brown é fox", ""])
    assert max(ids[0]) < 300
    assert ids[1] == []
    assert tokenizer.decode(ids[0]) == "the quick brown é fox"


def test_special_tokens_in_a_text_are_read_and_none_is_added(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    path = write_tokenizer(tmp_path)
    made = Tokenizer.from_file(str(path))
    made.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    made.enable_truncation(2)
    made.enable_padding(length=50)
    made.save(str(path))
    assert load_tokenizer(path).encode([f"a{END}bcd"])[0][1] == 0
    assert len(load_tokenizer(path).encode([f"a{END}bcd"])[0]) == 5


def test_the_digest_is_of_what_it_does_and_not_of_how_the_file_is_laid_out(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    digest = load_tokenizer(path).digest
    changed(path, truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0})
    assert load_tokenizer(path).digest == digest
    changed(path, normalizer={"type": "Lowercase"})
    assert load_tokenizer(path).digest != digest
    assert load_tokenizer(path).fingerprint() == {"tokenizer": load_tokenizer(path).digest, "end_of_text": END}


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_the_end_of_text_has_a_usual_name(tmp_path: Path, end: str) -> None:
    found = load_tokenizer(write_tokenizer(tmp_path, end=end)).end
    assert found
    assert (found.text, found.id) == (end, 0)


def test_without_a_usual_name_there_is_no_end_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, end=None))
    assert tokenizer.end is None
    assert tokenizer.fingerprint()["end_of_text"] == ""


@pytest.mark.parametrize("written_out", [False, True])
def test_the_end_of_text_is_what_the_config_beside_names(tmp_path: Path, written_out: bool) -> None:
    path = write_tokenizer(tmp_path)
    token = load_tokenizer(path).made.id_to_token(299)
    eos = {"content": token, "lstrip": False} if written_out else token
    beside(tmp_path, eos_token=eos, bos_token=None)
    found = load_tokenizer(path).end
    assert found
    assert (found.text, found.id) == (token, 299)


def test_an_end_of_text_that_is_no_token_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path)
    beside(tmp_path, eos_token="<stop>")
    with pytest.raises(ConfigError, match=r"eos_token of .*tokenizer_config\.json is '<stop>', which tokenizer\.json"):
        load_tokenizer(path)


def test_what_is_no_tokenizer_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*tokenizer\.json; name a .*save_pretrained"):
        load_tokenizer(tmp_path)
    for text in ("no json", "{}", "\xff"):
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"tokenizer\.json is no tokenizer\.json that can be read: "):
            load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'tokenizers cannot be imported .*pip install "isthmus\[hf\]"'):
        load_tokenizer(path)


def test_its_files_are_what_auto_tokenizer_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    for name, content in tokenizer.minimal_files(64).items():
        (tmp_path / "out" / name).write_bytes(content)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"the quick , brown é fox{END}to be"
    assert auto(text).input_ids == tokenizer.encode([text])[0]
    assert auto.decode(auto(text).input_ids) == text
    assert (auto.eos_token, auto.eos_token_id, auto.model_max_length) == (END, 0, 64)


def test_the_files_of_a_directory_keep_its_own_companions(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.files(64) == tokenizer.minimal_files(64)
    beside(tmp_path, eos_token=END, chat_template="…")
    (tmp_path / "merges.txt").write_text("a b")
    (tmp_path / "model.safetensors").write_text("weights")
    files = load_tokenizer(tmp_path).files(64)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "merges.txt"}
    assert "chat_template" in json.loads(files["tokenizer_config.json"])
