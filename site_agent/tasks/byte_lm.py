"""`byte-lm`: a small Llama on bytes, or on the tokens of a tokenizer. Any text file will do.

Bytes cost longer sequences than subwords, in exchange for a vocabulary of 256 (the embedding table of
a small model stays small), no tokenizer to train or to ship, and a loss that means the same on every text: nats per
byte. With `tokenizer`, all that counts bytes counts its tokens.

What a run has trained opens in Hugging Face transformers, vLLM or llama.cpp with the files that `hf_files` writes
(`llama.py` says why).

The text is opened at the first use, not in `__init__`: a coordinator builds the same task for its
initial weights and has no text. The tokenizer it has: it decides how large the model is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from site_agent.tasks.corpus import BYTES, read_bytes
from site_agent.tasks.llama import INIT_STD, NORM_EPS, ROPE_THETA, Llama, Shape
from site_agent.tasks.options import Partition, validated
from site_agent.tasks.sampling import continued, continued_text
from site_agent.tasks.text import Text, cut
from site_agent.tasks.token_files import read_tokens
from site_agent.tasks.token_loss import token_loss
from site_agent.tasks.tokenizer import Tokenizer, load_tokenizer
from site_agent.tasks.windowed import WindowTask


class ByteLMOptions(BaseModel):
    """Keys of the `[task]` and `[data]` tables. Each description completes "…; give …"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    paths: str | list[str] = Field([], description="a file, a directory, a pattern, or a list of them")
    context: int = Field(128, ge=1, le=2**20, description="bytes the model sees at once, a whole number from 1")
    width: int = Field(128, ge=2, le=2**16, description="a whole number from 2, a multiple of 2 * heads")
    layers: int = Field(4, ge=1, le=1024, description="a whole number from 1")
    heads: int = Field(4, ge=1, le=2**15, description="a whole number from 1, with width a multiple of 2 * heads")
    hidden: int | None = Field(
        None, ge=1, le=2**20, description="the MLP's inner width, a whole number from 1 (absent: 8/3 of width)"
    )
    tie_embeddings: bool = Field(True, description="true or false")
    tokenizer: str = Field("", description='a tokenizer.json, or a directory that has one (absent or "": bytes)')
    held_out: float = Field(0.05, gt=0, lt=1, description="the held-out share of the text, between 0 and 1")
    block_bytes: int = Field(16_384, ge=2, le=2**40, description="a whole number above context")
    partition: Partition = Field("sharded", description='"sharded", "contiguous", "local" or "leased"')
    eval_batches: int = Field(32, ge=1, le=10**6, description="the most batches in an evaluation, from 1")

    @model_validator(mode="after")
    def _combinations(self) -> ByteLMOptions:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"[task] width: {self.width} cannot be cut into {self.heads} heads of an even width; "
                f"give a multiple of {2 * self.heads}, or other heads"
            )
        if self.block_bytes <= self.context:
            raise ValueError(
                f"[task] block_bytes: {self.block_bytes} holds no window of context + 1 = {self.context + 1} "
                f"{'tokens' if self.tokenizer else 'bytes'}; give {self.context + 1} or more, or a smaller context"
            )
        return self

    def mlp_width(self) -> int:
        """`hidden`, or 8/3 of the width (as many weights as a plain MLP of 4 widths) in steps of 32."""
        return self.hidden or math.ceil(8 * self.width / 3 / 32) * 32


class ByteLM(WindowTask[ByteLMOptions]):
    """Next-byte or next-token prediction on text files. Batches are (B, T+1) int64, T the context."""

    path_options = ("paths", "tokenizer")

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for unknown keys and for values that will not do."""
        super().__init__(options)
        self.settings = validated(ByteLMOptions, self.options, "byte-lm")

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where the model reads bytes. Raises ConfigError, also where the library is not installed."""
        return load_tokenizer(Path(self.settings.tokenizer)) if self.settings.tokenizer else None

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.vocabulary if self.tokenizer else BYTES

    def build_model(self) -> nn.Module:
        """fp32 weights, N(0, 0.02²); the projections back into the residual stream 1/√(2·layers) of that."""
        s = self.settings
        return Llama(
            Shape(self.vocabulary, s.width, s.layers, s.heads, s.mlp_width(), s.context, tied=s.tie_embeddings)
        )

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Mean cross entropy in nats per byte or token, and the B·T of them that it counts."""
        batch = batch.to(next(model.parameters()).device, non_blocking=True)
        targets = batch[:, 1:]  # (B, T)
        return token_loss(model(batch[:, :-1]), targets), targets.numel()

    def fingerprint(self) -> Mapping[str, str]:
        """The tokenizer's."""
        return self.tokenizer.fingerprint() if self.tokenizer else {}

    def generate(self, model: nn.Module, prompt: str, tokens: int, seed: int) -> str:
        """`prompt` and `tokens` further bytes or tokens, as text; bytes that are no UTF-8 become U+FFFD."""
        context = self.settings.context
        if self.tokenizer:
            return continued_text(self.tokenizer, model, model, prompt, tokens, context, seed)
        start = prompt.encode("utf-8", errors="replace") or b"\n"
        written = bytes(continued(model, model, list(start), tokens, context, seed))
        return (written if prompt else written[1:]).decode("utf-8", errors="replace")

    def hf_files(self) -> dict[str, bytes]:
        """`config.json` of the LlamaForCausalLM that has these weights, and the tokenizer's files."""
        s, tokenizer = self.settings, self.tokenizer
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": s.width,
            "intermediate_size": s.mlp_width(),
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.heads,
            "max_position_embeddings": s.context,
            "rope_theta": ROPE_THETA,
            "rms_norm_eps": NORM_EPS,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": s.tie_embeddings,
            "initializer_range": INIT_STD,
            "torch_dtype": "float32",
            "bos_token_id": tokenizer.beginning.id if tokenizer and tokenizer.beginning else None,
            "eos_token_id": tokenizer.end.id if tokenizer and tokenizer.end else None,
        }
        files = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
        return files | (tokenizer.minimal_files(s.context) if tokenizer else {})

    @cached_property
    def text(self) -> Text:
        s = self.settings
        corpus = read_tokens(s.paths, self.tokenizer, self.vocabulary) if self.tokenizer else read_bytes(s.paths)
        return cut(corpus, s.context, s.block_bytes, s.held_out)
