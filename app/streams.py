"""A process's standard streams, whatever the shell or launcher has made of them."""

import errno
import os
import sys
from contextlib import suppress
from io import TextIOWrapper

from app.errors import ExitCode, ExitWithCode, UserError


class Output(TextIOWrapper):
    """Standard output or error that may be lost, as when its reader has gone or its disk is full.

    What cannot be written is dropped, and the program's work goes on.

    Attributes:
        must_arrive: True if the output is the program's result: losing it is an error
    """

    must_arrive = False

    def write(self, text: str, /) -> int:
        """Write text; raise ExitWithCode, UserError or OSError if it is lost and must arrive."""
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer; raise the same errors as write."""
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self.must_arrive:
            return
        if isinstance(error, ConnectionError):
            # head or less has read enough.
            raise ExitWithCode(ExitCode.SIGPIPE)
        if error.errno in (errno.EBADF, errno.EIO):
            problem = f"standard output cannot be written: {error.strerror}"
            raise UserError(problem, "send it to a terminal, a file or a program")
        error.filename = "standard output"
        raise error


def prepare_streams() -> None:
    """Make the standard streams usable: none is closed, and every character can be printed."""
    for name in ("stdin", "stdout", "stderr"):
        stream, is_input = getattr(sys, name), name == "stdin"
        if stream is None:
            # The lowest free descriptor is the closed stream's. No other file can get it now, here
            # or in a child process. Reading from it still fails.
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.set_inheritable(descriptor, True)
            stream = os.fdopen(descriptor, "r" if is_input else "w", closefd=False)
        if not is_input:
            options = {
                "line_buffering": stream.line_buffering,
                "write_through": stream.write_through,
            }
            encoding = stream.encoding
            with suppress(OSError):
                # Another program on the same terminal may have made it non-blocking.
                os.set_blocking(stream.fileno(), True)
            stream = Output(stream.detach(), encoding, "backslashreplace", **options)
        setattr(sys, name, stream)
        # shutil.get_terminal_size asks this one for the width.
        setattr(sys, f"__{name}__", stream)
