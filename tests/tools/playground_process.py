"""A playground process and its client."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

JSON = {"Content-Type": "application/json"}


class Playground:
    """A running playground process, on a free port."""

    def __init__(self, data_dir: Path, run: str) -> None:
        settings = {
            "DATA_DIR": str(data_dir),
            "TRAIN_RUN_NAME": run,
            "TRAIN_DEVICE": "cpu",
            "PLAYGROUND_PORT": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app", "playground"],
            cwd=data_dir,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.match(r"(http://localhost:(\d+)) serves the models in ", line)
        assert match, line + self.wait()[1]
        self.url, self.port = match[1], int(match[2])

    def next_line_matching(self, pattern: str) -> re.Match[str]:
        """Return the match of the next printed line that has this form."""
        assert self.process.stdout is not None
        return next(match for line in self.process.stdout if (match := re.fullmatch(pattern, line)))

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> tuple[int, bytes]:
        """Return the status and the body of the response."""
        connection = HTTPConnection("localhost", self.port, timeout=300)
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()

    def refusal(self, request: dict[str, Any]) -> tuple[int, str]:
        """Return the status and the error message for an invalid request."""
        body = json.dumps(request).encode()
        status, response = self.request("POST", "/api/generate", body)
        return status, json.loads(response)["error"]

    @contextmanager
    def generating(self, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Give the messages of a text as they arrive; leaving the block disconnects."""
        connection = HTTPConnection("localhost", self.port, timeout=300)
        request = {"run": "small", "step": 7} | options
        connection.request("POST", "/api/generate", json.dumps(request), JSON)
        response = connection.getresponse()
        assert response.status == 200
        try:
            yield _messages(response)
        finally:
            response.close()
            connection.close()

    def generate(self, **options: Any) -> list[dict[str, Any]]:
        """Return all messages of a text."""
        with self.generating(**options) as messages:
            return list(messages)

    def wait(self) -> tuple[int, str]:
        """Return the exit code and the standard error."""
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
