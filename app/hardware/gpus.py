"""Data sheet values of GPUs."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Values of a GPU's data sheet, those of its slowest variant.

    Attributes:
        bf16_flops: dense matrix products in bf16, FLOP/s
        memory_rate: bytes/s that its memory reads and writes
    """

    bf16_flops: float
    memory_rate: float


# By a part of the name that the driver reports; the first match counts.
_GPUS = {
    "B200": GPU(2250e12, 8.0e12),
    "H200 NVL": GPU(835e12, 4.8e12),
    "H200": GPU(989e12, 4.8e12),
    "H100 PCIe": GPU(756e12, 2.0e12),
    "H100 NVL": GPU(835e12, 3.9e12),
    "H100": GPU(989e12, 3.35e12),
    "GH200": GPU(989e12, 4.0e12),
    "A100": GPU(312e12, 1.555e12),
    "L40S": GPU(362e12, 0.864e12),
    "L40": GPU(181e12, 0.864e12),
    "L4": GPU(121e12, 0.3e12),
    "A10G": GPU(70e12, 0.6e12),
    "RTX 5090": GPU(209.5e12, 1.79e12),
    "RTX 4090": GPU(165.2e12, 1.01e12),
    "RTX 3090": GPU(71e12, 0.936e12),
}


def find_gpu(name: str) -> GPU | None:
    """Return the data sheet of the GPU with this name; None if it is not in the table."""
    if re.search(r"\bLaptop\b|\bD\b", name):
        # Slower chips under the name of a faster one.
        return None
    return next((gpu for part, gpu in _GPUS.items() if re.search(rf"\b{part}\b", name)), None)
