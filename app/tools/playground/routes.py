"""The playground's requests: the page, the checkpoints, a text."""

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
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.settings.settings import Settings
from app.tools.playground.generator import Wanted, Writer

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
# The longest prompt fits, whatever its characters.
_MAX_BODY_BYTES = 1 << 20


class OwnPageOnly:
    """Refuses what other web sites let the browser send here.

    A name of theirs that leads to this machine (DNS rebinding) stands in Host, their own address in
    Origin.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if _hostname(host) not in self._names:
            refused = f"this page is for {' and '.join(sorted(self._names))}, not for {host!r}"
        elif origin is not None and origin != f"http://{host}":
            refused = f"a page of {origin!r} may not use this one"
        else:
            await self._app(scope, receive, send)
            return
        await JSONResponse({"error": refused}, status_code=403)(scope, receive, send)


class Lines(StreamingResponse):
    """Messages as lines of JSON, each sent at once; a reader who leaves closes their source."""

    media_type = "application/x-ndjson"

    def __init__(self, messages: AsyncGenerator[dict[str, Any]]) -> None:
        self._messages = messages
        super().__init__(self._lines(), headers=_HEADERS)

    async def _lines(self) -> AsyncGenerator[str]:
        async for message in self._messages:
            yield json.dumps(message) + "\n"

    async def stream_response(self, send: Send) -> None:
        """Send all lines."""
        async with aclosing(self._messages):
            await super().stream_response(send)


def build_app(writer: Writer, settings: Settings) -> ASGIApp:
    """The playground as an ASGI application."""
    names = frozenset(("localhost", "127.0.0.1", "::1", settings.playground.host.lower()))
    defaults = settings.sample.model_dump(
        include={"prompt", "max_tokens", "temperature", "top_k", "seed"}
    )

    def state(_request: Request) -> Response:
        found = {
            "checkpoints": writer.checkpoints(),
            "run": settings.run_dir.name,
            "defaults": defaults,
            "device": writer.device.name,
        }
        return JSONResponse(found, headers=_HEADERS)

    async def generate(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            raise HTTPException(415, "the request must be application/json")
        try:
            wanted = Wanted.model_validate_json(await _body(request))
        except ValidationError as error:
            return JSONResponse({"error": _told(error)}, status_code=422)
        return Lines(writer.write(wanted))

    return Starlette(
        routes=[
            *(Route(path, partial(_file, name)) for path, name in _PAGE.items()),
            Route("/api/state", state),
            Route("/api/generate", generate, methods=["POST"]),
        ],
        middleware=[Middleware(OwnPageOnly, names=names)],
        exception_handlers={HTTPException: _refuse},
    )


def _file(name: str, _request: Request) -> Response:
    path = Path(__file__).with_name(name)
    return Response(path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)


def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _body(request: Request) -> bytes:
    """The request's body; HTTPException if it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, "the prompt is too long")
    return bytes(body)


def _told(error: ValidationError) -> str:
    """All faults of a request, as `temperature: …`."""
    faults = (
        (".".join(map(str, detail["loc"])), detail["msg"].replace("Input should be", "must be"))
        for detail in error.errors(include_url=False)
    )
    return "; ".join(f"{place}: {fault}" if place else fault for place, fault in faults)


def _hostname(host: str) -> str | None:
    """The name in a Host header, without the port; None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
