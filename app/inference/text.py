"""Text from a model: a prompt to tokens, tokens to text."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.model.generate import generate_tokens
from app.model.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """A prompt, and the parameters of sampling its continuations.

    Attributes:
        prompt: beginning of the document to continue; may be empty; `<|endoftext|>` in it is that
            token, and ends one document and begins another
        num_samples: continuations, drawn side by side
        max_tokens: limit on the tokens of each continuation
        temperature, top_k, seed: see app.model.generate.generate_tokens
    """

    prompt: str
    num_samples: int
    max_tokens: int
    temperature: float
    top_k: int
    seed: int


class Piece(NamedTuple):
    """The text that a token adds, "" while a character is incomplete.

    Attributes:
        logits: those that the token was drawn from, float32 [vocab], on the CPU
    """

    text: str
    token: int
    logits: Tensor


def stream_texts(
    model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling
) -> Generator[list[Piece | None]]:
    """Stream num_samples continuations of the prompt, one token at a time.

    Yields:
        for each token, what it adds to each sample: None once the model has ended the document.
        Stops when every sample has ended.
    """
    rows = range(sampling.num_samples)
    prompt = tokenizer.encode_prompt(sampling.prompt)
    generated = generate_tokens(
        model,
        torch.tensor([prompt] * len(rows), device=next(model.parameters()).device),
        sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        seed=sampling.seed,
    )
    decoders = [tokenizer.stream_decoder() for _ in rows]
    has_ended = [False for _ in rows]
    for tokens, logits in generated:
        pieces: list[Piece | None] = []
        for row, token in enumerate(tokens.tolist()):
            has_ended[row] |= token == END_OF_TEXT
            piece = None if has_ended[row] else Piece(decoders[row](token), token, logits[row])
            pieces.append(piece)
        if all(has_ended):
            return
        yield pieces


def generate_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    sampling: Sampling,
    check_stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """Return num_samples texts, each the prompt and a continuation of it.

    A text ends where the model ends the document, or after its last complete character.

    Args:
        check_stop: called before each token; it stops the generation by raising.
    """
    prompt = tokenizer.decode(tokenizer.encode(sampling.prompt))
    texts = [prompt] * sampling.num_samples
    check_stop()
    for pieces in stream_texts(model, tokenizer, sampling):
        check_stop()
        texts = extended(texts, pieces)
    return texts


def extended(texts: list[str], pieces: list[Piece | None]) -> list[str]:
    """Return each text with what its next token adds."""
    return [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]


def truncation_note(model: LanguageModel, tokenizer: Tokenizer, prompt: str) -> str | None:
    """Return a note if the prompt is longer than the context; None otherwise."""
    length, tokens = model.config.context_length, len(tokenizer.encode_prompt(prompt))
    if tokens <= length:
        return None
    return (
        f"the first {tokens - length} of the prompt's {tokens} tokens are cut off: the model sees "
        f"the last {length} of them"
    )
