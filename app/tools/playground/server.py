"""The playground's process: where it listens, and how it ends."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from app.errors import UserError
from app.settings.settings import Settings

if TYPE_CHECKING:
    from types import FrameType

# A token of a large model takes its time; whoever is not done then is cut off.
_GRACE_SECONDS = 2


def playground(settings: Settings) -> None:
    """Serve the page until a signal ends it.

    Raises:
        UserError: it cannot listen there.
    """
    chosen = settings.playground
    with listening(chosen.host, chosen.port) as listener:
        _serve(settings, listener)


def _serve(settings: Settings, listener: socket.socket) -> None:
    # Torch takes seconds to import: what can be wrong without it has been told by now.
    import uvicorn

    from app.hardware.device import select_device
    from app.tools.playground.generator import Writer
    from app.tools.playground.routes import build_app

    device = select_device(settings.train.device, "float32", "auto")
    writer = Writer(settings.general.data_dir / "runs", device)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Say where it is, once it answers and ends in order."""
            await super().startup(sockets)
            address = _address(settings.playground.host, listener)
            print(f"{address} tries the models of {writer.runs}", flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """End the text under way, too."""
            writer.is_closing = True
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        build_app(writer, settings),
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    Server(config).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        is_port = number in (errno.EADDRINUSE, errno.EACCES)
        raise UserError(
            f"cannot listen at {host}, port {port}: {error}",
            "set PLAYGROUND_PORT to another port"
            if is_port
            else "set PLAYGROUND_HOST to an address of this machine",
        ) from None


def _address(host: str, listener: socket.socket) -> str:
    """Return the address to open in a browser here."""
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
