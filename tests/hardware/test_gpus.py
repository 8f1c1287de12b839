import pytest

from app.hardware.gpus import find_gpu


@pytest.mark.parametrize(
    ("name", "bf16_flops", "memory_rate"),
    (
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H100 NVL", 835e12, 3.9e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA GH200 480GB", 989e12, 4.0e12),
        ("NVIDIA L4", 121e12, 0.3e12),
        ("NVIDIA L40", 181e12, 0.864e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 1.01e12),
        ("Tesla V100-SXM2-16GB", 112e12, 0.9e12),
        ("Tesla T4", 65e12, 0.32e12),
        ("NVIDIA GeForce RTX 2080 Ti", 53.8e12, 0.616e12),
        ("NVIDIA GeForce RTX 2080", 40.3e12, 0.448e12),
    ),
)
def test_a_gpu_is_found_by_the_drivers_name(
    name: str, bf16_flops: float, memory_rate: float
) -> None:
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.flops, gpu.memory_rate) == (bf16_flops, memory_rate)


@pytest.mark.parametrize(
    "name",
    (
        "",
        "Tesla P4",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 2080 with Max-Q Design",
        "CPU (AMD EPYC, 2 threads)",
    ),
)
def test_other_names_are_not_in_the_table(name: str) -> None:
    assert find_gpu(name) is None
