"""The playground's server: which address it listens on, and how it ends."""

from __future__ import annotations

import errno
import socket
import sys
from typing import TYPE_CHECKING

from app.errors import UserError
from app.runs.checkpoints import missing_run_error
from app.settings.settings import Settings

if TYPE_CHECKING:
    from types import FrameType

# Enough for the next token of a large model; open connections are closed after that.
_SHUTDOWN_SECONDS = 2


def playground(settings: Settings) -> None:
    """Serve the page until a signal ends it.

    Raises:
        UserError: the address or the port cannot be listened on.
    """
    cfg = settings.playground
    if settings.train.run_name and not settings.run_dir.is_dir():
        missing = missing_run_error(settings.run_dir)
        print(f"warning: {missing.problem}: {missing.fix}", file=sys.stderr, flush=True)
    with listen(cfg.host, cfg.port) as listener:
        _serve(settings, listener)


def _serve(settings: Settings, listener: socket.socket) -> None:
    # Imported after the port is bound, because torch takes seconds.
    import uvicorn

    from app.hardware.device import select_device
    from app.tools.playground.generator import Generator
    from app.tools.playground.routes import build_app

    device = select_device(settings.train.device, "float32", "auto")
    generator = Generator(settings.general.data_dir / "runs", device)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Print the address once the server answers."""
            await super().startup(sockets)
            url = _url(settings.playground.host, listener)
            print(f"{url} serves the models in {generator.runs_dir}", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """End the current text as well."""
            generator.is_closing = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        build_app(generator, settings),
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address.

    Raises:
        UserError: the address or the port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        is_port = number in (errno.EADDRINUSE, errno.EACCES)
        raise UserError(
            f"cannot listen on {host}, port {port}: {error}",
            "set PLAYGROUND_PORT to another port"
            if is_port
            else "set PLAYGROUND_HOST to an address of this machine",
        ) from None


def _url(host: str, listener: socket.socket) -> str:
    """Return the address to open in a browser on this machine."""
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
