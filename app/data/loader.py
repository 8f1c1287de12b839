"""Windows to batches on the device, read ahead by a thread.

Shards stay memory-mapped as uint16; only the batches in flight are widened.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from app.containers import program
from app.data.shards import Tokens
from app.data.tokenizer import END_OF_TEXT
from app.data.windows import Indices, StepPlan, WindowOrder
from app.errors import UserError

_BATCHES_AHEAD = 3


class TokenStream:
    """The shards of a split as one stream.

    Args:
        shards: uint16 [count] each, in order.
    """

    def __init__(self, shards: Sequence[Tokens]) -> None:
        self._shards = list(shards)
        self._ends = np.cumsum([shard.size for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def read(self, start: int, out: Tokens) -> None:
        """Copy tokens start … start+len(out)-1 into `out`, across shards where need be."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < out.size:
            begin = start + filled - int(self._ends[shard]) + self._shards[shard].size
            part = self._shards[shard][begin : begin + out.size - filled]
            out[filled : filled + part.size] = part
            filled += part.size
            shard += 1

    def windows(self, indices: Indices, context_length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of windows, int64 [len(indices), context_length] each.

        Raises:
            UserError: a token is not in the vocabulary.
        """
        tokens = np.empty((len(indices), context_length + 1), dtype=np.uint16)
        for row, index in zip(tokens, indices, strict=True):
            self.read(int(index) * context_length, row)
        if tokens.size and tokens.max() > END_OF_TEXT:
            raise UserError(
                f"the dataset holds token {tokens.max()}, GPT-2's vocabulary ends at {END_OF_TEXT}",
                f"prepare it again; `{program()} inspect` names the shard",
            )
        widened = torch.from_numpy(tokens.astype(np.int64))
        return widened[:, :-1].contiguous(), widened[:, 1:].contiguous()


class BatchLoader:
    """The micro-batches of one rank, step after step without end, on the device.

    Use as a context manager: leaving it ends the thread that reads ahead.

    Args:
        stream: tokens of the split.
        order: the order of its windows.
        plan: how a step is shared out.
        rank: of this process.
        first_position: windows the run has consumed already.
        context_length: tokens of a window.
        device: where batches go. To a GPU they travel pinned and asynchronously.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: WindowOrder,
        plan: StepPlan,
        *,
        rank: int,
        first_position: int,
        context_length: int,
        device: torch.device,
    ) -> None:
        self._stream, self._order, self._device = stream, order, device
        self._context_length = context_length
        self._micro_batches = plan.micro_batches(first_position, rank)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()
        self._waited_seconds = 0.0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next micro-batch, int64 [B, T] each, on the device."""
        while len(self._ahead) <= _BATCHES_AHEAD:
            first, count = next(self._micro_batches)
            self._ahead.append(self._reader.submit(self._read, first, count))
        started = time.perf_counter()
        inputs, targets = self._ahead.popleft().result()
        self._waited_seconds += time.perf_counter() - started
        return (
            inputs.to(self._device, non_blocking=True),
            targets.to(self._device, non_blocking=True),
        )

    def take_waited_seconds(self) -> float:
        """Return how long next_batch has waited for batches since the last call."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def _read(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        indices = self._order.windows(first, count)
        inputs, targets = self._stream.windows(indices, self._context_length)
        if self._device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._reader.shutdown(cancel_futures=True)
