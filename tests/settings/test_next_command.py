"""The command to type next: what finds the run, and nothing that .env says already."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.settings.next_command import command_for_run, command_with_settings
from app.settings.sources import load_settings


@pytest.fixture(autouse=True)
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(
            ("PREPARE_", "MODEL_", "TRAIN_", "SAMPLE_", "DATA_DIR", "RECIPE", "IN_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "gpt_compose", raising=False)


def typed(
    monkeypatch: pytest.MonkeyPatch,
    flags: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    dotenv: str = "",
) -> str:
    """Return the next `sample` of a run, and check that it finds the run in a new shell."""
    if dotenv:
        Path(".env").write_text(dotenv)
    with monkeypatch.context() as context:
        for name, value in (environment or {}).items():
            context.setenv(name, value)
        settings = load_settings(flags, "train")
        command = command_for_run(settings, "sample")
    words = shlex.split(command.removeprefix("python -m app sample"))
    names = (word.removeprefix("--").replace("-", "_").upper() for word in words[::2])
    prefixed = {"RUN_NAME": "TRAIN_RUN_NAME"}
    given = {prefixed.get(name, name): word for name, word in zip(names, words[1::2], strict=True)}
    # Where a folder's name cannot be a run's, the run is the latest.
    if " " not in settings.run_dir.name:
        assert load_settings(given, "sample").run_dir == settings.run_dir
    return command


@pytest.mark.parametrize(
    ("flags", "environment", "dotenv", "expected"),
    (
        ({}, {}, "", ""),
        ({}, {"RECIPE": "demo"}, "", " --recipe demo"),
        ({"RECIPE": "demo"}, {}, "", " --recipe demo"),
        ({}, {}, "RECIPE=demo\n", ""),
        ({"RECIPE": "original"}, {}, "RECIPE=demo\n", " --recipe original"),
        # The name alone finds it.
        ({"TRAIN_RUN_NAME": "mine"}, {"RECIPE": "demo"}, "", " --run-name mine"),
        ({}, {}, "RECIPE=demo\nTRAIN_RUN_NAME=mine\n", ""),
        # What has nothing to do with finding the run is not repeated.
        ({"TRAIN_MAX_STEPS": "30", "TRAIN_DEVICE": "cpu"}, {"TRAIN_SEED": "1"}, "", ""),
        ({"PREPARE_TOTAL_TOKENS": "1M"}, {}, "", " --run-name fineweb1M"),
        ({"TRAIN_DATASET_DIR": "mine"}, {}, "", " --run-name mine"),
        ({"TRAIN_DATASET_DIR": "my text"}, {}, "", ""),
        ({}, {"DATA_DIR": "my data"}, "", " --data-dir 'my data'"),
        ({}, {"DATA_DIR": "my data"}, "DATA_DIR='my data'\n", ""),
        ({"DATA_DIR": "there"}, {"RECIPE": "demo"}, "", " --data-dir there --recipe demo"),
    ),
)
def test_it_has_what_finds_the_run_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, str],
    environment: dict[str, str],
    dotenv: str,
    expected: str,
) -> None:
    command = typed(monkeypatch, flags, environment, dotenv)
    assert command == f"python -m app sample{expected}"


def test_it_is_typed_as_this_command_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt_compose", sys)
    settings = load_settings({"RECIPE": "demo"}, "train")
    assert command_for_run(settings, "report") == "gpt-compose report --recipe demo"


def test_in_a_container_dotenv_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose has passed what the host's .env and shell set; /data is the same in all services."""
    for name, value in {"IN_CONTAINER": "1", "DATA_DIR": "/data", "RECIPE": "demo"}.items():
        monkeypatch.setenv(name, value)
    command = command_for_run(load_settings({}, "train"), "report")
    assert command == "docker compose run --rm report --recipe demo"


def test_own_text_is_found_without_any_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and sample take the latest own text, whose run has its name."""
    content = {"source": {"dataset": "files"}, "totals": {"train_tokens": 300_000}}
    Path("data/story").mkdir(parents=True)
    Path("data/story/manifest.json").write_text(json.dumps(content))
    assert load_settings({}, "train").run_dir == Path("data/runs/story")
    assert typed(monkeypatch, {}) == "python -m app sample"
    assert typed(monkeypatch, {"TRAIN_RUN_NAME": "b"}) == "python -m app sample --run-name b"


@pytest.mark.parametrize("command", ("prepare", "train"))
def test_a_command_that_needs_all_settings_says_so(command: str) -> None:
    def then(**flags: str) -> str:
        typed = command_with_settings(load_settings(flags, "doctor"), command)
        assert typed.startswith(f"python -m app {command}")
        return typed.removeprefix(f"python -m app {command}")

    assert then() == ""
    assert then(RECIPE="demo") == " --recipe demo"
    others = {"RECIPE": "demo", "TRAIN_MAX_STEPS": "90"}
    assert then(**others) == " --recipe demo with the same settings"
    Path(".env").write_text("TRAIN_MAX_STEPS=90\n")
    assert then(**others) == " --recipe demo"


def test_train_has_the_names_that_were_given() -> None:
    settings = load_settings({"TRAIN_RUN_NAME": "a", "TRAIN_DATASET_DIR": "b"}, "doctor")
    expected = "python -m app train --run-name a --dataset-dir b"
    assert command_with_settings(settings, "train") == expected
    expected = "python -m app prepare with the same settings"
    assert command_with_settings(settings, "prepare") == expected
