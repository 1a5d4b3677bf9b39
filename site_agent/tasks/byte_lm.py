"""`byte-lm`: a small Llama on bytes. Any text file will do: there is no tokenizer to train or to ship.

Bytes cost longer sequences than subwords, in exchange for a vocabulary of 256 (the embedding table of
a small model stays small) and a loss that means the same on every text: nats per byte.

The model is LlamaForCausalLM to the letter: its parameter names, its rotate-half rotary positions, its
norms. What a run has trained therefore opens in Hugging Face transformers, vLLM or llama.cpp with the
`config.json` that `hf_files` writes, and no conversion. The price is that q, k and v are three
matrices, where one fused matrix would be a little faster.

The text is opened at the first use, not in `__init__`: a coordinator builds the same task for its
initial weights and has no text.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.task import BatchStream, Manifest, Shard, Task
from site_agent.tasks.text import Partition, Text, WindowStream, open_text

VOCABULARY = 256
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
INIT_STD = 0.02
TEMPERATURE = 0.8
TOP_K = 40


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
                f"[task] block_bytes: {self.block_bytes} holds no window of context + 1 = {self.context + 1} bytes; "
                f"give {self.context + 1} or more, or a smaller context"
            )
        return self

    def mlp_width(self) -> int:
        """`hidden`, or 8/3 of the width (as many weights as a plain MLP of 4 widths) in steps of 32."""
        return self.hidden or math.ceil(8 * self.width / 3 / 32) * 32


class ByteLM(Task):
    """Next-byte prediction on text files. Batches are (B, T+1) int64 bytes, T the context."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ConfigError for unknown keys and for values that will not do."""
        super().__init__(options)
        try:
            self.settings = ByteLMOptions.model_validate(self.options)
        except ValidationError as error:
            raise ConfigError(_sentence(error)) from None
        self._text: Text | None = None

    def build_model(self) -> nn.Module:
        """fp32 weights, N(0, 0.02²); the projections back into the residual stream 1/√(2·layers) of that."""
        return ByteLlama(self.settings)

    def train_batches(self, shard: Shard, batch_size: int) -> BatchStream:
        """(B, T+1) int64 batches of this shard's training windows. Raises ConfigError without enough text."""
        text = self._opened()
        return WindowStream(text, text.training_parts(shard, self.settings.partition), shard, batch_size)

    def manifest(self) -> Manifest | None:
        """The training windows by blocks, with `partition = "leased"`."""
        return self._opened().manifest() if self.settings.partition == "leased" else None

    def leased_batch(self, sequences: Sequence[tuple[int, int]]) -> Tensor:
        """(B, T+1) int64."""
        return self._opened().pick(sequences)

    def eval_batches(self, batch_size: int) -> Iterable[Tensor]:
        """Up to `eval_batches` batches (B, T+1) int64, the last one perhaps smaller, evenly over the held-out text.

        The same at every site that has the same text; with `partition = "local"`, of the site's own text.
        """
        return self._opened().held_out_batches(batch_size, self.settings.eval_batches)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        """Mean cross entropy in nats per byte, and the B·T bytes that it counts."""
        batch = batch.to(next(model.parameters()).device, non_blocking=True)
        targets = batch[:, 1:].reshape(-1)  # (B*T,)
        logits: Tensor = model(batch[:, :-1])  # (B, T, 256)
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets), targets.numel()

    def sequence_tokens(self) -> int:
        """T: every byte of a window is a target."""
        return self.settings.context

    @torch.no_grad()
    def generate(self, model: nn.Module, prompt: str, tokens: int, seed: int) -> str:
        """`prompt` and `tokens` further bytes, as text; bytes that are no UTF-8 become U+FFFD.

        Every byte recomputes the whole window. That is slow for long texts, in exchange for no cache to
        keep in step with the model; a person who looks at a sample asks for a few hundred bytes. The model
        has no dropout: it samples the same in training and evaluation mode, and stays in the one it is in.
        """
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        start = prompt.encode("utf-8", errors="replace") or b"\n"
        text = torch.tensor([list(start)])  # (1, N)
        for _ in range(tokens):
            window = text[:, -self.settings.context :].to(device)
            logits = model(window)[0, -1].float().cpu() / TEMPERATURE  # (256,)
            top, choices = logits.topk(TOP_K)
            drawn = choices[torch.multinomial(top.softmax(-1), 1, generator=generator)]
            text = torch.cat((text, drawn[None]), dim=1)
        written = bytes(text[0].tolist())
        return (written if prompt else written[1:]).decode("utf-8", errors="replace")

    def hf_files(self) -> dict[str, bytes]:
        """`config.json` of the LlamaForCausalLM that has these weights."""
        s = self.settings
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
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
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return {"config.json": (json.dumps(config, indent=2) + "\n").encode()}

    def _opened(self) -> Text:
        if self._text is None:
            s = self.settings
            self._text = open_text(s.paths, s.context, s.block_bytes, s.held_out)
        return self._text


class ByteLlama(nn.Module):
    """Bytes (B, T) int64 to logits (B, T, 256), T up to the context. Parameters named as in LlamaForCausalLM."""

    def __init__(self, settings: ByteLMOptions) -> None:
        super().__init__()
        self.model = _Decoder(settings)
        if not settings.tie_embeddings:
            self.lm_head = nn.Linear(settings.width, VOCABULARY, bias=False)
        self.tied = settings.tie_embeddings
        residual_std = INIT_STD / math.sqrt(2 * settings.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if into_residual else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.tied else self.lm_head
        return F.linear(self.model(tokens), head.weight)


class _Decoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, settings: ByteLMOptions) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, settings.width)
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width, eps=NORM_EPS)
        cos, sin = _rotary_tables(settings.context, settings.width // settings.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)  # (B, T, C)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]  # (T, 1, D)
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed


class _Layer(nn.Module):
    def __init__(self, settings: ByteLMOptions) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(settings.width, eps=NORM_EPS)
        self.self_attn = _Attention(settings.width, settings.heads)
        self.post_attention_layernorm = nn.RMSNorm(settings.width, eps=NORM_EPS)
        self.mlp = _MLP(settings.width, settings.mlp_width())

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        mlp: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + mlp


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q = _rotate(self.q_proj(x).view(shape), cos, sin).transpose(1, 2)  # (B, heads, T, D)
        k = _rotate(self.k_proj(x).view(shape), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(x.shape))
        return out


class _MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def _rotary_tables(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, 1, D) fp32, for `_rotate` (Su et al. 2021, arXiv:2104.09864).

    Dimension d turns together with d + D/2, as in Llama. The sign of rotate-half's first half is folded
    into sin: rotate_half(x)·sin is then roll(x, D/2)·sin, one operation in place of three.
    """
    frequency = ROPE_THETA ** -(torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)  # (D/2,)
    angle = torch.arange(context, dtype=torch.float32)[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D) turned by its position, in x's own dtype."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's complaints, as one sentence that names the key and what would do."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # a combination: its message is already a sentence
        return str(first["ctx"]["error"])
    key = str(first["loc"][0])
    fields = ByteLMOptions.model_fields
    if key not in fields:
        near = difflib.get_close_matches(key, list(fields), n=1)
        way_out = f'did you mean "{near[0]}"?' if near else f"its keys are {', '.join(fields)}"
        return f"[task] or [data] {key}: byte-lm has no such key; {way_out}"
    return f"[task] or [data] {key}: {first['input']!r} will not do; give {fields[key].description}"
