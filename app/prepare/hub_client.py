"""The HTTP client of the hub's libraries, with time limits and visible retries; the hub's errors.

By themselves the libraries wait for some answers without a limit, retry others silently for a
minute, and close each other's connections when one fails.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from app.errors import AppError, NetworkError, UserError
from app.prepare.spec import absence, is_doubtful

_MAX_WAIT_SECONDS = 120.0
_RETRIED_STATUSES = (408, 429, *range(500, 600))
# All other requests are telemetry, which may fail.
_NEEDED = re.compile(
    rf"{re.escape(constants.ENDPOINT)}/(api/(datasets|models)/|datasets/|.*/resolve/)"
)

# When it is set, a request that fails is not tried again: nothing waits for its answer any more.
giving_up = threading.Event()


class UnknownRepositoryError(UserError):
    """The hub has no such repository, or hides it from this user."""


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and what names it in messages.

    Attributes:
        name: a hub id; it may be a mistyped path as long as the hub has not answered
        revision: branch, tag or commit
        kind: what it holds
    """

    name: str
    revision: str = "main"
    kind: Literal["dataset", "model"] = "dataset"

    @property
    def setting(self) -> str:
        """Return the setting that names it."""
        return "PREPARE_DATASET" if self.kind == "dataset" else "TRAIN_INIT_FROM"

    @property
    def local(self) -> str:
        """Return what to do without the hub."""
        if self.kind == "dataset":
            return "point PREPARE_DATASET to local files"
        return (
            "let prepare download it, or point TRAIN_INIT_FROM to a folder with its config.json "
            "and model.safetensors"
        )


def checked_token(token: str | None) -> str | None:
    """Return `token`, or else the one that huggingface_hub finds; None without any.

    Raises:
        UserError: it cannot be sent, and the libraries' error would show it.
    """
    token = token or get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            "the token has characters that no token of the hub has",
            "set HF_TOKEN, or the file that HF_TOKEN_FILE names, to the token and nothing else",
        )
    return token


class HubClient(httpx.Client):
    """Returns complete answers only, and retries while the network or the hub fails.

    After the last try it raises NetworkError, which no library mistakes for an error to retry.

    Args:
        retry_seconds: waits between tries.
        repository: what is wanted from the hub.
    """

    def __init__(
        self, *, retry_seconds: Sequence[float], repository: Repository, **options: Any
    ) -> None:
        super().__init__(**options)
        self._retry_seconds = retry_seconds
        self._unconfirmed, self._setting = repository.name, repository.setting

    def send(
        self, request: httpx.Request, *, stream: bool = False, **options: Any
    ) -> httpx.Response:
        """Send a request; see httpx."""
        limit = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.extensions["timeout"] = limit.as_dict()
        if not _NEEDED.match(str(request.url)):
            return super().send(request, stream=stream, **options)
        # A signed address ends in a secret.
        place = request.url.copy_with(query=None)
        for wait in (*self._retry_seconds, None):
            requested_seconds = 0.0
            try:
                response = super().send(request, **options)
            except httpx.TransportError as error:
                problem = f"{str(error) or type(error).__name__} ({place})"
                if self._unconfirmed and is_doubtful(self._unconfirmed):
                    raise UserError(
                        f"{absence(self._unconfirmed)}; nor can the hub be reached: {problem}",
                        f"correct {self._setting}; for the hub, connect this machine to it",
                    ) from error
                if self._unconfirmed:
                    problem += f"; and {absence(self._unconfirmed)}"
            else:
                self._unconfirmed = ""
                if (fault := _problem(response)) is None:
                    return response
                problem = f"{fault} ({place})"
                requested_seconds = _retry_after(response)
            if wait is None or giving_up.is_set():
                raise NetworkError(
                    f"the hub does not answer: {problem}",
                    "run the same command again later; it continues",
                )
            seconds = max(wait, requested_seconds)
            print(f"the hub does not answer: {problem}; trying again in {seconds:g} s", flush=True)
            if giving_up.wait(seconds):
                raise NetworkError("the hub does not answer", "run the same command again later")
        raise AssertionError("the last try returns or raises")


