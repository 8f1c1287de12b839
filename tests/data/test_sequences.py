import itertools
from collections import Counter

import numpy as np
import pytest

from app.data.sequences import (
    BatchPlan,
    SequenceOrder,
    micro_batch_sizes,
    num_sequences,
    permuted,
)
from app.data.shards import Tokens
from app.data.token_stream import TokenStream

SHARD_SIZE = 7


def shards_of(num_tokens: int) -> list[Tokens]:
    """Tokens 0, 1, 2, … in shards of 7."""
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return [tokens[start : start + SHARD_SIZE] for start in range(0, num_tokens, SHARD_SIZE)]


def positions(plan: BatchPlan, first: int, rank: int, steps: int) -> list[list[int]]:
    """Positions of each micro-batch of a rank, for some steps."""
    batches = plan.micro_batches(first, rank)
    count = steps * plan.accumulation_steps
    return [list(range(start, start + size)) for start, size in itertools.islice(batches, count)]


@pytest.mark.parametrize(
    ("num_tokens", "windows"), ((0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (80, 9), (81, 10))
)
def test_each_window_needs_its_last_target(num_tokens: int, windows: int) -> None:
    assert num_sequences(num_tokens, 8) == windows


@pytest.mark.parametrize("shuffle", (True, False))
@pytest.mark.parametrize("size", range(1, 71))
def test_epoch_has_every_window_once(size: int, shuffle: bool) -> None:
    order = SequenceOrder(size, seed=size, shuffle=shuffle)
    for epoch in range(3):
        assert sorted(order.sequences(epoch * size, size)) == list(range(size))


@pytest.mark.parametrize("num_tokens", range(1, 71))
def test_epoch_reads_every_token_as_input_once(num_tokens: int) -> None:
    """For k·T and k·T+1 tokens and all between: only what fills no window is left out."""
    stream = TokenStream(shards_of(num_tokens))
    for length in (1, 2, 3, 5, 7, 8, 20):
        windows = num_sequences(num_tokens, length)
        order = SequenceOrder(windows, seed=3, shuffle=True)
        if windows:
            inputs, targets = stream.sequences(order.sequences(0, windows), length)
            assert sorted(inputs.flatten().tolist()) == list(range(windows * length))
            assert (targets == inputs + 1).all()
        assert num_tokens - 1 - length < windows * length <= num_tokens - 1


@pytest.mark.parametrize("num_tokens", range(1, 3 * SHARD_SIZE + 2))
def test_reading_across_shards_equals_the_slice(num_tokens: int) -> None:
    stream, tokens = TokenStream(shards_of(num_tokens)), list(range(num_tokens))
    assert len(stream) == num_tokens
    for start in range(num_tokens):
        for end in range(start + 1, num_tokens + 1):
            out = np.empty(end - start, dtype=np.uint16)
            stream.read(start, out)
            assert out.tolist() == tokens[start:end]


def test_empty_shards_add_nothing() -> None:
    empty = np.empty(0, dtype=np.uint16)
    stream = TokenStream([empty, *shards_of(10), empty, empty])
    out = np.empty(10, dtype=np.uint16)
    stream.read(0, out)
    assert len(stream) == 10
    assert out.tolist() == list(range(10))


def test_no_shards_are_an_empty_stream() -> None:
    assert len(TokenStream([])) == 0


def test_unshuffled_windows_are_in_the_streams_order() -> None:
    order = SequenceOrder(5, seed=1, shuffle=False)
    assert order.sequences(3, 9).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_positions_across_epochs_equal_the_epochs_one_by_one() -> None:
    order = SequenceOrder(10, seed=1, shuffle=True)
    epochs = np.concatenate([order.sequences(epoch * 10, 10) for epoch in range(4)])
    for first, count in itertools.product(range(20), range(20)):
        assert order.sequences(first, count).tolist() == epochs[first : first + count].tolist()


def test_step_across_two_epochs_ends_one_and_begins_the_next() -> None:
    order = SequenceOrder(10, seed=1, shuffle=True)
    step = order.sequences(8, 8)
    assert sorted([*order.sequences(0, 8), *step[:2]]) == list(range(10))
    assert sorted([*step[2:], *order.sequences(16, 4)]) == list(range(10))


def test_order_differs_by_epoch_and_seed() -> None:
    orders = [
        tuple(SequenceOrder(50, seed, shuffle=True).sequences(epoch * 50, 50))
        for seed, epoch in itertools.product(range(10), range(10))
    ]
    assert len(set(orders)) == 100


@pytest.mark.parametrize(
    ("size", "seed", "epoch", "first_windows"),
    (
        (10, 0, 0, [4, 0, 6, 7, 5, 3, 8, 1, 2, 9]),
        (10, 0, 1, [3, 4, 7, 0, 6, 2, 9, 5, 8, 1]),
        (10, 2**32 - 1, 3, [7, 2, 3, 5, 8, 0, 6, 1, 9, 4]),
        (9_765_624, 0, 0, [2406872, 8535542, 1637330, 6086103, 4499624]),
        (9_765_624, 7, 11, [3823352, 4434099, 2206183, 8565434, 8162613]),
        (2**40, 1, 1, [813652473106, 324099992046, 201402028483, 526922274261]),
    ),
)
def test_permutation_is_pinned(size: int, seed: int, epoch: int, first_windows: list[int]) -> None:
    """The values come from the same definition in plain integers: no library may change them."""
    positions = np.arange(len(first_windows))
    assert permuted(positions, size, seed, epoch).tolist() == first_windows


def test_permutation_spreads_windows_evenly() -> None:
    size, cells = 1000, 10
    counts = Counter(
        (first // (size // cells), int(window) // (size // cells))
        for epoch in range(100)
        for first, window in enumerate(permuted(np.arange(size), size, 0, epoch))
    )
    # 1000 expected in each of 100 cells, with a standard deviation of about 30.
    assert len(counts) == cells * cells
    assert 850 < min(counts.values()) <= max(counts.values()) < 1150


@pytest.mark.parametrize("ranks", (1, 2, 4))
@pytest.mark.parametrize("micro_batch_size", (1, 2, 3, 6))
def test_global_batch_is_the_same_for_every_sharing(ranks: int, micro_batch_size: int) -> None:
    plan = BatchPlan(sequences_per_step=24, world_size=ranks, micro_batch_size=micro_batch_size)
    for first in (0, 24, 100):
        shares = [positions(plan, first, rank, steps=1) for rank in range(ranks)]
        assert all(len(batch) == micro_batch_size for share in shares for batch in share)
        flat = [position for share in shares for batch in share for position in batch]
        assert flat == list(range(first, first + 24))


@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_steps_follow_each_other_without_a_gap(ranks: int) -> None:
    plan = BatchPlan(sequences_per_step=8, world_size=ranks, micro_batch_size=2)
    shares = [positions(plan, 0, rank, steps=5) for rank in range(ranks)]
    taken = sorted(position for share in shares for batch in share for position in batch)
    assert taken == list(range(40))


@pytest.mark.parametrize("steps_done", (1, 2, 3))
def test_resuming_continues_with_the_next_step(steps_done: int) -> None:
    plan = BatchPlan(sequences_per_step=12, world_size=2, micro_batch_size=3)
    for rank in range(2):
        unbroken = positions(plan, 0, rank, steps=5)
        resumed = positions(plan, steps_done * 12, rank, steps=5 - steps_done)
        assert unbroken[steps_done * plan.accumulation_steps :] == resumed


def test_micro_batch_sizes_divide_a_ranks_share() -> None:
    assert micro_batch_sizes(24, 1) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert micro_batch_sizes(24, 4) == [1, 2, 3, 6]
    assert micro_batch_sizes(24, 5) == []
