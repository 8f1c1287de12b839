"""HellaSwag while a model trains: the number that lm-eval finds for the exported model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from app.data.hellaswag import ENDINGS, Question
from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.hardware.device import Device
from app.model.language_model import LanguageModel

# Logits of so many tokens at once.
_POSITIONS = 256
# For each ending of a question: the tokens of the whole text, and how many are the ending's.
_Rows = list[tuple[Tensor, int]]


@dataclass(frozen=True)
class HellaSwag:
    """A rank's share of the questions: question i belongs to rank i mod world_size.

    Attributes:
        questions: all of them, the same on every rank
        context_length: the model's; the beginning of a longer text is cut off
        max_tokens: tokens per forward pass, with padding; one question may have more
    """

    questions: Sequence[Question]
    context_length: int
    max_tokens: int
    rank: int = 0
    world_size: int = 1

    @torch.no_grad()
    def correct(
        self, model: LanguageModel, device: Device, check_stop: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """Count the questions whose right ending is the likeliest, batch by batch.

        Args:
            model: uncompiled: every batch has another shape.
            device: the model's, with the precision of its forward pass.
            check_stop: called before each batch; it stops the measurement by raising.

        Yields:
            counts, int64 [2]: with log-likelihoods per character (acc_norm), and as they are (acc).
        """
        first = 0
        while first < len(self._encoded):
            check_stop()
            end = first + max(1, self.max_tokens // (ENDINGS * _length(self._encoded[first][1])))
            questions, rows = zip(*self._encoded[first:end], strict=True)
            sums, first = _log_likelihoods(model, device, rows), end
            characters = torch.tensor([[len(each) for each in it.choices] for it in questions])
            labels = torch.tensor([question.label for question in questions])
            # NumPy's argmax takes the first of equals, as lm-eval's does.
            best = [scores.numpy().argmax(axis=1) for scores in (sums / characters, sums)]
            yield torch.stack([(torch.from_numpy(each) == labels).sum() for each in best])

    @cached_property
    def _encoded(self) -> list[tuple[Question, _Rows]]:
        """Return the share's tokens, the longest first, so that little is padding in a batch."""
        tokenizer, length = Tokenizer(), self.context_length
        share = self.questions[self.rank :: self.world_size]
        rows = [(question, encode(question, tokenizer, length)) for question in share]
        return sorted(rows, key=lambda item: -_length(item[1]))


def encode(question: Question, tokenizer: Tokenizer, context_length: int) -> _Rows:
    """Return the last tokens of each text, and how many are the ending's.

    As `_encode_pair` in lm_eval/api/model.py: spaces at the end of the beginning are the ending's.
    """
    beginning, rows = question.beginning, []
    context = tokenizer.encode(beginning.rstrip()).size
    for choice in question.choices:
        tokens = tokenizer.encode(f"{beginning} {choice}").tolist()
        count = len(tokens) - context
        # Without a beginning, the end of a text stands in its place.
        tokens = ([] if context else [END_OF_TEXT]) + tokens
        rows.append((torch.tensor(tokens[-context_length - 1 :]), min(count, context_length)))
    return rows


def _length(rows: _Rows) -> int:
    return max(len(tokens) for tokens, _ in rows)


def _log_likelihoods(model: LanguageModel, device: Device, questions: Sequence[_Rows]) -> Tensor:
    """Return the log-likelihood of each ending, float64 [questions, 4], on the CPU."""
    rows = [row for question in questions for row in question]
    inputs = pad_sequence([tokens[:-1] for tokens, _ in rows], batch_first=True)
    places, targets = list[Tensor](), list[Tensor]()
    for index, (tokens, count) in enumerate(rows):
        end = index * inputs.shape[1] + len(tokens) - 1
        places.append(torch.arange(end - count, end))
        targets.append(tokens[len(tokens) - count :])
    with device.forward_pass():
        x = model.run_blocks(model.embed(inputs.to(device.torch_device)))
        # The logits are by far the largest tensor, and only the endings' are needed.
        x = model.final_norm(x.flatten(0, 1)[torch.cat(places).to(x.device)])
        parts = x.split(_POSITIONS), torch.cat(targets).to(x.device).split(_POSITIONS)
        nats = [
            F.cross_entropy(F.linear(y, model.head_weight).float(), target, reduction="none")
            for y, target in zip(*parts, strict=True)
        ]
    endings = torch.cat(nats).cpu().split([count for _, count in rows])
    return -torch.stack([ending.sum() for ending in endings]).double().view(-1, ENDINGS)
