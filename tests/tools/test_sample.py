"""`sample`: real processes, whose output is read as it comes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.errors import ExitCode
from app.inference.text import Sampling, generate_texts
from app.model.gpt import GPT
from app.settings.tools import SampleSettings
from tests.newcomer import REPOSITORY, settle, type_in
from tests.tools.written_run import rewrite, write_run

pytestmark = pytest.mark.processes

FOLDER = "data/runs/small/checkpoints/step-000007"
SPEED = re.compile(r"(\d+) tokens in \d+\.\d s: \d+\.\d tokens/s\n")


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """Change to a new user's folder that has a run; return its model."""
    settle(tmp_path, monkeypatch)
    monkeypatch.setenv("TRAIN_RUN_NAME", "small")
    monkeypatch.setenv("TRAIN_DEVICE", "cpu")
    return write_run(tmp_path / "data" / "runs" / "small")


def expected(model: GPT, **changes: object) -> str:
    """Return the standard output of the command."""
    cfg = SampleSettings.model_validate(changes).model_dump(exclude={"prompt_file", "step"})
    texts = generate_texts(model, Tokenizer(), Sampling(**cfg))
    return f"{FOLDER}:\n" + "".join(f"---\n{text}\n" for text in texts)


@contextmanager
def sampling(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "app", "sample", *words],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test that runs in the background may hand down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        yield process


@pytest.mark.parametrize("rows", (1, 3))
def test_texts_go_to_stdout_and_the_speed_to_stderr(
    model: GPT, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"sample --prompt 'Once ' --num-samples {rows} --max-tokens 30 --seed 4"
    assert type_in(line, monkeypatch) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert out == expected(model, prompt="Once ", num_samples=rows, max_tokens=30, seed=4)
    speed = SPEED.fullmatch(err)
    assert speed
    assert int(speed[1]) == 30 * rows


def test_tokens_after_the_end_of_a_document_are_not_counted(
    model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Greedy, a model of zeros takes the first of its equals, but for the bias of its last norm.
    ends = model
    for parameter in ends.parameters():
        parameter.data.zero_()
    ends.transformer.ln_f.bias.data[0] = 1.0
    ends.transformer.wte.weight.data[END_OF_TEXT, 0] = 1.0
    rewrite(tmp_path / "data" / "runs" / "small", ends)
    assert type_in("sample --prompt Once --temperature 0", monkeypatch) == ExitCode.DONE
    out, err = capsys.readouterr()
    assert out == f"{FOLDER}:\n---\nOnce\n---\nOnce\n"
    assert err.startswith("0 tokens in ")


@pytest.mark.parametrize("end", (b"", b"\n", b"\r\n"))
@pytest.mark.parametrize("way", ("file", "stdin"))
def test_prompt_is_read_from_a_file_or_standard_input(model: GPT, way: str, end: bytes) -> None:
    prompt = "Ça va?\n\n  世界"
    Path("prompt.txt").write_bytes(prompt.encode() + end)
    name = "prompt.txt" if way == "file" else "-"
    words = ("--prompt-file", name, "--max-tokens", "3")
    with sampling(*words) as process:
        given = Path("prompt.txt").read_bytes() if way == "stdin" else b""
        out, _ = process.communicate(given, timeout=300)
    assert out.decode() == expected(model, prompt=prompt, max_tokens=3)


@pytest.mark.parametrize(
    ("line", "problem"),
    (
        ("sample --prompt x --prompt-file y", "only one of them can be the prompt"),
        ("sample --prompt-file nowhere.txt", "there is no file nowhere.txt"),
        ("sample --prompt-file latin.txt", "latin.txt is not UTF-8 text"),
        ("sample --prompt-file data", "Is a directory: data"),
    ),
)
def test_unusable_prompt_is_refused(
    line: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.txt").write_bytes("Ça".encode("latin-1"))
    assert type_in(line, monkeypatch) == ExitCode.USER
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 2)
    assert problem in err


def test_prompt_longer_than_the_context_is_noted_and_truncated(
    model: GPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    continued = set()
    for begin in ("red", "blue"):
        prompt = f"{begin} " + "and so on " * 40
        line = f"sample --prompt '{prompt}' --max-tokens 4 --num-samples 1"
        assert type_in(line, monkeypatch) == ExitCode.DONE
        out, err = capsys.readouterr()
        assert re.match(r"the prompt has 12\d tokens; the model sees the last 64 of them\n", err)
        continued.add(out.partition(prompt)[2])
    assert len(continued) == 1


def test_text_is_streamed_and_ctrl_c_ends_it_at_once() -> None:
    with sampling("--max-tokens", "1000000") as process:
        assert process.stdout is not None
        begun = b""
        while len(begun) < len(FOLDER) + 200:
            piece = os.read(process.stdout.fileno(), 65536)
            assert piece
            begun += piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == ExitCode.SIGINT
    assert err == b"stopped\n"
    # However the signal cut it, what was printed is whole characters and a whole line.
    assert "\ufffd" not in (begun + out).decode()[-4:]
    assert out.endswith(b"\n")


def test_closed_pipe_ends_the_command_silently() -> None:
    with sampling("--max-tokens", "1000000") as process:
        assert process.stdout is not None
        assert process.stdout.readline().decode() == f"{FOLDER}:\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == ExitCode.SIGPIPE


def test_characters_that_a_terminal_lacks_become_question_marks(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with sampling("--prompt", "Ça", "--max-tokens", "60") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    text = expected(model, prompt="Ça", max_tokens=60)
    assert out == text.encode("ascii", "replace")
