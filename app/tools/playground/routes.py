"""The playground's routes: the page, the list of checkpoints, generated text."""

import codecs
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.settings.settings import Settings
from app.tools.playground.generator import MAX_TOKENS, GenerateRequest, Generator

_PAGE = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Enough for the longest prompt of any characters.
_MAX_BODY_BYTES = 1 << 20


class SameOriginOnly:
    """Refuses requests that other web sites make the browser send.

    Host would be a name of theirs that resolves to this machine (DNS rebinding); Origin would be
    their own address.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it with status 403."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if _hostname(host) not in self._names:
            problem = f"this page is served as {' and '.join(sorted(self._names))}, not as {host!r}"
        elif origin is not None and origin != f"http://{host}":
            problem = f"pages of {origin!r} may not use this server"
        else:
            await self._app(scope, receive, send)
            return
        await JSONResponse({"error": problem}, status_code=403)(scope, receive, send)


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


def build_app(generator: Generator, settings: Settings) -> ASGIApp:
    """Return the playground as an ASGI application."""
    names = frozenset(("localhost", "127.0.0.1", "::1", settings.playground.host.lower()))
    defaults = settings.sample.model_dump(
        include={"prompt", "max_tokens", "temperature", "top_k", "seed"}
    )
    defaults["max_tokens"] = min(defaults["max_tokens"], MAX_TOKENS)

    def state(_request: Request) -> Response:
        content = {
            "checkpoints": generator.checkpoints(),
            "run": settings.run_dir.name,
            "defaults": defaults,
            "device": generator.device.name,
        }
        # In ASCII: a run's name may be one that UTF-8 has no bytes for.
        return Response(json.dumps(content), media_type="application/json", headers=_HEADERS)

    async def generate(http_request: Request) -> Response:
        media_type = http_request.headers.get("content-type", "").partition(";")[0]
        if media_type.strip().lower() != "application/json":
            raise HTTPException(415, "the request must be application/json")
        try:
            body = (await _read_body(http_request)).removeprefix(codecs.BOM_UTF8)
            request = GenerateRequest.model_validate_json(body)
        except ClientDisconnect:
            return Response(status_code=400)
        except ValidationError as error:
            return JSONResponse({"error": _explain(error)}, status_code=422)
        return JSONLinesResponse(generator.generate(request))

    return Starlette(
        routes=[
            *(Route(path, partial(_serve_file, name)) for path, name in _PAGE.items()),
            Route("/api/state", state),
            Route("/api/generate", generate, methods=["POST"]),
        ],
        middleware=[Middleware(SameOriginOnly, names=names)],
        exception_handlers={HTTPException: _refuse},
    )


def _serve_file(name: str, _request: Request) -> Response:
    path = Path(__file__).with_name(name)
    return Response(path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)


def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


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


def _hostname(host: str) -> str | None:
    """Return the name in a Host header, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
