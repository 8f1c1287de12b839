"""What a command imports before it reports an error, or prints where it starts."""

import re
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest

from app.cli.commands import COMMANDS
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from tests.newcomer import settle

# What every command needs for its settings; and those that look at shards or metrics.
SETTINGS = {
    *("annotated_types", "dotenv", "pydantic", "pydantic_core", "pydantic_settings"),
    *("typing_extensions", "typing_inspection"),
}
ARRAYS = {"numpy", "tqdm"}
TOKENIZER = {"tiktoken", "tiktoken_ext"}
# Of Python's own start.
_START = {"_distutils_hack"}
_IMPORTED = re.compile(r"import time: +\d+ \| +\d+ \| +(\w+)")


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


def start(*words: str) -> subprocess.Popen[str]:
    """Start a command that prints its imports between its other lines."""
    return subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "app", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def packages(printed: str) -> set[str]:
    """Return the installed packages that were imported."""
    return set(_IMPORTED.findall(printed)) & packages_distributions().keys() - _START


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_function_that_takes_its_arguments(name: str) -> None:
    command = COMMANDS[name]
    options = [
        details.get("dest", argument.removeprefix("--"))
        for argument, details in command.arguments.items()
    ]
    signature(resolve_name(command.function)).bind("settings", **dict.fromkeys(options))


@pytest.mark.parametrize("words", (("--help",), *((name, "--help") for name in COMMANDS)))
def test_help_imports_only_what_the_settings_need(words: tuple[str, ...]) -> None:
    printed, _ = start(*words).communicate()
    assert "usage: " in printed
    assert packages(printed) <= SETTINGS


@pytest.mark.parametrize(
    ("words", "says", "needs"),
    (
        (("train", "--seed", "x"), "error: TRAIN_SEED=x", set()),
        (("sample", "--sead", "1"), "error: unknown argument: --sead", set()),
        (("sample",), "error: there is no run", set()),
        (("evaluate",), "error: there is no run", ARRAYS),
        (("export",), "error: there is no run", ARRAYS | TOKENIZER),
        (("report",), "error: there is no run", ARRAYS),
        (("inspect", "nothing"), "error: there is no nothing", ARRAYS | TOKENIZER),
        (("train",), "error: no dataset in", ARRAYS),
        (("sweep", "--set", "train.seed=0,1"), "error: no dataset in", ARRAYS),
        (("playground", "--host", "no.such.name.invalid"), "error: cannot listen", set()),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_reported_before_anything_heavy_is_imported(
    words: tuple[str, ...], says: str, needs: set[str]
) -> None:
    process = start(*words)
    printed, _ = process.communicate()
    assert process.returncode == 2
    assert says in printed
    assert packages(printed) <= SETTINGS | needs


def test_train_prints_where_it_starts_before_torch_is_imported() -> None:
    prepare(
        DatasetSpec(
            TextSource("stdlib"), "stdlib", total_tokens=2000, val_tokens=0, shard_size=2000
        ),
        Path("data/text"),
    )
    process = start("train", "--dataset-dir", "text")
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line == "starting torch\n":
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "data/text: 2,000 training tokens" in printed
    assert "data/runs/text: new\n" in printed
    assert packages(printed) <= SETTINGS | ARRAYS
