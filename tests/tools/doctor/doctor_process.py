"""Run `python -m app doctor` in a process of its own, and read the table that it prints."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.faults import bind_root
from tests.train.processes import CHECKOUT, TINY

_ROW = re.compile(r"(pass|warn|fail|skip)  (.{13}) (.+)")
_FIX = re.compile(r" {20}fix: (.+)")
NONE: Mapping[str, str] = {}


@dataclass
class Row:
    """A row of the table."""

    status: str
    found: str
    fix: str = ""


@dataclass
class Result:
    """Doctor's output and exit code."""

    code: int
    output: str
    error: str
    rows: dict[str, Row]

    def assert_failed(self, check: str, found: str, fix: str) -> None:
        row = self.rows[check]
        assert row.status == "fail", self.output
        assert found in row.found
        assert fix in row.fix
        assert self.code == 1

    @property
    def failures(self) -> set[str]:
        return {check for check, row in self.rows.items() if row.status == "fail"}


def environment(data_dir: Path, changes: Mapping[str, str]) -> dict[str, str]:
    """Return TINY's settings with these changes."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TORCHINDUCTOR", "TRITON"))
    }
    own = {"DATA_DIR": str(data_dir), "PREPARE_DATASET": "stdlib"}
    return {**kept, **TINY, "PREPARE_OUT_DIR": "text", **own, **changes}


def start_doctor(
    data_dir: Path, *arguments: str, variables: Mapping[str, str] = NONE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app", "doctor", *arguments],
        cwd=CHECKOUT,
        env=environment(data_dir, variables),
        preexec_fn=bind_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def doctor(data_dir: Path, *arguments: str, variables: Mapping[str, str] = NONE) -> Result:
    """Run doctor to its end."""
    process = start_doctor(data_dir, *arguments, variables=variables)
    output, error = process.communicate(timeout=600)
    assert "Traceback" not in output + error, output + error
    return Result(process.returncode, output, error, table(output))


def table(output: str) -> dict[str, Row]:
    """Return check -> its row; of several the worst."""
    rows: dict[str, Row] = {}
    last = Row("", "")
    for line in output.splitlines():
        if fix := _FIX.fullmatch(line):
            last.fix = fix[1]
        elif row := _ROW.fullmatch(line):
            last = Row(row[1], row[3])
            check = row[2].strip()
            if check not in rows or last.status == "fail":
                rows[check] = last
    return rows
