"""What crashes or hangs takes along its own process only."""

from pathlib import Path

import pytest

from app.tools.doctor.case import Case
from app.tools.doctor.finding import Finding
from app.tools.doctor.supervised import LIMITS, DeviceProcess
from app.tools.doctor.trial import CHECKS
from tests.tools.doctor.conftest import NewCase

pytestmark = pytest.mark.processes


def examine(case: Case, **limits: float) -> list[Finding]:
    with DeviceProcess(case, LIMITS | limits) as device:
        return list(device.findings())


def compiler(folder: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ compiler that does this."""
    program = folder / "c++"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("does", "found", "fix"),
    (
        ("exec sleep 1000", "this has not ended after 30 s", "set TRAIN_COMPILE=false"),
        ("kill -KILL 0", "the process that tried this has died (SIGKILL)", "more memory"),
        ("echo no such option >&2; exit 1", "Error", "set TRAIN_COMPILE=false"),
    ),
)
def test_a_compiler_that_hangs_crashes_or_fails(
    does: str,
    found: str,
    fix: str,
    new_case: NewCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(tmp_path, does, monkeypatch)
    case = new_case(TRAIN_COMPILE="true")
    rows = examine(case, compile=30)
    assert {row.check for row in rows if row.status == "fail"} == {"compile"}, rows
    assert found in rows[-1].found
    assert fix in rows[-1].fix
    # What was learnt before is not lost.
    assert case.trial is not None
    assert case.trial.matmul_flops > 0


def test_every_check_has_a_limit() -> None:
    assert list(CHECKS) == list(LIMITS)


def test_what_follows_a_check_that_hangs_is_not_tried(new_case: NewCase) -> None:
    # Nobody imports torch so fast.
    first, *others = examine(new_case(), device=0.01)
    assert (first.check, first.status) == ("device", "fail")
    assert "has not ended after 0.01 s" in first.found
    assert [(row.check, row.status) for row in others] == [
        (check, "skip") for check in list(LIMITS)[1:]
    ]


def test_a_device_that_is_not_there(new_case: NewCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    case = new_case(TRAIN_DEVICE="cuda")
    (row,) = examine(case)
    assert (row.check, row.status) == ("device", "fail")
    assert row.found.startswith("TRAIN_DEVICE=cuda, but no GPU can be used here")
    assert case.trial is None
