"""`python -m app doctor` in a process of its own, and the table that it prints."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from app.settings.settings import GROUPS
from tests.faults import bind_root
from tests.train.processes import CHECKOUT, TINY

_ROW = re.compile(r"(pass|warn|fail|skip)  (.{13}) (.+)")
_FIX = re.compile(r" {20}fix: (.+)")
_PREFIXES = tuple(group.prefix() for group in GROUPS.values() if group.prefix())
NONE: Mapping[str, str] = {}


@dataclass
class Row:
    """A row of the table."""

    status: str
    found: str
    fix: str = ""


@dataclass
class Told:
    """What doctor has printed, and its exit code."""

    code: int
    output: str
    error: str
    rows: dict[str, Row]

    def failed(self, check: str, found: str, fix: str) -> None:
        """A check has failed, and says so."""
        row = self.rows[check]
        assert row.status == "fail", self.output
        assert found in row.found
        assert fix in row.fix
        assert self.code == 1

    @property
    def failures(self) -> set[str]:
        return {check for check, row in self.rows.items() if row.status == "fail"}


def environment(data_dir: Path, changes: Mapping[str, str]) -> dict[str, str]:
    """TINY's settings and these changes; nothing of the developer's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*_PREFIXES, "RECIPE", "HF_", "TORCHINDUCTOR", "TRITON", "CXX"))
    }
    own = {"DATA_DIR": str(data_dir), "PYTHONPATH": str(CHECKOUT), "PREPARE_DATASET": "stdlib"}
    return {**kept, **TINY, "PREPARE_OUT_DIR": "text", **own, **changes}


def start_doctor(
    data_dir: Path, *words: str, variables: Mapping[str, str] = NONE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app", "doctor", *words],
        cwd=CHECKOUT,
        env=environment(data_dir, variables),
        preexec_fn=bind_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def doctor(data_dir: Path, *words: str, variables: Mapping[str, str] = NONE) -> Told:
    """Run it to its end."""
    process = start_doctor(data_dir, *words, variables=variables)
    output, error = process.communicate(timeout=600)
    assert "Traceback" not in output + error, output + error
    return Told(process.returncode, output, error, table(output))


def table(output: str) -> dict[str, Row]:
    """Check -> its row; of several the worst."""
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
