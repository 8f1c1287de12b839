"""Training on a system without /proc, as a Mac is: hidden here in a mount name space."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounts import alone
from tests.train.processes import CHECKOUT, TINY

pytestmark = [pytest.mark.processes, pytest.mark.slow]

HIDE = 'mount --bind "$1" /proc && shift && exec "$@"'


def test_a_run_trains_continues_and_writes_text_without_proc(
    data_dir: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    settings = {"PATH": "/usr/bin:/bin", "DATA_DIR": str(data_dir), **TINY}
    for command, steps in (("train", 2), ("train", 4), ("sample", 4)):
        ended = subprocess.run(
            [*alone("-m"), "sh", "-c", HIDE, "sh", empty, sys.executable, "-m", "app", command],
            cwd=CHECKOUT,
            env=settings | {"TRAIN_MAX_STEPS": str(steps), "TRAIN_WARMUP_STEPS": "0"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
    lines = (data_dir / "runs/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    # What only /proc knows.
    assert json.loads(lines[0])["memory_bytes"] == 0
