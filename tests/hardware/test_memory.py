import pytest
import torch

from app.hardware.memory import MemoryEstimate, available_bytes, largest_batch_that_fits


@pytest.mark.parametrize(
    ("sizes", "available", "device_type", "batch_size"),
    (
        ([1, 2, 4, 8, 16], 10**12, "cpu", 4),  # larger ones would not make a CPU faster
        ([1, 2, 4, 8, 16], 10**12, "cuda", 16),
        ([1, 2, 4, 8, 64], 10**12, "cuda", 8),
        ([1, 2, 4, 8, 16], 5 * 10**9, "cuda", 2),
        ([1, 3, 9], 10**12, "cpu", 3),
        ([1, 2], 10, "cpu", 1),  # the smallest may fit: the estimate is an upper bound
        ([6, 12], 10**12, "cpu", 6),
    ),
)
def test_the_largest_batch_that_fits_and_helps(
    sizes: list[int], available: int, device_type: str, batch_size: int
) -> None:
    estimate = MemoryEstimate(fixed_bytes=10**9, bytes_per_sequence=10**9)
    assert largest_batch_that_fits(sizes, 1024, estimate, device_type, available) == batch_size


def test_an_estimate_grows_with_the_batch() -> None:
    estimate = MemoryEstimate(fixed_bytes=100, bytes_per_sequence=7)
    assert [estimate.bytes_for(batch_size) for batch_size in (0, 1, 10)] == [100, 107, 170]


def test_processes_on_a_cpu_share_the_memory() -> None:
    cpu = torch.device("cpu")
    assert 100_000_000 < available_bytes(cpu) < 1 << 50
    assert available_bytes(cpu, 1 << 50) == 0
