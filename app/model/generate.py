"""Drawing text from a model, a token at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from app.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Continue each row of `prompt` by `max_tokens` tokens.

    Args:
        model: in evaluation or training mode; it has no dropout.
        prompt: int64 [B, T], T at least 1. Only the last context-length tokens count.
        max_tokens: how many tokens to add.
        temperature: 0 takes the likeliest token, 1 draws from the model's own distribution.
        top_k: draw from the k likeliest tokens; 0 draws from all.
        seed: the same seed, model and device draw the same tokens.
        between: called before each token; what it raises ends the drawing.

    Returns:
        int64 [B, T + max_tokens]
    """
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(max_tokens):
        between()
        logits = model(tokens[:, -model.config.context_length :])[:, -1].float().cpu()
        if temperature == 0:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                least = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            # From the largest down, so that no temperature is too small.
            scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
            drawn = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn.to(tokens.device)), dim=1)
    return tokens