def use_hub_client(retry_seconds: Sequence[float], repository: Repository) -> None:
    """Make huggingface_hub, and so `datasets`, send everything through HubClient.

    Raises:
        UserError: the hub's address, the proxy or the certificates in the environment are wrong.
    """
    try:
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise ValueError(f"HF_ENDPOINT={constants.ENDPOINT} does not begin with https://")
        hooks = get_session().event_hooks
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise UserError(
            f"the hub cannot be asked: {error}",
            "correct HF_ENDPOINT, SSL_CERT_FILE or the proxy in the environment",
        ) from error
    options: dict[str, Any] = {"event_hooks": hooks, "follow_redirects": True}
    set_client_factory(
        lambda: HubClient(retry_seconds=retry_seconds, repository=repository, **options)
    )


@contextmanager
def hub_errors(repository: Repository, token: str | None) -> Iterator[None]:
    """Turn the ways in which the hub fails or refuses a repository into errors with advice.

    Raises:
        UserError: the hub does not know the repository or the token, or denies access.
        NetworkError: the hub does not answer, or something else answers in its place.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        raise NetworkError(
            f"what answers at {constants.ENDPOINT} is not the hub, but perhaps a log-in page",
            f"connect this machine to the hub, or {repository.local}",
        ) from error
    except (httpx.RequestError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise _explained(error, repository, token) from error


def _explained(error: Exception, repository: Repository, token: str | None) -> AppError:
    name, kind, setting = repository.name, repository.kind, repository.setting
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, OfflineModeIsEnabled):
        return UserError(
            f"{absence(name)}, and HF_HUB_OFFLINE=1 forbids asking the hub",
            f"unset HF_HUB_OFFLINE, or {repository.local}",
        )
    if isinstance(error, GatedRepoError):
        return gated(name, token)
    if isinstance(error, RepositoryNotFoundError):
        return UnknownRepositoryError(
            f"there is no {kind} {name} on the hub, and {absence(name)}",
            f"correct {setting}; a private {kind} needs HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        fix = (
            "correct PREPARE_DATASET_REVISION; a folder that was begun with a commit which the hub "
            "no longer has cannot be continued: set PREPARE_OUT_DIR to another"
        )
        if kind == "model":
            fix = f"correct what follows the @ in {setting}, or leave it out"
        return UserError(f"{name} has no revision {repository.revision!r}", fix)
    if status == 401 and token:
        return UserError(
            "the hub does not know this token (401): it is mistyped, expired or revoked",
            f"set HF_TOKEN to a new one from the hub's settings; public {kind}s need none",
        )
    if status in (400, 401, 403, 404):
        return UserError(
            f"the hub refuses {name} with status {status}: {short(error)}",
            f"correct {setting} or HF_TOKEN (a gated or private {kind} needs one), or try again "
            "later",
        )
    return NetworkError(
        f"the hub does not answer: {short(error)}", f"try again later, or {repository.local}"
    )


def gated(name: str, token: str | None) -> UserError:
    """Return the error for a repository whose terms the token's account has not accepted."""
    reason = "this token may not read it" if token else "it cannot be read without a token"
    return UserError(
        f"{name} is gated, and {reason}",
        "accept its terms on its page, and set HF_TOKEN (for containers HF_TOKEN_FILE) to a token "
        "of that account which may read gated repositories",
    )


def short(error: Exception) -> str:
    """Return a library's message as one short line, without the signatures of addresses."""
    message = str(error).partition("For more information")[0]
    # Anyone who has a signed address can read the file.
    message = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]*", r"\1", message)
    return " ".join(message.split())[:200] or type(error).__name__


def _problem(response: httpx.Response) -> str | None:
    if response.status_code in _RETRIED_STATUSES:
        return f"{response.status_code} {response.reason_phrase}"
    if response.status_code == 206:
        first, _, last = response.request.headers["Range"].removeprefix("bytes=").partition("-")
        expected = int(last) + 1 - int(first) if last else None
        if expected is not None and len(response.content) != expected:
            return f"{len(response.content):,} of {expected:,} bytes arrived"
    return None


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds of the answer's Retry-After, up to a limit."""
    value = response.headers.get("Retry-After", "")
    return min(float(value), _MAX_WAIT_SECONDS) if value.isdigit() else 0.0
