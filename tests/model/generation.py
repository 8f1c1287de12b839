"""Whole continuations of prompts, by the program's generator and by another implementation."""

from typing import Any

import torch
from torch import Tensor

from app.model.generate import generate_tokens
from app.model.language_model import LanguageModel


def generate(model: LanguageModel, prompt: Tensor, max_tokens: int, **options: Any) -> Tensor:
    """Continue prompt int64 [B, T] with generate_tokens: int64 [B, T + max_tokens]."""
    generated = generate_tokens(model, prompt, max_tokens, **options)
    return torch.cat((prompt, *(tokens[:, None] for tokens, _ in generated)), dim=1)


@torch.no_grad()
def generate_without_cache(
    model: LanguageModel,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Tensor:
    """Continue prompt int64 [B, T], computing the whole context for each token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(max_tokens):
        logits = model(tokens[:, -model.config.context_length :])[:, -1]
        if temperature == 0:
            next_token = logits.argmax(dim=-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                smallest = logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
                logits = torch.where(logits < smallest, -torch.inf, logits)
            probabilities = (logits / temperature).softmax(dim=-1)
            next_token = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat((tokens, next_token), dim=1)
    return tokens
