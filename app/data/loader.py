"""Windows to batches on the device, read ahead by a thread.

Shards stay memory-mapped as uint16; only the batches in flight are widened.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from app.data.shards import Tokens
from app.data.windows import Indices, StepPlan, WindowOrder

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
        """Inputs and targets of windows, int64 [len(indices), context_length] each."""
        tokens = np.empty((len(indices), context_length + 1), dtype=np.uint16)
        for row, index in zip(tokens, indices, strict=True):
            self.read(int(index) * context_length, row)
        widened = torch.from_numpy(tokens.astype(np.int64))
        return widened[:, :-1].contiguous(), widened[:, 1:].contiguous()


class BatchLoader:
    """The micro-batches of one rank, step after step without end, on the device.

    Use as a context manager: leaving it stops the thread.

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
        self._stream, self._order, self._plan = stream, order, plan
        self._rank, self._position = rank, first_position
        self._context_length, self._device = context_length, device
        self._ready: queue.Queue[tuple[Tensor, Tensor] | Exception] = queue.Queue(_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="batches", daemon=True)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next micro-batch, int64 [B, T] each, on the device."""
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        inputs, targets = batch
        return (
            inputs.to(self._device, non_blocking=True),
            targets.to(self._device, non_blocking=True),
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for index in range(self._plan.accumulation_steps):
                first, count = self._plan.micro_batch(self._position, self._rank, index)
                windows = self._order.windows(first, count)
                inputs, targets = self._stream.windows(windows, self._context_length)
                if self._device.type == "cuda":
                    inputs, targets = inputs.pin_memory(), targets.pin_memory()
                yield inputs, targets
            self._position += self._plan.windows_per_step

    def _read_ahead(self) -> None:
        try:
            for batch in self._batches():
                self._put(batch)
                if self._stop.is_set():
                    return
        except Exception as error:
            self._put(error)

    def _put(self, item: tuple[Tensor, Tensor] | Exception) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
