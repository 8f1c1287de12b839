"""The checks of the device, called in this process on the CPU."""

from pathlib import Path

import pytest

from app.settings.sources import load_settings
from app.tools.doctor.checks import Finding
from app.tools.doctor.device import DeviceChecks, _compared
from tests.train.processes import TINY


def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> DeviceChecks:
    """Return the checks of a CPU, for TINY with these settings."""
    monkeypatch.chdir(tmp_path)
    on_cpu = {"DATA_DIR": str(tmp_path), "TRAIN_DEVICE": "cpu", "TRAIN_PROCESSES": "1"}
    return DeviceChecks(load_settings(TINY | on_cpu | settings, "doctor"), can_cache=False)


def test_a_small_model_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = checks(tmp_path, monkeypatch, TRAIN_PRECISION="float32")
    assert [row.status for row in device.check_device()] == ["pass"]
    assert list(device.check_precision()) == [
        Finding("precision", "pass", "float32, as TRAIN_PRECISION says")
    ]
    (memory,) = device.check_memory()
    assert memory.status == "pass"
    assert "sequence" in memory.found
    assert [row.status for row in device.check_shared_memory()] == ["skip"]
    assert [row.status for row in device.check_attention()] == ["pass"]


def test_a_model_too_large_for_the_machine_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = str(1 << 18)
    device = checks(tmp_path, monkeypatch, MODEL_EMBD_SIZE=width, MODEL_NUM_LAYERS="1")
    (memory,) = device.check_memory()
    assert memory.status == "fail"
    assert memory.fix == "use a smaller model, or a device with more memory"


@pytest.mark.parametrize(
    ("compiles", "found"),
    (
        ("false", "not needed: TRAIN_COMPILE=false"),
        ("true", "not tried: DATA_DIR's cache cannot be written"),
    ),
)
def test_without_the_compiler_the_plain_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: str, found: str
) -> None:
    device = checks(tmp_path, monkeypatch, TRAIN_COMPILE=compiles)
    assert list(device.check_compile()) == [Finding("compile", "skip", found)]
    assert device.report.compile_seconds == 0
    assert device.report.micro_batch_tokens > 0
    assert device.report.micro_batch_seconds > 0
    assert device.report.optimizer_seconds > 0


@pytest.mark.parametrize(
    ("rate", "peak", "status", "found"),
    (
        (90.0, 100.0, "pass", "90, 90% of its data sheet's rate"),
        (30.0, 100.0, "warn", "30, 30% of its data sheet's rate; 40% and more are usual"),
        (30.0, None, "pass", "30; not compared: no data sheet of this device is known"),
    ),
)
def test_a_rate_is_compared_with_the_data_sheet(
    rate: float, peak: float | None, status: str, found: str
) -> None:
    finding = _compared("copies", f"{rate:g}", rate, peak, 0.4)
    assert (finding.check, finding.status, finding.found) == ("copies", status, found)
    assert bool(finding.fix) == (status == "warn")
