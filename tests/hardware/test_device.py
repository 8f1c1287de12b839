"""The precision that a device computes in, and which requests are refused."""

from pathlib import Path

import pytest
import torch

from app.containers import expects_gpu
from app.errors import UserError
from app.hardware.device import AutoOrPrecision, gpu_precision, select_device
from app.hardware.memory import available_bytes
from tests.python_process import run_python

SELECT = """
from app.hardware.device import select_device
print(select_device("cpu", "auto", "auto").precision)
"""


def selected_with(**variables: str) -> str:
    return run_python(SELECT, **variables).stdout.strip()


def test_a_cpu_trains_in_bf16_where_it_has_units_for_it() -> None:
    capabilities = torch.cpu.get_capabilities()
    selected = selected_with()
    assert selected in ("bf16", "float32")
    # By the CPU, AVX512-BF16 alone has up to four times or half the rate of float32.
    if capabilities["architecture"] == "x86_64" and not capabilities.get("avx512_bf16"):
        assert selected == "float32"
    if capabilities.get("amx_bf16"):
        assert selected == "bf16"


def test_a_cpu_trains_in_float32_where_bf16_is_emulated() -> None:
    # oneDNN then avoids AVX512-BF16 and AMX, as on a CPU without them.
    assert selected_with(ONEDNN_MAX_CPU_ISA="AVX512_CORE") == "float32"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    (("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)),
)
def test_a_cpu_takes_the_requested_precision(
    precision: AutoOrPrecision, dtype: torch.dtype
) -> None:
    device = select_device("cpu", precision, "false")
    assert (device.precision, device.dtype) == (precision, dtype)
    with device.forward_pass():
        assert torch.is_autocast_enabled("cpu") == (precision != "float32")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_8_bit_floats_are_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="fp8, but a CPU does not") as refusal:
        select_device("cpu", "fp8", "false")
    assert "TRAIN_PRECISION=auto" in refusal.value.fix


@pytest.mark.parametrize(
    ("in_container", "problem"),
    (
        ("", "this machine has a GPU, but torch, built for CUDA 13.0, cannot use it"),
        ("true", "this container was given a GPU, but torch, built for CUDA 13.0, cannot use it"),
    ),
)
def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(
    in_container: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("EXPECTS_GPU", "true")
    monkeypatch.setenv("IN_CONTAINER", in_container)
    with pytest.raises(UserError) as refusal:
        select_device("auto", "auto", "auto")
    assert refusal.value.problem == problem
    assert select_device("cpu", "float32", "false").torch_device.type == "cpu"


def test_a_gpu_is_expected_where_the_driver_shows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPECTS_GPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert expects_gpu() == any(Path("/dev").glob("nvidia[0-9]*"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not expects_gpu()


@pytest.mark.parametrize(
    ("name", "capability", "has_bf16", "auto", "refused"),
    (
        ("NVIDIA GeForce GTX 1080", (6, 1), False, "float32", ("bf16", "fp8")),
        ("Tesla V100-SXM2-16GB", (7, 0), False, "fp16", ("bf16", "fp8")),
        ("Tesla T4", (7, 5), False, "fp16", ("bf16", "fp8")),
        ("NVIDIA A100-SXM4-40GB", (8, 0), True, "bf16", ("fp8",)),
        ("NVIDIA GeForce RTX 4090", (8, 9), True, "bf16", ()),
        ("NVIDIA H200", (9, 0), True, "bf16", ()),
    ),
)
def test_a_gpu_takes_the_fastest_precision_that_it_has_units_for(
    name: str, capability: tuple[int, int], *, has_bf16: bool, auto: str, refused: tuple[str, ...]
) -> None:
    assert gpu_precision("auto", name, capability, has_bf16=has_bf16) == auto
    requests: tuple[AutoOrPrecision, ...] = ("bf16", "fp16", "float32", "fp8")
    for request in requests:
        if request in refused:
            with pytest.raises(UserError, match=f"TRAIN_PRECISION={request}, but {name} does not"):
                gpu_precision(request, name, capability, has_bf16=has_bf16)
        else:
            assert gpu_precision(request, name, capability, has_bf16=has_bf16) == request


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has Apple's GPU, with 16 GB of memory, and none of NVIDIA."""

    def is_refused(*_arguments: object) -> None:
        raise AssertionError("a call of CUDA")

    for name in (
        *("set_device", "current_device", "device_count", "get_device_name", "synchronize"),
        *("get_device_capability", "get_device_properties", "is_bf16_supported"),
        *("mem_get_info", "max_memory_allocated", "empty_cache"),
    ):
        monkeypatch.setattr(torch.cuda, name, is_refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2_000_000_000)


@pytest.mark.usefixtures("mac")
def test_a_mac_trains_on_its_gpu_in_float32_without_cuda() -> None:
    device = select_device("auto", "auto", "auto")
    assert device.torch_device == torch.device("mps")
    assert (device.precision, device.deterministic, device.peak_flops) == ("float32", False, None)
    assert device.name.startswith("Apple GPU (")
    with device.forward_pass():
        assert not torch.is_autocast_enabled("mps")
    assert device.metadata() == {
        "name": device.name,
        "memory_bytes": 12_000_000_000,
        "precision": "float32",
        "cuda": None,
    }
    assert device.peak_memory_bytes() == 2_000_000_000
    assert available_bytes(device.torch_device, 4) == 10_000_000_000
    # It has no float64.
    assert device.float64_device == torch.device("cpu")
    assert select_device("cpu", "float32", "auto").torch_device.type == "cpu"


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(
    ("precision", "dtype"), (("bf16", torch.bfloat16), ("fp16", torch.float16))
)
def test_apples_gpu_takes_16_bits_on_request(
    precision: AutoOrPrecision, dtype: torch.dtype
) -> None:
    device = select_device("mps", precision, "false")
    with device.forward_pass():
        assert torch.get_autocast_dtype("mps") == dtype
        assert torch.is_autocast_enabled("mps")


@pytest.mark.usefixtures("mac")
def test_apples_gpu_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="TRAIN_PRECISION=fp8, but Apple's GPU does not"):
        select_device("mps", "fp8", "auto")
    with pytest.raises(UserError, match="no deterministic algorithms for Apple's GPU"):
        select_device("auto", "auto", "true")


def test_apples_gpu_is_missed_where_there_is_none() -> None:
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="no GPU of Apple can be used here") as refusal:
            select_device("mps", "auto", "auto")
        assert "TRAIN_DEVICE=auto" in refusal.value.fix
