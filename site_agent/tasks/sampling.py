"""Text continued by a model, token by token.

Every token recomputes the whole window. That is slow for long texts, in exchange for no cache to keep in step with the
model; a person who looks at a sample asks for a few hundred tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from site_agent.tasks.tokenizer import Tokenizer

TEMPERATURE = 0.8
TOP_K = 40

Forward = Callable[[Tensor], Tensor]
"""Tokens (1, T) int64 to logits (1, T, V)."""


@torch.no_grad()
def continued(
    model: nn.Module, forward: Forward, start: Sequence[int], tokens: int, context: int, seed: int
) -> list[int]:
    """`start` (not empty) and `tokens` sampled ids behind it. The model is in evaluation mode meanwhile."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    text = torch.tensor([list(start)])  # (1, N)
    was_training = model.training
    model.eval()
    try:
        for _ in range(tokens):
            logits = forward(text[:, -context:].to(device))[0, -1].float().cpu() / TEMPERATURE  # (V,)
            top, choices = logits.topk(min(TOP_K, len(logits)))
            drawn = choices[torch.multinomial(top.softmax(-1), 1, generator=generator)]
            text = torch.cat((text, drawn[None]), dim=1)
    finally:
        model.train(was_training)
    ids: list[int] = text[0].tolist()
    return ids


def continued_text(
    tokenizer: Tokenizer, model: nn.Module, forward: Forward, prompt: str, tokens: int, context: int, seed: int
) -> str:
    """`prompt` and `tokens` further tokens as text; without a prompt, what follows the end of a text."""
    start = tokenizer.encode([prompt])[0]
    opening = [tokenizer.end.id] if tokenizer.end else tokenizer.encode(["\n"])[0] or [0]
    ids = continued(model, forward, start or opening, tokens, context, seed)
    if not start:
        return prompt + tokenizer.decode(ids[len(opening) :])
    whole, begun = tokenizer.decode(ids), tokenizer.decode(start)
    # A tokenizer may not give back a prompt as it was; decoding from the middle may lose a space.
    return prompt + whole[len(begun) :] if whole.startswith(begun) else whole
