"""Every command in a folder with any name, where its output is closed, unread, or not in UTF-8."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
from markupsafe import escape

from app.errors import ExitCode
from tests.newcomer import settle
from tests.train.processes import free_port

pytestmark = pytest.mark.processes

# A dash that Latin-1 lacks, a byte that is not UTF-8, and what has a meaning in shells and pages.
NAME = os.fsdecode(b"a \xe2\x80\x94 \xff '\"<script>\n&")
# Command -> its arguments, and a file that it makes.
MAKERS = {
    "prepare": ("--total-tokens 5000 --out-dir new", "new/manifest.json"),
    "train": (
        "--run-name new --max-steps 1 --val-every 0",
        "runs/new/checkpoints/step-000001/state.json",
    ),
    "evaluate": ("--tokens 256", "runs/small/evaluations.jsonl"),
    "report": ("", "runs/small/report/report.html"),
    "export": ("", "runs/small/export/README.md"),
}
PRINTERS = {"sample": "--max-tokens 4", "inspect": "words --verify", "doctor": "--json"}
WAYS = (
    pytest.param("<&- >&- 2>&-", marks=pytest.mark.slow),
    pytest.param("|", marks=pytest.mark.slow),
    "latin-1",
)


@pytest.fixture(scope="module")
def folder(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with settings, and the folder NAME with a dataset and a run."""
    folder = tmp_path_factory.mktemp("lost") / "folder"
    shutil.copytree(small_run, folder)
    (folder / "data").rename(folder / NAME)
    (folder / NAME / NAME).symlink_to("words")
    return folder


@pytest.fixture(autouse=True)
def settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(folder, monkeypatch)
    monkeypatch.setenv("DATA_DIR", NAME)


def run(line: str, way: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run a command as a shell does that changes its streams; "|" is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {"PYTHONIOENCODING": "latin-1"} if way == "latin-1" else {}
    redirection = {"latin-1": "", "|": f">&{writing} 2>&{writing}"}.get(way, way)
    program = [sys.executable, "-m", "app", *line.split()]
    try:
        return subprocess.run(
            ["bash", "-c", f'exec "$@" {redirection}', "-", *program],
            env=os.environ | environment,
            capture_output=True,
            pass_fds=(writing,),
            check=False,
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", MAKERS)
def test_a_command_makes_its_files_whatever_becomes_of_its_output(command: str, way: str) -> None:
    made = Path(NAME, MAKERS[command][1])
    for new in (NAME / Path("new"), NAME / Path("runs/new")):
        shutil.rmtree(new, ignore_errors=True)
    made.unlink(missing_ok=True)
    ended = run(f"{command} {MAKERS[command][0]}", way)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert made.stat().st_size
    assert (rb"a \u2014 \udcff '" in ended.stdout) == (way == "latin-1")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("command", PRINTERS)
def test_a_command_that_only_prints_ends_where_nobody_reads(command: str, way: str) -> None:
    ended = run(f"{command} {PRINTERS[command]}", way)
    assert b"Traceback" not in ended.stderr
    if way == "|":
        assert ended.returncode == ExitCode.SIGPIPE
    else:
        # A check of doctor may fail on this machine.
        assert ended.returncode in ((0, 1) if command == "doctor" else (0,))
    if way != "latin-1":
        assert ended.stdout == b""
    elif command == "doctor":
        found = json.loads(ended.stdout)["findings"]
        assert found[0]["found"].startswith(f"{NAME}/words: ")
    else:
        dash, byte = ("?", "?") if command == "sample" else (r"\u2014", r"\udcff")
        assert ended.stdout.decode("latin-1").startswith(f"a {dash} {byte} '")


@pytest.mark.slow
def test_a_name_is_kept_in_json_and_shown_in_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_DATASET_DIR", NAME)
    # Without a name of its own, the run has the dataset's.
    env = (folder / ".env").read_text()
    (folder / ".env").write_text(env.replace("TRAIN_RUN_NAME=small\n", ""))
    for line in ("train --max-steps 1", "train --max-steps 2", "report", "export"):
        ended = run(line)
        assert ended.returncode == 0, ended.stderr.decode()
    (folder / ".env").write_text(env)
    made = Path(NAME, "runs", NAME)
    found = json.loads((made / "settings.json").read_bytes())
    assert found["settings"]["general"]["data_dir"] == NAME
    assert found["dataset"]["folder"] == NAME
    assert (made / "report/report.png").stat().st_size
    shown = NAME.encode(errors="replace").decode()
    html = (made / "report/report.html").read_text(encoding="utf-8")
    assert f"<title>{escape(shown)}</title>" in html
    assert "<script>\n&" not in html
    card = (made / "export/README.md").read_text(encoding="utf-8")
    assert "\n# a \u2014 ? '\"&lt;script&gt; &amp;\n\n" in card


def test_playground_serves_where_nobody_reads_its_output() -> None:
    port, (reading, writing) = free_port(), os.pipe()
    os.close(reading)
    shutil.copytree(Path(NAME, "runs/small"), Path(NAME, "runs", NAME), dirs_exist_ok=True)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "app", "playground", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
        ) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.terminate)
        os.close(writing)
        connection, deadline = HTTPConnection("127.0.0.1", port), time.monotonic() + 300
        while connection.sock is None and time.monotonic() < deadline:
            with suppress(ConnectionRefusedError):
                connection.connect()
            time.sleep(0.05)
        connection.request("GET", "/api/state")
        state = json.loads(connection.getresponse().read())
        assert state["run"] == "small"
        assert NAME in [run["run"] for run in state["checkpoints"]]
        connection.close()
    assert process.returncode in (0, ExitCode.SIGTERM)
