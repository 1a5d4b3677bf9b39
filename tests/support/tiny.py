"""Tiny tokenizers and models of Hugging Face's libraries, made on the spot. Nothing here needs a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
SENTENCES = ("the quick brown fox jumps over the lazy dog.\n", "to be, or not to be, that is the question.\n")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "vocab_size": 300,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTRAL: dict[str, Any] = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def write_tokenizer(directory: Path, vocabulary: int = 300, end: str | None = END) -> Path:
    """`directory/tokenizer.json`: a byte-level BPE of at most so many tokens, `end` the first of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end] if end else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES * 20, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def write_config(directory: Path, config: Mapping[str, Any], **changes: Any) -> Path:
    """`directory/config.json`; the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def build(config: Mapping[str, Any]) -> Any:
    """transformers' own model of this config, in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {key: value for key, value in config.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **kind), dtype=torch.float32)
