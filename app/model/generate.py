"""Generation of tokens, one at a time."""

from collections.abc import Generator

import torch
from torch import Tensor

from app.model.kv_cache import KeyValueCache
from app.model.language_model import LanguageModel


@torch.no_grad()
def generate_tokens(
    model: LanguageModel,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Generator[tuple[Tensor, Tensor]]:
    """Continue each row of `prompt`; each token is computed only when it is requested.

    The model sees the last context-length tokens. While all tokens fit, only the new token's column
    is computed. After that the positions, which are absolute, shift with every new token, so the
    whole context is computed again for each.

    Args:
        model: in evaluation or training mode; it has no dropout.
        prompt: int64 [B, T], T >= 1.
        max_tokens: tokens to add to each row.
        temperature: divisor of the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens; 0 for all.
        seed: the same seed, model and device generate the same tokens.

    Yields:
        the next token of each row, int64 [B], on the prompt's device, and the logits it was drawn
        from, float32 [B, vocab], on the CPU.
    """
    # Sampled on the CPU, so that a seed has the same meaning for every device.
    generator = torch.Generator().manual_seed(seed)
    length = model.config.context_length
    context = prompt[:, -length:]
    cache = KeyValueCache(model.config.num_layers, min(length, context.shape[1] + max_tokens))
    for _ in range(max_tokens):
        logits = model.next_logits(context[:, cache.length :], cache).float().cpu()
        next_token = _sample(logits, temperature, top_k, generator).to(context.device)
        yield next_token[:, 0], logits
        context = torch.cat((context, next_token), dim=1)
        if context.shape[1] > length:
            context = context[:, 1:]
            cache.clear()


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Sample a token for each row of logits, float32 [B, vocab]; return int64 [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # The largest logit becomes 0, so that a tiny temperature, if not 0 itself, cannot overflow.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
