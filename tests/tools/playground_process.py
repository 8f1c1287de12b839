"""A real `python -m app playground`, and a client on a real socket."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from tests.newcomer import REPOSITORY

JSON = {"Content-Type": "application/json"}


class Playground:
    """A playground that has started, on a port of its own choice."""

    def __init__(self, data_dir: Path, run: str) -> None:
        settings = {
            "DATA_DIR": str(data_dir),
            "TRAIN_RUN_NAME": run,
            "TRAIN_DEVICE": "cpu",
            "PLAYGROUND_PORT": "0",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "playground"],
            cwd=data_dir,
            env=os.environ | settings,
            # A test that runs in the background may hand down an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.match(r"(http://localhost:(\d+)) tries the models of ", line)
        assert found, line + self.wait()[1]
        self.url, self.port = found[1], int(found[2])

    def said_matching(self, pattern: str) -> re.Match[str]:
        """The next line it prints that is of this form."""
        assert self.process.stdout is not None
        return next(found for line in self.process.stdout if (found := re.fullmatch(pattern, line)))

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = HTTPConnection("localhost", self.port, timeout=300)
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()

    def refusal(self, wanted: dict[str, Any]) -> tuple[int, str]:
        """Status and message of the answer to what it should not accept."""
        body = json.dumps(wanted).encode()
        status, answer = self.request("POST", "/api/generate", body)
        return status, json.loads(answer)["error"]

    @contextmanager
    def generating(self, **wanted: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The messages of a text as they arrive; leaving the block hangs up."""
        connection = HTTPConnection("localhost", self.port, timeout=300)
        wanted = {"run": "small", "step": 7} | wanted
        connection.request("POST", "/api/generate", json.dumps(wanted), JSON)
        response = connection.getresponse()
        assert response.status == 200
        try:
            yield _messages(response)
        finally:
            response.close()
            connection.close()

    def generate(self, **wanted: Any) -> list[dict[str, Any]]:
        """All messages of a text."""
        with self.generating(**wanted) as messages:
            return list(messages)

    def wait(self) -> tuple[int, str]:
        """Exit code, and what it has written to standard error."""
        _, errors = self.process.communicate(timeout=300)
        return self.process.returncode, errors


def _messages(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        yield json.loads(line)


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(message.get("text", "") for message in messages)


@contextmanager
def playground(data_dir: Path, run: str = "small") -> Iterator[Playground]:
    started = Playground(data_dir, run)
    try:
        yield started
    finally:
        started.process.kill()
        started.wait()
