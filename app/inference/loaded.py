"""A trained model and its tokenizer, for a notebook."""

from dataclasses import dataclass

import torch

from app.data.tokenizer import Tokenizer
from app.errors import UserError
from app.inference.text import Sampling, generate_texts
from app.model.language_model import LanguageModel


@dataclass(frozen=True)
class LoadedModel:
    """A trained model and its tokenizer.

    Attributes:
        model: a torch module in evaluation mode: token ids, int64 [B, T], to logits [B, T, vocab]
        tokenizer: its `encode` returns the tokens of a text, its `decode` the text of tokens
    """

    model: LanguageModel
    tokenizer: Tokenizer

    def tokens(self, text: str) -> torch.Tensor:
        """Return the model's input for a document that begins with `text`, int64 [1, T].

        The first token marks the document's beginning; it is the only one of an empty text.
        """
        tokens = self.tokenizer.encode_prompt(text)
        return torch.tensor([tokens], device=self.model.head_weight.device)

    def generate(
        self,
        prompt: str = "",
        *,
        num_samples: int = 1,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 50,
        seed: int = 0,
    ) -> list[str]:
        """Return texts, each the prompt and a continuation; see app.inference.text.Sampling.

        Raises:
            UserError: a number is too small.
        """
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("max_tokens", max_tokens, 1),
            ("temperature", temperature, 0),
            ("top_k", top_k, 0),
        ):
            if not value >= least:
                raise UserError(f"{name} is {value}", f"set it to {least} or more")
        sampling = Sampling(prompt, num_samples, max_tokens, temperature, top_k, seed)
        return generate_texts(self.model, self.tokenizer, sampling)

    @torch.no_grad()
    def loss(self, text: str) -> float:
        """Return the mean loss of a document's tokens, in nats per token; NaN if it is empty.

        A text that is longer than the context is divided, as in training.
        """
        tokens, length = self.tokens(text), self.model.config.context_length
        parts = zip(tokens[:, :-1].split(length, 1), tokens[:, 1:].split(length, 1), strict=True)
        total = sum(float(self.model(*part)) * part[1].shape[1] for part in parts)
        return total / (tokens.shape[1] - 1) if tokens.shape[1] > 1 else float("nan")
