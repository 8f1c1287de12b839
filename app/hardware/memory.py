"""Memory that a device has free, and the batch that fits into it."""

from dataclasses import dataclass

import torch

from app.hardware.proc import available_memory_bytes

# More tokens at once do not make a device faster at GPT-2's size: on an H100, 469k tokens/s with
# 32,768 and 467k with 65,536. Apple's GPU is slower, and takes its memory from other programs.
_SATURATING_TOKENS = {"cuda": 32_768, "mps": 8_192, "cpu": 4_096}
# The allocator's gaps, the libraries' workspaces, and other programs on the machine take the rest.
_USABLE = 0.85


@dataclass(frozen=True)
class MemoryEstimate:
    """An upper bound on the memory that a forward (and backward) pass takes.

    Attributes:
        fixed_bytes: bytes that do not depend on the batch size
        bytes_per_sequence: further bytes for each sequence of the batch
    """

    fixed_bytes: int
    bytes_per_sequence: int

    def bytes_for(self, batch_size: int) -> int:
        """Return the bytes that a batch of `batch_size` sequences takes."""
        return self.fixed_bytes + batch_size * self.bytes_per_sequence

    def fits(self, batch_size: int, available: int) -> bool:
        """Return True if a batch of `batch_size` sequences fits into `available` bytes."""
        return self.bytes_for(batch_size) <= _USABLE * available


def available_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the bytes of the device's memory that this process may still allocate.

    Args:
        processes: number of processes on this machine; each has a GPU of its own, but they share
            the main memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return available_memory_bytes() // processes


def largest_batch_that_fits(
    sizes: list[int],
    context_length: int,
    estimate: MemoryEstimate,
    device_type: str,
    available: int,
) -> int:
    """Return the largest batch size that fits and still makes the device faster.

    Args:
        sizes: batch sizes in sequences, ascending; the smallest is returned if none fits, because
            the estimate is an upper bound.
        available: bytes.
    """
    saturating = _SATURATING_TOKENS[device_type]
    fitting = (
        size
        for size in sizes
        if size * context_length <= saturating and estimate.fits(size, available)
    )
    return max(fitting, default=sizes[0])
