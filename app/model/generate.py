"""Drawing text from a model, a token at a time."""

from collections.abc import Generator

import torch
from torch import Tensor

from app.model.gpt import GPT
from app.model.kv_cache import KeyValueCache


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Generator[Tensor]:
    """Continue each row of `prompt`; whoever has enough stops asking.

    Only the last context-length tokens count. As long as all of them fit, a new token costs its own
    column only. Positions are absolute: once the window moves on, every token in it is at another
    one, and all of it is computed again for each new token.

    Args:
        model: in evaluation or training mode; it has no dropout.
        prompt: int64 [B, T], T at least 1.
        max_tokens: how many tokens to add.
        temperature: 0 takes the likeliest token, 1 draws from the model's own distribution.
        top_k: draw from the k likeliest tokens; 0 draws from all.
        seed: the same seed, model and device draw the same tokens.

    Yields:
        the next token of each row, int64 [B], on the prompt's device.
    """
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    length = model.config.context_length
    window = prompt[:, -length:]
    cache = KeyValueCache(model.config.num_layers, min(length, window.shape[1] + max_tokens))
    for _ in range(max_tokens):
        logits = model.next_logits(window[:, cache.length :], cache).float().cpu()
        drawn = _draw(logits, temperature, top_k, generator).to(window.device)
        yield drawn[:, 0]
        window = torch.cat((window, drawn), dim=1)
        if window.shape[1] > length:
            window = window[:, 1:]
            cache.clear()


def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Tensor:
    """Continue each row of `prompt` by `max_tokens` tokens, as generate_tokens does.

    Returns:
        int64 [B, T + max_tokens]
    """
    drawn = generate_tokens(
        model, prompt, max_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    return torch.cat((prompt, *(tokens[:, None] for tokens in drawn)), dim=1)


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """A token for each row of logits float32 [B, vocab]: int64 [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # From the largest down, so that no temperature is too small.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
