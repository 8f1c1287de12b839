"""A playground process and its client."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from tests.tools.served import JSON, Served


class Playground(Served):
    """A running playground process, on a free port."""

    def next_line_matching(self, pattern: str) -> re.Match[str]:
        """Return the match of the next printed line that has this form."""
        assert self.process.stdout is not None
        return next(match for line in self.process.stdout if (match := re.fullmatch(pattern, line)))

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


def _messages(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        yield json.loads(line)


def text_of(messages: list[dict[str, Any]], sample: int = 0) -> str:
    steps = [message["pieces"][sample] for message in messages if "pieces" in message]
    return "".join(piece["text"] for piece in steps if piece)


def playground(data_dir: Path, run: str = "small") -> AbstractContextManager[Playground]:
    settings = {"TRAIN_RUN_NAME": run, "TRAIN_DEVICE": "cpu"}
    return Playground(data_dir, "playground", **settings).running()
