import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from app.data.sequences import BatchPlan, SequenceOrder, num_sequences
from app.data.shards import open_shard
from app.data.token_stream import TokenStream
from app.errors import UserError
from app.train.dataloader import BatchLoader
from tests.prepare.conftest import write_shard

LENGTH = 5
TOKENS = np.random.default_rng(0).integers(0, 50257, 403).astype(np.uint16)
SEQUENCES = num_sequences(TOKENS.size, LENGTH)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """TOKENS in shard files of 100."""
    paths = [tmp_path / f"text_{number:06d}.bin" for number in range(5)]
    for number, path in enumerate(paths):
        write_shard(path, TOKENS[number * 100 : number * 100 + 100])
    return TokenStream([open_shard(path) for path in paths])


def loader(
    stream: TokenStream, *, first: int = 0, rank: int = 0, ranks: int = 1, size: int = 3
) -> BatchLoader:
    return BatchLoader(
        stream,
        SequenceOrder(SEQUENCES, seed=5, shuffle=True),
        BatchPlan(sequences_per_step=12, world_size=ranks, micro_batch_size=size),
        rank=rank,
        sequences_consumed=first,
        context_length=LENGTH,
        device=torch.device("cpu"),
    )


def expected(first: int, count: int) -> list[list[int]]:
    """Return inputs and last target of the run's sequences, cut from TOKENS."""
    order = SequenceOrder(SEQUENCES, seed=5, shuffle=True).sequences(first, count)
    return [TOKENS[i * LENGTH : i * LENGTH + LENGTH + 1].tolist() for i in order.tolist()]


def drawn(loader: BatchLoader, batches: int) -> list[list[int]]:
    """Return inputs and last target of every sequence in the next batches."""
    rows = []
    for _ in range(batches):
        inputs, targets = loader.next_batch()
        rows += torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
    return rows


def test_batches_equal_slices_of_the_stream_for_two_epochs(stream: TokenStream) -> None:
    batches = 2 * SEQUENCES // 3
    with loader(stream) as opened:
        assert drawn(opened, batches) == expected(0, batches * 3)


def test_targets_are_the_next_tokens(stream: TokenStream) -> None:
    with loader(stream) as opened:
        inputs, targets = opened.next_batch()
    assert inputs.shape == targets.shape == (3, LENGTH)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_largest_token_is_not_negative() -> None:
    stream = TokenStream([np.full(LENGTH + 1, 50256, dtype=np.uint16)])
    inputs, _ = stream.sequences(np.array([0]), LENGTH)
    assert inputs.tolist() == [[50256] * LENGTH]


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    stream = TokenStream([np.full(LENGTH + 1, 50257, dtype=np.uint16)])
    with pytest.raises(UserError, match="token 50257"):
        stream.sequences(np.array([0]), LENGTH)


@pytest.mark.parametrize("ranks", (1, 2, 4))
@pytest.mark.parametrize("size", (1, 3))
def test_ranks_and_micro_batches_share_the_same_step(
    stream: TokenStream, ranks: int, size: int
) -> None:
    rows = []
    for rank in range(ranks):
        with loader(stream, rank=rank, ranks=ranks, size=size) as opened:
            rows += drawn(opened, 12 // ranks // size)
    assert rows == expected(0, 12)


def test_a_resumed_run_begins_at_the_sequences_consumed(stream: TokenStream) -> None:
    with loader(stream, first=24) as resumed:
        assert drawn(resumed, 8) == expected(24, 24)


def test_fault_in_the_reading_thread_reaches_the_caller(tmp_path: Path) -> None:
    write_shard(tmp_path / "short.bin", TOKENS[:50])
    short = TokenStream([open_shard(tmp_path / "short.bin")])
    with loader(short) as opened, pytest.raises(IndexError):
        drawn(opened, SEQUENCES)


def test_leaving_ends_the_thread(stream: TokenStream) -> None:
    before = set(threading.enumerate())
    with loader(stream) as opened:
        opened.next_batch()
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


def test_leaving_by_an_exception_ends_the_thread() -> None:
    before = set(threading.enumerate())
    short = TokenStream([TOKENS[:50]])
    with pytest.raises(IndexError), loader(short) as opened:
        drawn(opened, SEQUENCES)
    assert not set(threading.enumerate()) - before
