"""A crash or a hang of the device ends only its own process."""

from pathlib import Path

import pytest

from app.tools.doctor.checks import Context, Finding
from app.tools.doctor.child import LIMITS, device_findings
from app.tools.doctor.device import DeviceChecks
from tests.tools.doctor.conftest import NewContext

pytestmark = pytest.mark.processes


def check(context: Context, **limits: float) -> list[Finding]:
    return list(device_findings(context, LIMITS | limits))


def compiler(folder: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a C++ compiler of a shell command."""
    program = folder / "c++"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "limits", "found", "fix"),
    (
        (
            "exec sleep 1000",
            {"compile": 30},
            "this has not ended after 30 s",
            "set TRAIN_COMPILE=false",
        ),
        ("kill -KILL 0", {}, "the process that tried this has died (SIGKILL)", "more memory"),
        ("exit 1", {}, "torch.compile does not work: CXX=", "set TRAIN_COMPILE=false"),
    ),
)
def test_a_compiler_that_hangs_crashes_or_fails(
    does: str,
    limits: dict[str, float],
    found: str,
    fix: str,
    new_context: NewContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler(tmp_path, does, monkeypatch)
    context = new_context(TRAIN_COMPILE="true")
    rows = check(context, **limits)
    assert {row.check for row in rows if row.status == "fail"} == {"compile"}, rows
    assert found in rows[-1].found
    assert fix in rows[-1].fix
    # Earlier measurements are kept.
    assert context.report is not None
    assert context.report.matmul_flops > 0


def test_every_check_has_a_limit() -> None:
    checks = [name for name in vars(DeviceChecks) if name.startswith("check_")]
    assert checks == [f"check_{name.replace(' ', '_')}" for name in LIMITS]


def test_checks_after_one_that_hangs_are_skipped(new_context: NewContext) -> None:
    # Importing torch takes longer.
    first, *others = check(new_context(), device=0.01)
    assert (first.check, first.status) == ("device", "fail")
    assert "has not ended after 0.01 s" in first.found
    assert [(row.check, row.status) for row in others] == [
        (check, "skip") for check in list(LIMITS)[1:]
    ]


def test_a_missing_device(new_context: NewContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    context = new_context(TRAIN_DEVICE="cuda")
    (row,) = check(context)
    assert (row.check, row.status) == ("device", "fail")
    assert row.found.startswith("TRAIN_DEVICE=cuda, but no GPU can be used here")
    assert context.report is None
