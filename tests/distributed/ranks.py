"""Ranks that train together, as processes that are started once for many tests."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
TIMEOUT = timedelta(seconds=60)


class Ranks:
    """Processes that run a function together, as the ranks of a world that gloo joins."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder, self._worlds = folder, 0
        # Not forks of this process: autograd cannot be forked where there is a GPU.
        self._pool = ProcessPoolExecutor(size, multiprocessing.get_context("spawn"))

    def run(self, function: Callable[..., T], *arguments: object) -> list[T]:
        """Return function(rank, size, *arguments) of each rank."""
        self._worlds += 1
        store = self._folder / f"store-{self._worlds}"
        # Each waits for the others, so that no process takes two of them.
        ranks = [
            self._pool.submit(_run_rank, rank, self.size, store, function, *arguments)
            for rank in range(self.size)
        ]
        return [rank.result() for rank in ranks]

    def close(self) -> None:
        self._pool.shutdown()


def _run_rank(
    rank: int, size: int, store: Path, function: Callable[..., T], *arguments: object
) -> T:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    try:
        return function(rank, size, *arguments)
    finally:
        distributed.destroy_process_group()
