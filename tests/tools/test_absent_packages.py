"""An environment without what only prepare, report, playground and TensorBoard need."""

import json
import os
import subprocess
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.train.processes import TINY

pytestmark = pytest.mark.processes

ABSENT = (
    *("datasets", "pyarrow", "awkward", "awkward-cpp", "gigatoken", "huggingface-hub", "zstandard"),
    *("tensorboard", "vl-convert-python", "starlette", "uvicorn"),
)
# A package that can be imported, and of which nothing tells the version.
UNTOLD = "safetensors"


def environment(folder: Path, *names: str) -> Path:
    """Make an environment that links to this one's packages, but for some; return its Python."""
    venv.create(folder)
    packages = {"base": str(folder), "platbase": str(folder)}
    there = Path(sysconfig.get_path("purelib", vars=packages))
    absent = {
        file.parts[0]
        for name in names
        for file in distribution(name).files or ()
        if file.parts[0] != "__pycache__"
    }
    for place in Path(sysconfig.get_path("purelib")).iterdir():
        if place.name not in absent and not place.match(f"{UNTOLD}-*.dist-info"):
            (there / place.name).symlink_to(place)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("environment"), *ABSENT)


def run(python: Path, data_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "app", *words],
        cwd=data_dir,
        env=os.environ | TINY | {"DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def data_dir(python: Path, text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATA_DIR with the dataset `text`, and the run `run` that was trained there on it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").symlink_to(text_shards)
    ended = run(python, folder, "train")
    assert ended.returncode == ExitCode.DONE, ended.stderr
    return folder


def test_run_records_the_versions_of_installed_packages(data_dir: Path) -> None:
    facts = json.loads((data_dir / "runs/run/settings.json").read_text(encoding="utf-8"))
    assert {"python", "torch", "numpy"} <= set(facts["versions"])
    assert not {"datasets", UNTOLD} & set(facts["versions"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    (("sample",), ("evaluate",), ("export",), ("inspect", "text"), ("inspect", "runs/run")),
)
def test_command_runs_without_packages_that_it_does_not_need(
    python: Path, data_dir: Path, words: tuple[str, ...]
) -> None:
    ended = run(python, data_dir, *words)
    assert ended.returncode == ExitCode.DONE, (ended.stdout, ended.stderr)


@pytest.mark.slow
def test_doctor_has_all_its_rows(python: Path, data_dir: Path) -> None:
    ended = run(python, data_dir, "doctor")
    assert ended.returncode == ExitCode.DONE, (ended.stdout, ended.stderr)
    assert "fail" not in {line[:4] for line in ended.stdout.splitlines()}


@pytest.mark.parametrize(
    ("words", "package"),
    (
        (("prepare", "--dataset", "stdlib", "--out-dir", "new"), "pyarrow"),
        (("prepare", "--dataset", "somebody/something", "--out-dir", "new"), "pyarrow"),
        (("playground", "--port", "0"), "starlette"),
        (("report",), "vl-convert-python"),
    ),
)
def test_command_names_the_missing_package(
    python: Path, data_dir: Path, words: tuple[str, ...], package: str
) -> None:
    ended = run(python, data_dir, *words)
    assert (ended.returncode, ended.stdout) == (ExitCode.USER, "")
    assert ended.stderr == (
        f"error: this needs the Python package {package}, which is not installed\n"
        f"  fix: pip install {package}\n"
    )


@pytest.mark.slow
def test_train_and_doctor_report_a_missing_torch(data_dir: Path, tmp_path: Path) -> None:
    python = environment(tmp_path, "torch")
    message = "this needs the Python package torch, which is not installed"
    ended = run(python, data_dir, "train", "--run-name", "new")
    assert ended.returncode == ExitCode.USER
    assert ended.stdout.splitlines()[-1] == "starting torch"
    assert ended.stderr.startswith(
        f"error: {message}\n  fix: install it as docs/install.md describes"
    )
    ended = run(python, data_dir, "doctor")
    assert ended.returncode == ExitCode.BUG
    assert f"fail  device        {message}" in ended.stdout
    assert not ended.stderr
