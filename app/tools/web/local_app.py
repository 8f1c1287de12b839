"""A web application for this machine's browsers: who may use it, and how it refuses others."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send


def headers(scripts: str = "'self'", styles: str = "'self'") -> dict[str, str]:
    """Return the headers of every response, with the page's sources of scripts and styles."""
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"default-src 'none'; script-src {scripts}; style-src {styles}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def local_app(routes: Sequence[BaseRoute], host: str) -> Starlette:
    """Return an application that answers under this machine's names and `host` only."""
    names = frozenset(("localhost", "127.0.0.1", "::1", host.lower()))
    return Starlette(
        routes=routes,
        middleware=[Middleware(SameOriginOnly, names=names)],
        exception_handlers={HTTPException: _refuse},
    )


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


def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


def _hostname(host: str) -> str | None:
    """Return the name in a Host header, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
