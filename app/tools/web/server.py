"""A server on this machine: which address it listens on, and how it ends."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from app.errors import UserError

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import ASGIApp

# Enough for the next token of a large model; open connections are closed after that.
_SHUTDOWN_SECONDS = 2


def listen(host: str, port: int, prefix: str) -> socket.socket:
    """Return a socket that listens on the address; `prefix` is that of its two settings.

    Raises:
        UserError: the address or the port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        is_port = number in (errno.EADDRINUSE, errno.EACCES)
        # create_server() repeats the address.
        reason, _, _ = (text or str(error)).partition(" (while attempting")
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}",
            f"set {prefix}PORT to another port"
            if is_port
            else f"set {prefix}HOST to an address of this machine",
        ) from None


def serve(
    app: ASGIApp,
    listener: socket.socket,
    host: str,
    what: str,
    *,
    before_exit: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it; print `URL serves WHAT` once the server answers."""
    # uvicorn imports asyncio, which is slow.
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"{_url(host, listener)} serves {what}", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            before_exit()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    Server(config).run(sockets=[listener])


def _url(host: str, listener: socket.socket) -> str:
    """Return the address to open in a browser on this machine."""
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
