"""Which windows of the token stream a step, rank and micro-batch gets: arithmetic only.

A split is one stream of N tokens. Window i has inputs [i·T, i·T+T) and targets [i·T+1, i·T+T+1),
so W = (N-1) // T windows make an epoch. Position g of a run is window order(g div W)[g mod W].
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_ROUNDS = 6


def num_sequences(num_tokens: int, context_length: int) -> int:
    """Windows in a stream: each token but the last is an input at most once."""
    return max(0, (num_tokens - 1) // context_length)


@dataclass(frozen=True)
class SequenceOrder:
    """The order in which a run visits the windows of a split.

    Attributes:
        num_sequences: windows of an epoch
        seed: of the order; each epoch has its own
        shuffle: random order, or the stream's own
    """

    num_sequences: int
    seed: int
    shuffle: bool

    def sequences(self, first: int, count: int) -> Indices:
        """Windows at the run's positions first … first+count-1, int64 [count].

        Positions count windows from the start of the run, so they may cross epochs.
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

    A Feistel network (Luby and Rackoff, 1988) permutes the next power of four; whatever falls
    outside range(size) is sent through again until it falls inside (cycle walking: Black and
    Rogaway, 2002). It needs no table, and depends on no library's random numbers.
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
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


@dataclass(frozen=True)
class BatchPlan:
    """The shares of one optimizer step's windows: by rank and micro-batch.

    Attributes:
        sequences_per_step: of all ranks together
        ranks: processes that train together
        micro_batch_size: windows in one forward pass of one rank
    """

    sequences_per_step: int
    ranks: int
    micro_batch_size: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in a step."""
        return self.sequences_per_step // (self.ranks * self.micro_batch_size)

    def micro_batches(self, sequences_consumed: int, rank: int) -> Iterator[tuple[int, int]]:
        """Positions of a rank's micro-batches, as (first, count), step after step without end.

        Args:
            sequences_consumed: windows that all earlier steps have consumed.
            rank: of this process.
        """
        share = self.sequences_per_step // self.ranks
        for step_start in itertools.count(sequences_consumed, self.sequences_per_step):
            start = step_start + rank * share
            for first in range(start, start + share, self.micro_batch_size):
                yield first, self.micro_batch_size


def micro_batch_sizes(sequences_per_step: int, ranks: int) -> list[int]:
    """Micro-batch sizes that divide a step evenly, ascending; none if the ranks do not."""
    if sequences_per_step % ranks:
        return []
    share = sequences_per_step // ranks
    return [size for size in range(1, share + 1) if share % size == 0]
