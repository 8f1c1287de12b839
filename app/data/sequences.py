"""The sequences of the token stream that each step, rank and micro-batch gets: arithmetic only.

A split is one stream of N tokens. Sequence i has inputs [i·T, i·T+T) and targets [i·T+1, i·T+T+1),
so S = (N-1) // T sequences make an epoch. Position g of a run takes its sequence
from the order of epoch g // S, at index g % S.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 6


def num_sequences(num_tokens: int, context_length: int) -> int:
    """Return the number of whole sequences in a stream; the last token serves only as a target."""
    return max(0, (num_tokens - 1) // context_length)


def num_held_out(num_tokens: int, context_length: int, max_tokens: int | None) -> int:
    """Return on how many sequences of a split the loss is measured; `max_tokens` is the limit.

    The limit is rounded down to whole sequences, but is at least one; None for all.
    """
    limit = num_tokens if max_tokens is None else max(context_length, max_tokens)
    return min(num_sequences(num_tokens, context_length), limit // context_length)


@dataclass(frozen=True)
class SequenceOrder:
    """The order in which a run visits the sequences of a split.

    Attributes:
        num_sequences: sequences of an epoch
        seed: seed of the shuffling; each epoch has its own order
        shuffle: visit them in random order; otherwise in the stream's order
    """

    num_sequences: int
    seed: int
    shuffle: bool

    def sequences(self, first: int, count: int) -> Indices:
        """Return the sequences at the run's positions first … first+count-1, int64 [count].

        Positions count sequences from the start of the run, so they may cross epochs.
        """
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, indices = np.divmod(positions, self.num_sequences)
        if not self.shuffle:
            return indices
        ordered = np.empty_like(indices)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            ordered[of_epoch] = permuted(
                indices[of_epoch], self.num_sequences, self.seed, int(epoch)
            )
        return ordered


def permuted(indices: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Map `indices`, int64 [count], by a pseudorandom permutation of range(size).

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; values outside
    range(size) pass through it again until they fall inside (cycle walking: Black and Rogaway,
    2002). It needs no table, and no library's random numbers.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed) + np.uint64(epoch) * np.uint64(0x9E3779B97F4A7C15))
        keys = _mix(np.add(start, np.arange(_ROUNDS, dtype=np.uint64), dtype=np.uint64))
        values = indices.astype(np.uint64)
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            left, right = values[outside] >> shift, values[outside] & mask
            for key in keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            values[outside] = left << shift | right
            outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    """Apply SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


@dataclass(frozen=True)
class BatchPlan:
    """The division of an optimizer step's sequences among ranks and micro-batches.

    Attributes:
        sequences_per_step: sequences of all ranks together
        world_size: number of ranks
        micro_batch_size: sequences in one forward pass of one rank
    """

    sequences_per_step: int
    world_size: int
    micro_batch_size: int

    @property
    def accumulation_steps(self) -> int:
        """Return the number of micro-batches of one rank in a step."""
        return self.sequences_per_step // (self.world_size * self.micro_batch_size)

    def micro_batches(self, sequences_consumed: int, rank: int) -> Iterator[tuple[int, int]]:
        """Yield the positions of a rank's micro-batches as (first, count), step after step.

        Args:
            sequences_consumed: sequences that all earlier steps have consumed.
        """
        share = self.sequences_per_step // self.world_size
        for step_start in itertools.count(sequences_consumed, self.sequences_per_step):
            start = step_start + rank * share
            for first in range(start, start + share, self.micro_batch_size):
                yield first, self.micro_batch_size


def micro_batch_sizes(sequences_per_step: int, world_size: int) -> list[int]:
    """Return the micro-batch sizes that divide a step evenly, ascending.

    The list is empty if the ranks do not divide it evenly.
    """
    if sequences_per_step % world_size:
        return []
    share = sequences_per_step // world_size
    return [size for size in range(1, share + 1) if share % size == 0]
