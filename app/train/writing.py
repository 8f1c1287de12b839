"""Text from a model: prompt to tokens, tokens to text."""

from collections.abc import Callable

import torch

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.model.generate import generate
from app.model.gpt import GPT
from app.settings import SampleSettings


def write_texts(
    model: GPT,
    tokenizer: Tokenizer,
    chosen: SampleSettings,
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """Let the model continue a new document that begins with the prompt.

    Args:
        between: called before each token; what it raises ends the writing.

    Returns:
        num_samples texts, prompt included; each ends where the model ends the document.
    """
    prompt = [END_OF_TEXT, *tokenizer.encode(chosen.prompt).tolist()]
    device = next(model.parameters()).device
    tokens = generate(
        model,
        torch.tensor([prompt] * chosen.num_samples, device=device),
        chosen.max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        seed=chosen.seed,
        between=between,
    )
    return [tokenizer.decode(_document(row)) for row in tokens[:, 1:].tolist()]


def _document(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END_OF_TEXT)] if END_OF_TEXT in tokens else tokens
