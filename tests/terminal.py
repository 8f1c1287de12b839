"""A pseudo terminal, and what stands on its screen."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Thread

_CHARACTER = re.compile(r"\x1b\[(?P<number>\d*)(?P<command>[A-Za-z])|.", re.DOTALL)


class Terminal:
    """A pseudo terminal of 200 rows."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 200, columns, 0, 0))
        self.stream = os.fdopen(terminal, "w")
        self.written = b""
        self._more = Condition()
        self._reader = Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # Reading fails once the other side is closed.
        with suppress(OSError):
            while part := os.read(self.keyboard, 65536):
                with self._more:
                    self.written += part
                    self._more.notify_all()

    def run(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
        """Run a command on the terminal until it ends, and return its exit code."""
        with self.start(command, folder, environment) as process:
            return process.wait(300)

    @contextmanager
    def start(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command that the keyboard controls; it is killed if it outlives the block."""
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "TERM": "xterm"},
            stdin=self.stream,
            stdout=self.stream,
            stderr=self.stream,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for(self, pattern: bytes) -> None:
        with self._more:
            assert self._more.wait_for(lambda: re.search(pattern, self.written), 300)

    def press_ctrl_c(self) -> None:
        os.write(self.keyboard, b"\x03")

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        self._reader.join()
        os.close(self.keyboard)

    def lines(self) -> list[str]:
        """Return what stood in a line at some time, without the commands that move the cursor."""
        text = re.sub(r"\x1b\[[0-9;]*[B-Za-z]", "", self.written.decode())
        return [line.rstrip() for line in re.split(r"[\r\n]+|\x1b\[A", text) if line.strip()]

    def screen(self) -> list[str]:
        """Return the lines that stand on the screen at the end."""
        rows, row, column = [""], 0, 0
        for match in _CHARACTER.finditer(self.written.decode()):
            # A letter that is no command is a character.
            match match["command"], match[0]:
                case None, "\r":
                    column = 0
                case None, "\n":
                    row += 1
                case "A", _:
                    row -= int(match["number"] or 1)
                case "J", _:
                    rows[row:] = [rows[row][:column]]
                case None, character:
                    if column == self.columns:
                        row, column = row + 1, 0
                    rows += [""] * (row + 1 - len(rows))
                    line = rows[row].ljust(column)
                    rows[row] = line[:column] + character + line[column + 1 :]
                    column += 1
            rows += [""] * (row + 1 - len(rows))
        return [line.rstrip() for line in rows if line.strip()]
