"""The playground's routes: the page, the list of checkpoints, generated text."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Send

from app.settings.settings import Settings
from app.tools.playground.generator import MAX_SAMPLES, MAX_TOKENS, GenerateRequest, Generator
from app.tools.web.local_app import headers, local_app

_PAGE = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = headers()
# Enough for the longest prompt of any characters.
_MAX_BODY_BYTES = 1 << 20


class JSONLinesResponse(StreamingResponse):
    """Streams messages as lines of JSON; closes their source when the client disconnects."""

    media_type = "application/x-ndjson"

    def __init__(self, messages: AsyncGenerator[dict[str, Any]]) -> None:
        self._messages = messages
        super().__init__(self._lines(), headers=_HEADERS)

    async def _lines(self) -> AsyncGenerator[str]:
        async for message in self._messages:
            yield json.dumps(message) + "\n"

    async def stream_response(self, send: Send) -> None:
        """Send all lines, then close the source of the messages."""
        async with aclosing(self._messages):
            await super().stream_response(send)


def build_app(generator: Generator, settings: Settings, problem: str) -> ASGIApp:
    """Return the playground as an ASGI application; the page shows the problem, if any."""
    defaults = settings.sample.model_dump(
        include={"prompt", "num_samples", "max_tokens", "temperature", "top_k", "seed"}
    )
    for name, most in (("max_tokens", MAX_TOKENS), ("num_samples", MAX_SAMPLES)):
        defaults[name] = min(defaults[name], most)

    def state(_request: Request) -> Response:
        content = {
            "checkpoints": generator.checkpoints(),
            "run": settings.run_dir.name,
            "defaults": defaults,
            "device": generator.device.name,
            "problem": problem,
        }
        # In ASCII: a run's name may be one that UTF-8 has no bytes for.
        return Response(json.dumps(content), media_type="application/json", headers=_HEADERS)

    async def generate(http_request: Request) -> Response:
        media_type = http_request.headers.get("content-type", "").partition(";")[0]
        if media_type.strip().lower() != "application/json":
            raise HTTPException(415, "the request must be application/json")
        try:
            request = GenerateRequest.model_validate_json(await _read_body(http_request))
        except ClientDisconnect:
            return Response(status_code=400)
        except ValidationError as error:
            return JSONResponse({"error": _explain(error)}, status_code=422)
        return JSONLinesResponse(generator.generate(request))

    return local_app(
        [
            *(Route(path, partial(_serve_file, name)) for path, name in _PAGE.items()),
            Route("/api/state", state),
            Route("/api/generate", generate, methods=["POST"]),
        ],
        settings.playground.host,
    )


def _serve_file(name: str, _request: Request) -> Response:
    path = Path(__file__).with_name(name)
    return Response(path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)


async def _read_body(request: Request) -> bytes:
    """Return the request's body; raise HTTPException if it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, "the prompt is too long")
    return bytes(body)


def _explain(error: ValidationError) -> str:
    """Return all faults of a request, each as `temperature: …`."""
    faults = (
        (".".join(map(str, fault["loc"])), fault["msg"].replace("Input should be", "must be"))
        for fault in error.errors(include_url=False)
    )
    return "; ".join(f"{field}: {message}" if field else message for field, message in faults)
