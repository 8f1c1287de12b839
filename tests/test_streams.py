"""Standard streams that are closed, lost or full, of real processes and pipes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import ExitCode, ExitWithCode, UserError
from app.streams import Output
from tests.newcomer import REPOSITORY

MUCH = "a line\n" * 10_000


def lost(how: str) -> int:
    """Return a descriptor to which nothing can be written."""
    match how:
        case "the pipe's reader has gone":
            reading, writing = os.pipe()
            os.close(reading)
            return writing
        case "the socket's reader has gone":
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours.detach()
        case "the disk is full":
            return os.open("/dev/full", os.O_WRONLY)
    return os.open(os.devnull, os.O_RDONLY)


LOSSES = {
    "the pipe's reader has gone": (ExitWithCode, str(int(ExitCode.SIGPIPE))),
    "the socket's reader has gone": (ExitWithCode, str(int(ExitCode.SIGPIPE))),
    "the disk is full": (OSError, r"\[Errno 28\] No space left on device: 'standard output'"),
    "it is open for reading only": (UserError, "standard output cannot be written: Bad file desc"),
}


@pytest.mark.parametrize("how", LOSSES)
def test_lost_output_is_dropped_unless_it_must_arrive(how: str) -> None:
    descriptor = lost(how)
    output = Output(os.fdopen(descriptor, "wb", closefd=False), "utf-8")
    for _ in range(3):
        print(MUCH, file=output)
        print("a line", file=output, flush=True)
    output.must_arrive = True
    error, message = LOSSES[how]
    with pytest.raises(error, match=message):
        print("a line", file=output, flush=True)
    output.must_arrive = False
    # The buffer is flushed once more when it is closed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    output.close()
    os.close(descriptor)


def test_output_goes_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    number = os.open("/dev/full", os.O_WRONLY)
    output = Output(os.fdopen(number, "wb"), "utf-8")
    print("lost or late", file=output, flush=True)
    with (tmp_path / "disk").open("wb") as disk:
        os.dup2(disk.fileno(), number)
    print("a line", file=output, flush=True)
    assert (tmp_path / "disk").read_text().endswith("a line\n")
    output.close()


PREPARES = """
import os, subprocess, sys
from app.streams import prepare_streams
prepare_streams()
print("Ça — \\udcff", flush=True)
with open(sys.argv[1], "w", encoding="utf-8") as report:
    child = subprocess.run([sys.executable, "-c", "import os; [os.fstat(n) for n in range(3)]"])
    try:
        words = repr(sys.stdin.read())
    except OSError as error:
        words = error.strerror
    streams = [stream.errors for stream in (sys.stdout, sys.stderr)]
    print(report.fileno() > 2, child.returncode, words, *streams, file=report)
"""


def prepared(way: str, place: Path, **environment: str) -> tuple[bytes, str]:
    """Return what a process printed whose streams a shell has changed, and what it found."""
    ended = subprocess.run(
        ["bash", "-c", f'exec "$@" {way}', "-", sys.executable, "-c", PREPARES, str(place)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return ended.stdout, place.read_text()


@pytest.mark.parametrize("way", ("<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"))
def test_closed_streams_are_usable_here_and_in_child_processes(way: str, tmp_path: Path) -> None:
    printed, found = prepared(way, tmp_path / "report")
    words = "Bad file descriptor" if "<&-" in way else "''"
    assert found == f"True 0 {words} backslashreplace backslashreplace\n"
    assert printed.decode() == ("" if " >&-" in f" {way}" else "Ça — \\udcff\n")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    (("ascii", rb"\xc7a \u2014 \udcff"), ("latin-1", b"\xc7a \\u2014 \\udcff"),
     ("utf-8:strict", "Ça — \\udcff".encode()), ("cp1252", b"\xc7a \x97 \\udcff")),
)  # fmt: skip
def test_every_character_can_be_printed(encoding: str, expected: bytes, tmp_path: Path) -> None:
    printed, _ = prepared("", tmp_path / "report", PYTHONIOENCODING=encoding)
    assert printed == expected + b"\n"


def test_output_that_does_not_block_waits_for_its_reader() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    program = f"from app.streams import prepare_streams; prepare_streams(); print({MUCH!r})"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=writing
    ) as process:
        os.close(writing)
        with os.fdopen(reading, "rb") as reader:
            assert reader.read().decode() == f"{MUCH}\n"
    assert process.returncode == 0
