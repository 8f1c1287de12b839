"""Text from a model: prompt to tokens, tokens to text."""

from collections.abc import Callable, Generator

import torch

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.model.generate import generate_tokens
from app.model.gpt import GPT
from app.settings.groups import SampleSettings


def stream_texts(
    model: GPT, tokenizer: Tokenizer, chosen: SampleSettings
) -> Generator[list[str | None]]:
    """Continue a new document that begins with the prompt, num_samples times.

    Yields:
        for each token drawn what it adds to each text: nothing while a character is incomplete,
        None once the model has ended the document. When all are ended, it is over.
    """
    rows = range(chosen.num_samples)
    prompt = prompt_tokens(tokenizer, chosen.prompt)
    drawn = generate_tokens(
        model,
        torch.tensor([prompt] * len(rows), device=next(model.parameters()).device),
        chosen.max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        seed=chosen.seed,
    )
    decoders = [tokenizer.stream_decoder() for _ in rows]
    has_ended = [False for _ in rows]
    for tokens in drawn:
        pieces: list[str | None] = []
        for row, token in enumerate(tokens.tolist()):
            has_ended[row] |= token == END_OF_TEXT
            pieces.append(None if has_ended[row] else decoders[row](token))
        if all(has_ended):
            return
        yield pieces


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    chosen: SampleSettings,
    between: Callable[[], None] = lambda: None,
) -> list[str]:
    """Continue a new document that begins with the prompt.

    Args:
        between: called before each token; what it raises ends the writing.

    Returns:
        num_samples texts, prompt included; each ends where the model ends the document, or with
        the last whole character.
    """
    texts = [tokenizer.decode(tokenizer.encode(chosen.prompt)) for _ in range(chosen.num_samples)]
    between()
    for pieces in stream_texts(model, tokenizer, chosen):
        between()
        texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
    return texts


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens to continue: a new document that begins with the prompt."""
    return [END_OF_TEXT, *tokenizer.encode(prompt).tolist()]


def truncation_note(model: GPT, tokenizer: Tokenizer, prompt: str) -> str | None:
    """Return a note on a prompt that is longer than the context; None for any other."""
    length, tokens = model.config.context_length, len(prompt_tokens(tokenizer, prompt))
    if tokens <= length:
        return None
    return f"the prompt has {tokens} tokens; the model sees the last {length} of them"
