"""The loss of each held-out sequence, however the sequences are divided among ranks."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from app.data.token_stream import TokenStream
from app.hardware.device import Device
from app.inference.loss import HeldOutText
from app.model.gpt import GPT, GPTConfig

LENGTH = 8
CPU = Device(torch.device("cpu"), "cpu", "float32", deterministic=True, peak_flops=None)
# Eleven sequences, the first shard ending within the fifth; two tokens are left over.
TOKENS = np.random.default_rng(0).integers(0, 97, 11 * LENGTH + 3, dtype=np.uint16)
STREAM = TokenStream([TOKENS[:37], TOKENS[37:]])


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(LENGTH, vocab_size=97, num_layers=1, embd_size=16, num_heads=2))


def joined(batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, targets = zip(*batches, strict=True)
    return torch.cat(losses), torch.cat(targets)


@torch.no_grad()
def test_losses_are_those_of_each_sequence_alone(model: GPT) -> None:
    losses, targets = joined(HeldOutText(STREAM, LENGTH, None).losses(model, CPU, 4))
    assert (losses.dtype, targets.dtype) == (torch.float32, torch.int64)
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    assert torch.equal(targets.flatten(), tokens[1 : 11 * LENGTH + 1])
    for i, loss in enumerate(losses):
        sequence = tokens[i * LENGTH : (i + 1) * LENGTH + 1]
        expected = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("batch_size", (1, 2, 3, 16))
@pytest.mark.parametrize("world_size", (1, 2, 5))
def test_ranks_measure_every_sequence_once(model: GPT, batch_size: int, world_size: int) -> None:
    text = HeldOutText(STREAM, LENGTH, None)
    measured = []
    for rank in range(world_size):
        share = text.losses(model, CPU, batch_size, rank=rank, world_size=world_size)
        measured += [sequence for _, targets in share for sequence in targets.tolist()]
    expected = TOKENS[1 : 11 * LENGTH + 1].reshape(11, LENGTH).tolist()
    assert sorted(measured) == sorted(expected)


@pytest.mark.parametrize(
    ("max_tokens", "sequences"), ((None, 11), (10**9, 11), (LENGTH * 3 - 1, 2), (LENGTH, 1), (1, 1))
)
def test_limit_is_rounded_down_to_sequences_but_not_to_none(
    max_tokens: int | None, sequences: int
) -> None:
    assert HeldOutText(STREAM, LENGTH, max_tokens).num_sequences == sequences


@pytest.mark.parametrize("tokens", (0, 1, LENGTH))
def test_text_shorter_than_a_sequence_has_none(model: GPT, tokens: int) -> None:
    text = HeldOutText(TokenStream([TOKENS[:tokens]]), LENGTH, None)
    assert text.num_sequences == 0
    assert list(text.losses(model, CPU, 4)) == []


def test_what_check_stop_raises_ends_the_measurement_before_the_next_batch(model: GPT) -> None:
    calls: list[None] = []

    def check_stop() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise InterruptedError

    batches = HeldOutText(STREAM, LENGTH, None).losses(model, CPU, 2, check_stop=check_stop)
    assert [len(losses) for losses, _ in (next(batches), next(batches))] == [2, 2]
    with pytest.raises(InterruptedError):
        next(batches)
