"""`sample`: real processes, whose output is read as it comes."""

import codecs
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
import torch

from app.data.tokenizer import END_OF_TEXT, Tokenizer
from app.errors import ExitCode
from app.inference.text import Sampling, generate_texts
from app.model.gpt import GPT
from app.settings.tools import SampleSettings
from app.tools.sample import read_prompt
from tests.newcomer import settle, type_in
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


@pytest.mark.parametrize(
    "content",
    (
        "Ça va? 😀\r\n".encode("utf-8-sig"),
        "Ça va? 😀\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "Ça va? 😀".encode("utf-16-be"),
        "Ça va? 😀\r\n".encode("utf-32"),
        "<|endoftext|>Ça va? 😀\n".encode("utf-8-sig"),
    ),
)
@pytest.mark.parametrize("way", ("file", "pipe"))
def test_a_mark_of_a_prompt_file_is_its_encoding_and_not_text(
    tmp_path: Path, content: bytes, way: str
) -> None:
    path = tmp_path / "prompt.txt"
    if way == "pipe":
        os.mkfifo(path)
        Thread(target=path.write_bytes, args=(content,)).start()
    else:
        path.write_bytes(content)
    prompt = read_prompt(str(path))
    assert prompt.removeprefix("<|endoftext|>") == "Ça va? 😀"
    assert Tokenizer().encode_prompt(prompt) == Tokenizer().encode_prompt("Ça va? 😀")


def test_an_empty_prompt_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", codecs.BOM_UTF8):
        (tmp_path / "empty.txt").write_bytes(content)
        assert read_prompt(str(tmp_path / "empty.txt")) == ""
        assert "empty.txt is empty: the texts begin a new document\n" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_an_error(
    model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model.transformer.ln_f.bias.data[0] = torch.inf
    rewrite(tmp_path / "data" / "runs" / "small", model)
    for command in ("sample --temperature 0", "sample"):
        assert type_in(command, monkeypatch) == ExitCode.USER
        assert capsys.readouterr().err.startswith(f"error: {FOLDER} has weights that are not fin")


@contextmanager
def sampling(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-m", "app", "sample", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
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
        ("sample --prompt-file latin.txt", "latin.txt is not text in UTF-8, nor in UTF-16 with"),
        ("sample --prompt-file unmarked.txt", "unmarked.txt is not text in UTF-8"),
        ("sample --prompt-file data", "data is a folder, not a file"),
        ("sample --prompt-file huge.txt", "huge.txt is larger than 16 MB"),
        ("sample --prompt-file /dev/zero", "/dev/zero is larger than 16 MB"),
    ),
)
def test_unusable_prompt_is_refused(
    line: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("latin.txt").write_bytes("Ça".encode("latin-1"))
    Path("unmarked.txt").write_bytes("Once".encode("utf-16-le"))
    with Path("huge.txt").open("wb") as huge:
        huge.truncate(1 << 40)
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
        assert re.match(
            r"the first \d+ of the prompt's 12\d tokens are cut off: the model sees the last 64",
            err,
        )
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
