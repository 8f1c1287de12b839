"""Commands on a model, without the name of a run: the latest that has a checkpoint."""

import json
import os
import shutil
from pathlib import Path

import pytest

from app.errors import ExitCode
from app.settings.settings import Settings
from app.settings.sources import load_settings
from app.tools.dataset import dataset_of
from app.tools.latest_run import with_latest_run
from tests.newcomer import settle, type_in
from tests.tools.written_run import write_run

RUNS = Path("data/runs")
SAYS = "data/runs/new: the latest run; TRAIN_RUN_NAME chooses another\n"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the runs `old` and `new`, saved in this order, and one without a checkpoint."""
    settle(tmp_path, monkeypatch)
    for seconds, name in ((2000, "old"), (3000, "new")):
        write_run(RUNS / name)
        os.utime(RUNS / name / "checkpoints" / "step-000007", (seconds, seconds))
    (RUNS / "begun" / "checkpoints").mkdir(parents=True)


def chosen(**flags: str) -> Settings:
    return with_latest_run(load_settings(flags, "sample"))


def test_the_latest_run_is_taken_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen().run_dir == RUNS / "new"
    assert chosen(PREPARE_OUT_DIR="other").run_dir == RUNS / "new"
    assert capsys.readouterr() == ("", 2 * SAYS)


def test_a_run_that_is_named_or_there_is_taken_without_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chosen(TRAIN_RUN_NAME="old").run_dir == RUNS / "old"
    assert chosen(TRAIN_RUN_NAME="missing").run_dir == RUNS / "missing"
    # A recipe names its run.
    assert chosen(RECIPE="demo").run_dir == RUNS / "demo"
    # The run that train would continue with these settings.
    assert chosen(TRAIN_DATASET_DIR="old").run_dir == RUNS / "old"
    (RUNS / "begun" / "metrics.jsonl").touch()
    assert chosen(TRAIN_DATASET_DIR="begun").run_dir == RUNS / "begun"
    shutil.rmtree(RUNS)
    assert chosen().run_dir == RUNS / "fineweb20M"
    assert capsys.readouterr() == ("", "")


def test_the_latest_run_is_measured_on_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Not on text that was prepared later, and not trained on yet."""
    for age, name in enumerate(("later", "text")):
        Path("data", name).mkdir()
        manifest = Path("data", name, "manifest.json")
        manifest.write_text('{"source": {"dataset": "files"}, "totals": {"train_tokens": 9}}')
        os.utime(manifest, (1e9 - age, 1e9 - age))
    trained = load_settings({"TRAIN_DATASET_DIR": "text"}, "train").public()
    (RUNS / "new" / "settings.json").write_text(json.dumps({"settings": trained}))
    for command in ("evaluate", "export"):
        for flags in ({}, {"RECIPE": "own-text"}, {"RECIPE": "own-text", "TRAIN_RUN_NAME": "new"}):
            settings = with_latest_run(load_settings(flags, command))
            assert (settings.run_dir, dataset_of(settings)) == (RUNS / "new", Path("data/text"))
    # What is set is taken, and the text's own run as soon as there is one.
    assert dataset_of(chosen(TRAIN_DATASET_DIR="later")) == Path("data/later")
    (RUNS / "later").mkdir()
    (RUNS / "later" / "metrics.jsonl").touch()
    assert chosen().run_dir == RUNS / "later"


def test_all_commands_take_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in("sample --max-tokens 2 --device cpu", monkeypatch) == ExitCode.DONE
    out, errors = capsys.readouterr()
    assert out.startswith(f"{RUNS}/new/checkpoints/step-000007:\n---\n")
    assert errors.startswith(SAYS)
    assert type_in("inspect", monkeypatch) == ExitCode.DONE
    out, errors = capsys.readouterr()
    assert out.startswith(f"{RUNS}/new: a run with 0 steps in metrics.jsonl\n")
    assert errors == SAYS
    # Neither has what these need as well.
    for command, problem in (
        ("report", f"{RUNS}/new/metrics.jsonl has no steps"),
        ("evaluate", "no dataset in data/fineweb20M: there is no such folder"),
    ):
        assert type_in(command, monkeypatch) == ExitCode.USER
        assert capsys.readouterr().err.startswith(f"{SAYS}error: {problem}\n")
    assert type_in("inspect --run-name missing", monkeypatch) == ExitCode.USER
    assert capsys.readouterr().err == (
        "error: there is no run data/runs/missing\n  fix: set TRAIN_RUN_NAME to one of: new, old\n"
    )
