"""The package as pip installs it: what it holds, and its command in an environment of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from app import __version__
from app.failures import _EXTRAS, TORCH_VERSIONS
from app.settings.__main__ import env_example
from app.settings.sources import recipe_names
from tests.newcomer import REPOSITORY, settle

# In the folder where the user works; Python looks there first for `python -m`.
IN_THE_WAY = ("app.py", "app/__init__.py", "data.py", "json.py", "random.py", "torch.py")
OF_THE_WHEEL = ("__init__", "__main__")
SMALL = {
    "RECIPE": "demo",
    "PREPARE_TOTAL_TOKENS": "4000",
    "PREPARE_VAL_TOKENS": "200",
    "TRAIN_MAX_STEPS": "2",
    "TRAIN_WARMUP_STEPS": "0",
    "TRAIN_VAL_TOKENS": "128",
    "TRAIN_DEVICE": "cpu",
    "SAMPLE_MAX_TOKENS": "4",
}
UV = Path(sys.executable).with_name("uv")


def build(target: str, checkout: Path, folder: Path) -> Path:
    """Build an sdist or a wheel, and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=checkout, capture_output=True, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, as an index's users get it if it has no wheel."""
    folder = tmp_path_factory.mktemp("built")
    with tarfile.open(build("sdist", REPOSITORY, folder / "sdist")) as sdist:
        # The first releases of Python 3.11 have no filters.
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)
        sdist.extractall(folder / "source")
    (source,) = (folder / "source").iterdir()
    return build("wheel", source, folder / "wheel")


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a new folder that has files of the names of modules."""
    for name in IN_THE_WAY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"raise SystemExit('the wrong {name}')")
    settle(folder, monkeypatch)


def test_the_changelog_begins_with_this_version() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert released[0] == __version__


def test_the_wheel_holds_every_file_of_the_program(wheel: Path, tmp_path: Path) -> None:
    files = {
        f"gpt_compose/{path.relative_to(REPOSITORY).as_posix()}"
        for path in (REPOSITORY / "app").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed - {"gpt_compose/revision"} == files | {
        f"gpt_compose/{name}.py" for name in OF_THE_WHEEL
    }
    assert {f"gpt_compose/app/{name}" for name in ("py.typed", "recipes/demo.env")} <= packed
    # Without the detour.
    assert zipfile.ZipFile(build("wheel", REPOSITORY, tmp_path)).namelist() == names


def test_the_wheel_knows_its_commit(wheel: Path) -> None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    told = b""
    if shutil.which("git"):
        told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).stdout
    files = zipfile.ZipFile(wheel)
    known = [files.read(name) for name in files.namelist() if name == "gpt_compose/revision"]
    assert known == ([told] if told else [])


def test_extras_and_torch_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    for name, extra in _EXTRAS.items():
        named = [re.split("[>=]", it)[0] for it in project["optional-dependencies"][extra]]
        assert name in named
    oldest, newer = TORCH_VERSIONS
    assert "torch>={}.{},<{}.{}".format(*oldest, *newer) in project["dependencies"]


def test_ci_runs_on_every_python_that_the_package_names() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    named = [classifier.rpartition(" ")[2] for classifier in project["classifiers"]]
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yaml").read_text("utf-8"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"
    oldest = "torch=={}.{}.0".format(*TORCH_VERSIONS[0])
    assert any(oldest in step.get("run", "") for step in jobs["oldest-torch"]["steps"])


def test_the_installed_command_works_in_any_folder(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_in(tmp_path / "my project", monkeypatch)
    site, others = tmp_path / "site-packages", tmp_path / "others"
    zipfile.ZipFile(wheel).extractall(site)
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "gpt-compose = gpt_compose:main" in entry_points.read_text()
    # As pip writes it; the first place of its imports is its own folder.
    script = site / "gpt-compose"
    script.write_text("from gpt_compose import main\nmain()\n")
    # Another program's package of the same name, where Python looks for everybody's.
    (others / "app").mkdir(parents=True)
    (others / "app" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.setenv("PYTHONPATH", str(others))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *words]
        return subprocess.run(command, env=os.environ | SMALL, capture_output=True, text=True)

    assert "usage: gpt-compose train" in run("train", "--help").stdout
    recipes = ", ".join(recipe_names())
    assert f"Recipes: {recipes}." in " ".join(run("--help").stdout.split())
    assert run("--env-example").stdout == env_example()
    wrong = run("prepare", "--recipe", "dmeo", "--workers", "x").stderr
    assert f"there is no such recipe among {recipes}; did you mean demo?" in wrong
    assert "`gpt-compose prepare --help` and `gpt-compose --env-example` explain" in wrong
    assert "run `gpt-compose prepare` with the same settings" in run("train").stderr
    assert "data/demo: 4,000 training" in run("prepare").stdout
    monkeypatch.setenv("PYTHONPATH", f"{others}:{site}")
    for words, printed in (
        (("gpt_compose", "train", "--help"), "usage: gpt-compose train"),
        (("gpt_compose.app.cluster", "prepare"), "what `app.cluster` needs"),
    ):
        command = [sys.executable, "-P", "-m", *words]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert printed in ended.stdout + ended.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_the_examples_run_with_the_wheel(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_in(tmp_path / "my project", monkeypatch)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site-packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site-packages"))
    monkeypatch.delitem(SMALL, "RECIPE")
    small = SMALL | {"TRAIN_COMPILE": "false"}
    Path("texts").mkdir()
    Path("texts", "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 500)
    page = (REPOSITORY / "docs" / "python.md").read_text("utf-8")
    (tmp_path / "page.py").write_text(page.partition("```python\n")[2].partition("```")[0])

    def lines(script: Path, *words: str) -> list[str]:
        command = [sys.executable, str(script), *words]
        ended = subprocess.run(command, env=os.environ | small, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout.splitlines()

    examples = REPOSITORY / "examples"
    written = lines(tmp_path / "page.py")
    assert any(line.startswith("Once upon a time") for line in written)
    assert "---" in lines(examples / "train_on_own_text.py", "texts")
    assert re.match(r" {1,3}\d+\.\d+%  '", lines(examples / "next_token.py", "A", "first")[0])
    compared = lines(examples / "compare_runs.py")
    assert len([line for line in compared if re.match(r" +0\.0\d+ +1 ", line)]) == 2
    assert {script.name for script in examples.glob("*.py")} == {
        *("train_on_own_text.py", "next_token.py", "compare_runs.py")
    }


class Pod:
    """A rented machine without the checkout, where torch was before the program."""

    def __init__(self, home: Path) -> None:
        self.environment = home / "my env"
        self.variables = {"HOME": str(home), "PATH": f"{self.environment / 'bin'}:/usr/bin:/bin"}
        self.uv("venv", "--python", sys.executable, str(self.environment))
        torch = REPOSITORY / "requirements" / "torch.sh"
        command = [str(torch), str(UV.parent), str(self.environment), "auto"]
        subprocess.run(command, capture_output=True, check=True)

    def uv(self, *words: str) -> None:
        """Run this repository's installer."""
        variables = os.environ | {"UV_FIND_LINKS": "", "UV_PYTHON_DOWNLOADS": "never"}
        ended = subprocess.run([UV, *words], env=variables, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr

    def install(self, package: str) -> None:
        """Install a package and what it needs, as `pip install` would, in the locked versions."""
        lock = str(REPOSITORY / "requirements" / "lock.txt")
        self.uv("pip", "install", "--python", str(self.environment), "-c", lock, package)

    def installed(self) -> dict[str, int]:
        """Return the installed packages, and when each was installed."""
        found = self.environment.glob("lib/python*/site-packages/*.dist-info")
        return {path.name.partition("-")[0]: path.stat().st_mtime_ns for path in found}

    def start(self, line: str) -> subprocess.Popen[str]:
        """Start a line of the user's shell in the current folder."""
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            env=self.variables | SMALL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, line: str) -> tuple[str, str]:
        """Return what a line of the user's shell prints: output and errors."""
        output, errors = self.start(line).communicate()
        return output, errors


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not UV.exists(), reason="no uv beside this Python")
def test_every_command_where_torch_was_before(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = Pod(tmp_path)
    before = pod.installed()
    pod.install(str(wheel))
    after = pod.installed()
    assert {name: after[name] for name in before} == before
    assert "torch" in before
    assert {"gpt_compose", "datasets", "numpy"} <= after.keys() - before.keys()
    assert not [
        name for name in after.keys() - before.keys() if re.match("nvidia|cuda|triton", name)
    ]
    vocabulary = str(REPOSITORY / "requirements" / "vocabulary.txt")
    pod.uv("pip", "install", "--python", str(pod.environment), "--no-deps", "-r", vocabulary)

    work_in(tmp_path / "my work", monkeypatch)
    assert pod.run("gpt-compose prepare")[0].startswith("data/demo: 4,000 training and ")
    output, errors = pod.run("gpt-compose train")
    # Inductor's compiler takes no path with a space.
    assert "not compiled, and slower: torch.compile does not work with the spaces" in output
    assert "after 2 steps: saved data/runs/demo/checkpoints/step-000002" in output, errors
    output, errors = pod.run("gpt-compose train --processes 2 --run-name two --compile false")
    assert "after 2 steps: saved data/runs/two/checkpoints/step-000002" in output, errors
    run = json.loads(Path("data/runs/demo/settings.json").read_text("utf-8"))
    revision = pod.environment.glob("lib/python*/site-packages/gpt_compose/revision")
    assert run["git_revision"] == next((it.read_text("utf-8").strip() for it in revision), None)
    assert run["versions"]["gpt-compose"] == wheel.name.split("-")[1]

    output, errors = pod.run("gpt-compose sample")
    assert output.startswith("data/runs/demo/checkpoints/step-000002:\n---\nclass "), errors
    output, errors = pod.run("gpt-compose evaluate")
    assert "bits per byte" in output, errors
    output, errors = pod.run("gpt-compose inspect runs/demo --verify")
    assert "step-000002" in output, errors
    output, errors = pod.run("gpt-compose export")
    assert Path("data/runs/demo/export/model.safetensors").exists(), errors
    output, errors = pod.run("gpt-compose doctor --compile false --json")
    rows = {row["check"]: row for row in json.loads(output)["findings"]}
    assert rows["device"]["status"] == "pass", rows["device"]

    for command, extra in (("playground --port 0", "playground"), ("report", "report")):
        output, errors = pod.run(f"gpt-compose {command}")
        assert f"  fix: pip install 'gpt-compose[{extra}]'\n" in errors
        pod.install(f"gpt-compose[{extra}]")
    assert pod.run("gpt-compose report")[0].startswith("data/runs/demo/report/report.html\n")
    with pod.start("gpt-compose playground --port 0") as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        with urllib.request.urlopen(url) as page:
            assert b"<title>" in page.read()
        server.terminate()
    assert server.returncode == 143
