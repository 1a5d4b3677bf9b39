"""A tokenizer: the `tokenizer.json` of the `tokenizers` library, and what lies beside it.

The file is used as it is, and not through transformers' tokenizer classes, which rebuild parts of it by their own rules
in some versions: sites must get the same ids whatever else they have installed. Special tokens that stand in a text are
read as such, as AutoTokenizer does; a tokenizer's own template (a beginning-of-text token, say) is not applied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import ConfigError
from site_agent.tasks.options import library

END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[EOS]")
BEGINNING_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]")
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files beside `tokenizer.json` that transformers looks for."""


@dataclass(frozen=True)
class Special:
    """A token with a meaning of its own."""

    text: str
    id: int


@dataclass(frozen=True)
class Tokenizer:
    """`vocabulary`: one more than its greatest id. `digest`: of what it does, 32 hexadecimal digits."""

    path: Path
    vocabulary: int
    digest: str
    beginning: Special | None
    end: Special | None
    made: Any
    """A `tokenizers.Tokenizer`."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, by all cores."""
        return [encoding.ids for encoding in self.made.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.made.decode(list(ids), skip_special_tokens=False)
        return text

    def fingerprint(self) -> dict[str, str]:
        """What of a tokenizer must be the same at every site."""
        return {"tokenizer": self.digest, "end_of_text": self.end.text if self.end else ""}

    def minimal_files(self, context: int) -> dict[str, bytes]:
        """`tokenizer.json`, and the `tokenizer_config.json` that makes AutoTokenizer read it as it is."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **({"bos_token": self.beginning.text} if self.beginning else {}),
            **({"eos_token": self.end.text} if self.end else {}),
        }
        written = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return {"tokenizer.json": self.path.read_bytes(), "tokenizer_config.json": written}

    def files(self, context: int) -> dict[str, bytes]:
        """The same, with what the tokenizer's own directory has of its companions."""
        beside = {name: self.path.parent / name for name in COMPANIONS}
        return self.minimal_files(context) | {
            name: file.read_bytes() for name, file in beside.items() if file.is_file()
        }


def load_tokenizer(place: Path) -> Tokenizer:
    """The tokenizer in the file or directory `place`. Raises ConfigError where there is none that can be used."""
    path = place / "tokenizer.json" if place.is_dir() else place
    if not path.is_file():
        raise ConfigError(
            f"[task] tokenizer: no file {path}; name a tokenizer.json of the tokenizers library, or a directory that "
            "has one (AutoTokenizer.from_pretrained(…).save_pretrained(DIRECTORY) writes it)"
        )
    try:
        text = path.read_bytes().decode("utf-8")
        said = json.loads(text)
        made = library("tokenizers").Tokenizer.from_str(text)
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigError(f"[task] tokenizer: {path} is no tokenizer.json that can be read: {error}") from None
    made.no_truncation()
    made.no_padding()
    ids: dict[str, int] = made.get_vocab(with_added_tokens=True)
    if not ids:
        raise ConfigError(f"[task] tokenizer: {path} has no tokens; train it before it is used")
    config = _beside(path)
    return Tokenizer(
        path=path,
        vocabulary=max(ids.values()) + 1,
        digest=_digest(said),
        beginning=_special(path, config, "bos_token", BEGINNING_NAMES, ids),
        end=_special(path, config, "eos_token", END_NAMES, ids),
        made=made,
    )


def _digest(said: Mapping[str, Any]) -> str:
    """Of the file as canonical JSON, without what is not used of it."""
    used = {key: value for key, value in said.items() if key not in ("truncation", "padding")}
    return xxhash.xxh3_128(json.dumps(used, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _beside(path: Path) -> Mapping[str, Any]:
    """`tokenizer_config.json` beside the tokenizer; empty where there is none."""
    beside = path.parent / "tokenizer_config.json"
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"[task] tokenizer: {beside} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _special(
    path: Path, config: Mapping[str, Any], key: str, names: Sequence[str], ids: Mapping[str, int]
) -> Special | None:
    """The token that the config names under `key`, else the first of the usual `names` that there is."""
    named = config.get(key)
    if isinstance(named, dict):  # an AddedToken, written out
        named = named.get("content")
    if isinstance(named, str) and named:
        if named not in ids:
            raise ConfigError(
                f"[task] tokenizer: {key} of {path.parent / 'tokenizer_config.json'} is {named!r}, which {path.name} "
                "does not have; correct one of the two"
            )
        return Special(named, ids[named])
    return next((Special(name, ids[name]) for name in names if name in ids), None)
