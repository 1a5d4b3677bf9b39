"""The model of `byte-lm`: LlamaForCausalLM to the letter, its parameter names, rotate-half rotary positions and norms.

What a run has trained therefore opens in Hugging Face transformers, vLLM or llama.cpp without a conversion. The price
is that q, k and v are three matrices, where one fused matrix would be a little faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
INIT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: the vocabulary, the residual stream, the layers, the heads, the MLP inside, and the most tokens
    that it sees at once."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    tied: bool


class Llama(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V), T up to the context. Parameters named as in LlamaForCausalLM."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = _Decoder(shape)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.tied = shape.tied
        residual_std = INIT_STD / math.sqrt(2 * shape.layers)
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

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        cos, sin = _rotary_tables(shape.context, shape.width // shape.heads)
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
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.self_attn = _Attention(shape.width, shape.heads)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.mlp = _MLP(shape.width, shape.hidden)

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
