"""The package as pip installs it: what it holds, and its command in a folder of a user's."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.newcomer import REPOSITORY, settle

SETTINGS = (
    *("RECIPE=demo", "PREPARE_TOTAL_TOKENS=4000", "PREPARE_VAL_TOKENS=200", "TRAIN_MAX_STEPS=2"),
    *("TRAIN_WARMUP_STEPS=0", "TRAIN_VAL_TOKENS=128", "TRAIN_COMPILE=false", "TRAIN_DEVICE=cpu"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_program(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "app").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {"app/py.typed", "app/recipes/demo.env", "app/tools/report/page.html"} <= packed


def test_the_installed_command_works_in_any_folder(
    wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my project"
    # Another program's package of the same name, where the user works.
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    settle(folder, monkeypatch)
    site = tmp_path / "site-packages"
    wheel.extractall(site)
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "gpt-compose = app.__main__:main" in entry_points.read_text()
    # As pip writes it; the first place of its imports is its own folder.
    script = site / "gpt-compose"
    script.write_text("from app.__main__ import main\nmain()\n")

    def run(*words: str, **settings: str) -> str:
        ended = subprocess.run(
            [sys.executable, str(script), *words],
            env={**os.environ, **dict(line.split("=", 1) for line in SETTINGS), **settings},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "usage: gpt-compose train" in run("train", "--help")
    assert "data/demo: 4,000 training" in run("prepare")
    assert "saved data/runs/demo/checkpoints/step-000002" in run("train", TRAIN_PROCESSES="2")
    assert "data/runs/demo/report/report.html" in run("report")
