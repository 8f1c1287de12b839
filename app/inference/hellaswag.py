"""HellaSwag while a model trains: the number that lm-eval finds for the exported model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.data.hellaswag import ENDINGS, Question
from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.hardware.device import Device
from app.model.gpt import GPT

# Logits of so many positions at once: 100 MB in float32.
_POSITIONS = 512

_Rows = list[tuple[list[int], int]]


@dataclass(frozen=True)
class _Batch:
    """Questions, each with a row of tokens for each ending, padded at their ends.

    Attributes:
        inputs: int64 [4·Q, L]
        positions: where the endings' tokens are predicted in the flattened inputs, int64 [N]
        targets: those tokens, int64 [N]
        counts: tokens of each ending, [4·Q]
        lengths: characters of each ending, float64 [Q, 4]
        labels: which ending is right, int64 [Q]
    """

    inputs: Tensor
    positions: Tensor
    targets: Tensor
    counts: list[int]
    lengths: Tensor
    labels: Tensor


class HellaSwag:
    """A rank's share of the questions, whose endings it ranks by their log-likelihood.

    Args:
        questions: all of them, the same on every rank.
        context_length: the model's; the beginning of a longer text is cut off.
        max_tokens: tokens per forward pass, with padding; one question may have more.
        rank, world_size: question i belongs to rank i mod world_size.

    Attributes:
        num_questions: number of questions of all ranks
    """

    def __init__(
        self,
        questions: Sequence[Question],
        context_length: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_questions = len(questions)
        self._share = questions[rank::world_size]
        self._context_length, self._max_tokens = context_length, max_tokens

    @torch.no_grad()
    def correct(
        self, model: GPT, device: Device, check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """Count the questions whose right ending is the likeliest, batch by batch.

        Args:
            model: uncompiled: every batch has another shape.
            device: the model's, with the precision of its forward pass.
            check_stop: called before each batch; it stops the measurement by raising.

        Yields:
            counts, int64 [2]: with log-likelihoods per character (acc_norm), and as they are (acc).
        """
        for batch in self._batches:
            check_stop()
            nats = _log_likelihoods(model, device, batch)
            sums = torch.stack([part.sum() for part in nats.split(batch.counts)]).double()
            scores = sums.view(-1, ENDINGS)
            # NumPy's argmax takes the first of equals, as lm-eval's does.
            best = [(each.numpy()).argmax(1) for each in (scores / batch.lengths, scores)]
            yield (torch.from_numpy(np.stack(best)) == batch.labels).sum(dim=1)

    @cached_property
    def _batches(self) -> list[_Batch]:
        """The share's batches, which waste little on padding; the largest come first."""
        tokenizer = Tokenizer()
        encoded = [(question, encode(question, tokenizer)) for question in self._share]
        encoded = [(question, [self._cut(*row) for row in rows]) for question, rows in encoded]
        encoded.sort(key=lambda item: -_width(item[1]))
        batches, first = [], 0
        while first < len(encoded):
            width = _width(encoded[first][1])
            end = first + max(1, self._max_tokens // (ENDINGS * width))
            batches.append(_batch(encoded[first:end], width))
            first = end
        return batches

    def _cut(self, tokens: list[int], count: int) -> tuple[list[int], int]:
        tokens = tokens[-self._context_length - 1 :]
        return tokens, min(count, len(tokens) - 1)


def encode(question: Question, tokenizer: Tokenizer) -> _Rows:
    """Return the tokens of the beginning with each ending, and how many are the ending's.

    As `_encode_pair` in lm_eval/api/model.py: spaces at the end of the beginning are the ending's.
    """
    context = question.beginning.rstrip()
    # Without a beginning, the end of a text stands in its place.
    before = [] if context else [END_OF_TEXT]
    length = tokenizer.encode(context).size
    texts = [f"{question.beginning} {choice}" for choice in question.choices]
    encoded = [tokenizer.encode(text).tolist() for text in texts]
    return [([*before, *tokens], len(tokens) - length) for tokens in encoded]


def _width(rows: _Rows) -> int:
    """Return the length of the longest row's inputs, which lack its last token."""
    return max(len(tokens) for tokens, _ in rows) - 1


def _batch(encoded: Sequence[tuple[Question, _Rows]], width: int) -> _Batch:
    rows = [row for _, rows in encoded for row in rows]
    inputs = torch.zeros(len(rows), width, dtype=torch.int64)
    positions, targets = [], list[int]()
    for index, (tokens, count) in enumerate(rows):
        end = len(tokens) - 1
        inputs[index, :end] = torch.tensor(tokens[:-1])
        positions.append(torch.arange(end - count, end) + index * width)
        targets += tokens[len(tokens) - count :]
    lengths = [[len(choice) for choice in question.choices] for question, _ in encoded]
    return _Batch(
        inputs,
        torch.cat(positions),
        torch.tensor(targets),
        [count for _, count in rows],
        torch.tensor(lengths, dtype=torch.float64),
        torch.tensor([question.label for question, _ in encoded]),
    )


def _log_likelihoods(model: GPT, device: Device, batch: _Batch) -> Tensor:
    """Return the log-likelihood of each token of the endings, float32 [N], on the CPU."""
    inputs, positions, targets = (
        tensor.to(device.torch_device) for tensor in (batch.inputs, batch.positions, batch.targets)
    )
    norm, head = model.transformer.ln_f, model.transformer.wte.weight
    with device.forward_pass():
        x = model.embed(inputs)
        for block in model.transformer.h:
            x = block(x)
        # The logits are by far the largest tensor, and only the endings' are needed.
        parts = x.flatten(0, 1)[positions].split(_POSITIONS), targets.split(_POSITIONS)
        nats = [
            F.cross_entropy(F.linear(norm(y), head).float(), t, reduction="none")
            for y, t in zip(*parts, strict=True)
        ]
    return -torch.cat(nats).cpu()
