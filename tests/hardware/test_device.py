"""The precision that a device computes in, and which requests are refused."""

from pathlib import Path

import pytest
import torch

from app.containers import expects_gpu
from app.errors import UserError
from app.hardware.device import select_device
from tests.python_process import run_python

SELECT = """
from app.hardware.device import select_device
print(select_device("cpu", "auto", "auto").precision)
"""


def selected_with(**variables: str) -> str:
    return run_python(SELECT, **variables).stdout.strip()


def test_a_cpu_trains_in_bf16_where_it_has_units_for_it() -> None:
    capabilities = torch.cpu.get_capabilities()
    has_units = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    if capabilities["architecture"] == "x86_64":
        assert selected_with() == ("bf16" if has_units else "float32")


def test_a_cpu_trains_in_float32_where_bf16_is_emulated() -> None:
    # oneDNN then avoids AVX512-BF16 and AMX, as on a CPU without them.
    assert selected_with(ONEDNN_MAX_CPU_ISA="AVX512_CORE") == "float32"


@pytest.mark.parametrize("precision", ("bf16", "float32"))
def test_a_cpu_takes_the_requested_precision(precision: str) -> None:
    device = select_device("cpu", precision, "false")  # type: ignore[arg-type]
    assert device.precision == precision
    with device.forward_pass():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


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
