"""What happens before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from app.distributed.launch import processes_to_launch
from tests.train.processes import CHECKOUT

# A package of that name stands for torch, of which compiling takes seconds.
IMPORT = """
import sys
from pathlib import Path
from typing import Literal
from app.train.start import keep_bytecode
keep_bytecode(Path("cache"))
import torch, subprocess
subprocess.run([sys.executable, "-c", "import torch.part"], check=True)
"""


def bytecode(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.rglob("*.pyc") if "torch" in path.parts}


@pytest.mark.parametrize("came_with", (False, True))
def test_bytecode_is_kept_for_the_next_start_where_torch_came_without(
    tmp_path: Path, *, came_with: bool
) -> None:
    torch = tmp_path / "packages" / "torch"
    torch.mkdir(parents=True)
    for name in ("__init__.py", "part.py"):
        (torch / name).touch()
    if came_with:
        subprocess.run([sys.executable, "-m", "compileall", "-q", torch], check=True)
    before = bytecode(torch)
    variables = {
        "PYTHONPATH": f"{torch.parent}{os.pathsep}{CHECKOUT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", IMPORT]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, check=True)
    assert bytecode(tmp_path / "cache") == (set() if came_with else {"__init__", "part"})
    assert bytecode(torch) == before


@pytest.mark.parametrize(("given", "expected"), (("auto", 1), (1, 1), (3, 3)))
def test_a_cpu_trains_in_one_process_unless_more_are_wanted(
    given: int | Literal["auto"], expected: int
) -> None:
    assert processes_to_launch(given, "auto") == expected


def test_what_a_launcher_has_started_launches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert processes_to_launch(3, "auto") == 1
