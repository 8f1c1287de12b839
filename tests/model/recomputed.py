"""What generation must equal: the whole context computed again for each token, drawn by hand."""

import torch
from torch import Tensor

from app.model.gpt import GPT


@torch.no_grad()
def recomputed(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Tensor:
    """Continue prompt int64 [B, T]: int64 [B, T + max_tokens]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(max_tokens):
        logits = model(tokens[:, -model.config.context_length :])[:, -1]
        if temperature == 0:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                least = logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
                logits = torch.where(logits < least, -torch.inf, logits)
            shares = (logits / temperature).softmax(dim=-1)
            drawn = torch.multinomial(shares, 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens
