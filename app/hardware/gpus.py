"""Data sheet values of GPUs."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Values of a GPU's data sheet, those of its slowest variant.

    Attributes:
        flops: FLOP/s of dense matrix products in bf16, or in fp16 where there is no bf16, with sums
            in float32
        memory_rate: bytes/s that its memory reads and writes
        float32_share: rate of products in TF32, or in float32 where there is no TF32, as a share of
            `flops`
    """

    flops: float
    memory_rate: float
    float32_share: float = 1 / 2


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
    "V100": GPU(112e12, 0.9e12, 1 / 8),
    "T4": GPU(65e12, 0.32e12, 1 / 8),
    "TITAN RTX": GPU(130.5e12, 0.672e12, 1 / 8),
    "RTX 2080 Ti": GPU(53.8e12, 0.616e12, 1 / 4),
    "RTX 2080 SUPER": GPU(44.6e12, 0.496e12, 1 / 4),
    "RTX 2080": GPU(40.3e12, 0.448e12, 1 / 4),
    "RTX 2070 SUPER": GPU(36.2e12, 0.448e12, 1 / 4),
    "RTX 2070": GPU(29.9e12, 0.448e12, 1 / 4),
}


def find_gpu(name: str) -> GPU | None:
    """Return the data sheet of the GPU with this name; None if it is not in the table."""
    if re.search(r"\bLaptop\b|\bD\b|\bMax-Q\b", name):
        # Slower chips under the name of a faster one.
        return None
    return next((gpu for part, gpu in _GPUS.items() if re.search(rf"\b{part}\b", name)), None)
