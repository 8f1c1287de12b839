import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import __version__
from app.cli.commands import COMMANDS
from app.cli.parser import Parser
from app.errors import ExitCode
from app.settings.settings import GROUPS, VARIABLES
from tests.newcomer import REPOSITORY, settle, type_in
from tests.python_process import run_python


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


def help_of(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    assert type_in(f"{command} --help", monkeypatch) == ExitCode.DONE
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def variables_of(command: str) -> set[str]:
    names = set()
    for flags in COMMANDS[command].flags:
        group, _, only = flags.partition(".")
        fields = GROUPS[group].variables().items()
        names |= {variable for variable, field in fields if only in ("", field)}
    return names - {"HF_TOKEN"}


@pytest.mark.parametrize("columns", (80, 100))
@pytest.mark.parametrize("command", ("", *COMMANDS))
def test_help_fits_the_terminal(
    command: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of(command, monkeypatch, capsys).splitlines()
    assert lines[0].startswith(f"usage: python -m app {command}".rstrip())
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flag_variable_and_default_of_every_setting(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lines may end at a hyphen.
    words = re.sub(r"(?<=\w-)\s+(?=\w)", "", help_of(command, monkeypatch, capsys))
    words = " ".join(words.split())
    for variable in variables_of(command):
        field = VARIABLES[variable].variables()[variable]
        default = VARIABLES[variable].default_text(field)
        shown = f" [{default}]" if default else ""
        description = VARIABLES[variable].description(field)
        flag = f"--{field.replace('_', '-')}"
        assert re.search(rf"{flag} \S+ {re.escape(f'{description}{shown} ({variable})')}", words), (
            variable
        )
    assert "HF_TOKEN" not in words


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_a_command_are_all_different(command: str) -> None:
    fields = [VARIABLES[name].variables()[name] for name in variables_of(command)]
    assert len(set(fields)) == len(fields)


def test_the_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of("", monkeypatch, capsys)
    for name, command in COMMANDS.items():
        assert re.search(rf"(?m)^    {name}\s+{command.description[:30]}", shown)


def test_without_a_command_the_help_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = help_of("", monkeypatch, capsys)
    assert type_in("", monkeypatch) == ExitCode.USER
    assert capsys.readouterr() == ("", expected)


def test_the_version_needs_no_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert type_in("TRAIN_SEED=x --version", monkeypatch) == ExitCode.DONE
    assert capsys.readouterr() == (f"gpt-compose {__version__}\n", "")


def test_the_last_of_several_values_of_a_flag_counts() -> None:
    parser = Parser()
    parser.add_settings(("train",))
    words = ["--max-steps", "5", "--max_steps=many", "--seed=1", "--max-steps=7"]
    assert parser.parse(words)[0] == {"TRAIN_MAX_STEPS": "7", "TRAIN_SEED": "1"}


@pytest.mark.parametrize(
    ("line", "problem"),
    (
        ("train -- --max-steps 3", "unknown argument: --, --max-steps"),
        ("train -lr 3", "unknown argument: -lr; did you mean --learning-rate?"),
        ("train --epochs 3", "unknown argument: --epochs"),
        (
            "train --top-k 3",
            "unknown argument: --top-k (set SAMPLE_TOP_K in the environment or in .env)",
        ),
        (
            "doctor --dataset x",
            "unknown argument: --dataset (set PREPARE_DATASET in the environment or in .env)",
        ),
        ("doctor --top-k 3", "unknown argument: --top-k (a setting of sample)"),
        ("sample --learning-rate 1", "unknown argument: --learning-rate (a setting of train)"),
        ("generate", "'generate' is not a command"),
        ("eval", "'eval' is not a command; did you mean evaluate?"),
    ),
)
def test_advice_on_unknown_words_is_of_use(
    line: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert type_in(line, monkeypatch) == ExitCode.USER
    first, fix = capsys.readouterr().err.splitlines()
    assert first == f"error: {problem}"
    assert fix.startswith("  fix: see `python -m app")


def test_a_value_may_look_like_a_flag() -> None:
    parser = Parser()
    parser.add_settings(("sample",))
    for words in (["--prompt", "--my_flag of it"], ["--prompt=--my_flag of it"]):
        flags, others = parser.parse(["--top_k=5", *words])
        assert flags == {"SAMPLE_TOP_K": "5", "SAMPLE_PROMPT": "--my_flag of it"}
        assert others == {}
    assert parser.parse(["--prompt=--a_b"])[0] == {"SAMPLE_PROMPT": "--a_b"}


def test_flags_accept_dashes_and_underscores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, flag in enumerate(("--total-tokens 1k", "--total_tokens 2k", "--total_tokens=3k")):
        line = f"prepare --dataset stdlib --val_tokens 0 {flag} --out_dir=my_{number}"
        assert type_in(line, monkeypatch) == ExitCode.DONE
        assert Path(f"data/my_{number}").is_dir()
        assert f"{number + 1},000 training" in capsys.readouterr().out


def test_wrong_settings_are_reported_before_torch_is_imported() -> None:
    code = (
        "import sys; from app.cli.process import run; run(['train', '--seed=x']); "
        "print(list(sys.modules))"
    )
    ended = run_python(code)
    assert ended.stderr.startswith("error: TRAIN_SEED=x")
    assert "'pydantic'" in ended.stdout
    assert "'torch'" not in ended.stdout


def test_a_closed_pipe_ends_the_program_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "prepare --dataset stdlib --total-tokens 1k --val-tokens 0"
    assert type_in(line, monkeypatch) == ExitCode.DONE
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", "app", "inspect", "stdlib1K"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (ExitCode.SIGPIPE, "")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    (
        (signal.SIGINT, ExitCode.SIGINT, "stopped\n"),
        (signal.SIGTERM, ExitCode.SIGTERM, "stopped: by SIGTERM\n"),
    ),
)
def test_a_signal_before_the_command_starts_ends_the_program_cleanly(
    number: signal.Signals, code: ExitCode, message: str
) -> None:
    os.mkfifo(".env")
    started = subprocess.Popen(
        [sys.executable, "-m", "app", "train"],
        stderr=subprocess.PIPE,
        text=True,
    )
    # Opening waits for the program to open the other end, and then it waits for us.
    with Path(".env").open("w"):
        started.send_signal(number)
        _, err = started.communicate(timeout=300)
    assert (started.returncode, err) == (code, message)


INTERRUPTS_AN_IMPORT = """
import os, signal, weakref
thing = type("Thing", (), {})()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.%s))
del thing
raise RuntimeError("Python has dropped the exception")
"""


@pytest.mark.parametrize(
    ("number", "package", "code", "message"),
    (
        ("SIGINT", "pydantic", ExitCode.SIGINT, "stopped\n"),
        ("SIGTERM", "pydantic", ExitCode.SIGTERM, "stopped: by SIGTERM\n"),
    ),
)
def test_a_signal_in_an_import_ends_the_program_at_once(
    number: str, package: str, code: ExitCode, message: str
) -> None:
    """An exception would be lost there, or become a traceback of an extension module."""
    Path(package).mkdir()
    Path(package, "__init__.py").write_text(INTERRUPTS_AN_IMPORT % number)
    ended = subprocess.run(
        [sys.executable, "-m", "app", "inspect", "x"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((".", str(REPOSITORY)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (code, message)


def test_the_cluster_reports_that_its_extra_is_missing() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app.cluster", "prepare"],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: this environment does not hold what `app.cluster` needs")
    assert "make test-cluster" in ended.stderr


def test_a_full_disk_is_not_reported_as_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "prepare --dataset stdlib --total-tokens 1k --val-tokens 0"
    assert type_in(line, monkeypatch) == ExitCode.DONE
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "app", "inspect", "stdlib1K"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == ExitCode.EXHAUSTED
    assert ended.stderr.startswith("error: the disk is full: cannot write standard output\n")
    assert ended.stderr.count("\n") == 2


def test_a_model_too_large_for_any_memory_is_not_reported_as_a_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in("prepare --dataset stdlib --total-tokens 2k --val-tokens 0 --out-dir few", monkeypatch)
    capsys.readouterr()
    # 200 TB of embedding: more than a process can address.
    line = "train --dataset-dir few --device cpu --compile false --embd-size 1e9 --num-heads 1"
    assert type_in(line, monkeypatch) == ExitCode.EXHAUSTED
    err = capsys.readouterr().err
    # After the advice on such a run.
    *_, error, fix = err.splitlines()
    assert error.startswith("error: out of memory")
    assert fix.startswith("  fix: ")
