"""A command that serves a page, and its client."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import Self

JSON = {"Content-Type": "application/json"}


class Served:
    """A running process that serves a page on a port of 127.0.0.1."""

    def __init__(self, data_dir: Path, *words: str, **settings: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", *words, "--port", "0"],
            cwd=data_dir,
            env=os.environ | {"DATA_DIR": str(data_dir)} | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"(http://localhost:(\d+)) serves the ", line)
        assert match, line + self.wait()[1]
        self.url, self.port = match[1], int(match[2])

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, bytes, HTTPMessage]:
        """Return the status, the body and the headers of the response."""
        connection = HTTPConnection("localhost", self.port, timeout=300)
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, bytes]:
        """Return the status and the body of the response."""
        return self.ask(method, path, body, headers)[:2]

    def wait(self) -> tuple[int, str]:
        """Return the exit code and the standard error."""
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Kill the process at the end of the block."""
        try:
            yield self
        finally:
            self.process.kill()
            self.wait()
