"""The HTTP client of the hub's libraries: time limits, and retries that are told.

By themselves they wait for some answers without a limit, try others again for a minute in
silence, and close each other's connections when one fails.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from app.errors import NetworkError, UserError

_LONGEST_WAIT_SECONDS = 120.0
_WORTH_A_RETRY = (408, 429, *range(500, 600))
# Anything else is telemetry, which may fail.
_NEEDED = (f"{constants.ENDPOINT}/api/datasets/", f"{constants.ENDPOINT}/datasets/")

# Once it is set, a request that fails is given up: nobody waits for it any more.
giving_up = threading.Event()


def checked_token(token: str | None) -> str | None:
    """The token given, or else the one that huggingface_hub finds; None without any.

    Raises:
        UserError: it cannot be sent: errors of the libraries would show it.
    """
    token = token or get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            "the token has characters that no token of the hub has",
            "set HF_TOKEN, or the file that HF_TOKEN_FILE names, to the token and nothing else",
        )
    return token


class HubClient(httpx.Client):
    """Gives whole answers only, and asks again a few times while the network or the hub fails.

    It raises NetworkError in the end, which no library takes for an error that it could retry.

    Args:
        retry_seconds: waits before each new try.
        options: of httpx.Client.
    """

    def __init__(self, *, retry_seconds: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self._retry_seconds = retry_seconds

    def send(
        self, request: httpx.Request, *, stream: bool = False, **options: Any
    ) -> httpx.Response:
        """Send a request; see httpx."""
        limit = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.extensions["timeout"] = limit.as_dict()
        if not str(request.url).startswith(_NEEDED):
            return super().send(request, stream=stream, **options)
        # Without what a signed address ends in, which nobody else may see.
        place = request.url.copy_with(query=None)
        for wait in (*self._retry_seconds, None):
            asked_seconds = 0.0
            try:
                response = super().send(request, **options)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if (found := _problem(response)) is None:
                    return response
                problem = found
                asked_seconds = _asked_to_wait(response)
            if wait is None or giving_up.is_set():
                raise NetworkError(
                    f"the hub does not answer: {problem} ({place})",
                    "run the same command again later; it continues",
                )
            seconds = max(wait, asked_seconds)
            print(
                f"the hub does not answer: {problem} ({place}); trying again in {seconds:g} s",
                flush=True,
            )
            if giving_up.wait(seconds):
                raise NetworkError("the hub does not answer", "run the same command again later")
        raise AssertionError("the last try returns or raises")


def use_hub_client(retry_seconds: Sequence[float]) -> None:
    """Make huggingface_hub, and so `datasets`, send everything through HubClient."""
    hooks = get_session().event_hooks
    set_client_factory(
        lambda: HubClient(retry_seconds=retry_seconds, event_hooks=hooks, follow_redirects=True)
    )


@contextmanager
def refusals_named(dataset: str, revision: str, token: str | None) -> Iterator[None]:
    """Turn the ways in which the hub refuses a dataset into errors that say what to do.

    Raises:
        UserError: the hub does not know the dataset or the token, or keeps them apart.
        NetworkError: what answers is not the hub.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        raise NetworkError(
            f"what answers at {constants.ENDPOINT} is not the hub, but a log-in page, say",
            "connect this machine to the hub, or point PREPARE_DATASET to local files",
        ) from error
    except GatedRepoError as error:
        raise gated(dataset, token) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no dataset {dataset} on the hub, and no such file or folder here",
            "correct PREPARE_DATASET; a private dataset needs HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{dataset} has no revision {revision!r}",
            "correct PREPARE_DATASET_REVISION; a folder that was begun with a commit which the hub "
            "has no more cannot be continued: set PREPARE_OUT_DIR to another",
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(
                "the hub does not know this token (401): it is mistyped, expired or revoked",
                "set HF_TOKEN to a new one from the hub's settings; public datasets need none",
            ) from error
        raise UserError(
            f"the hub refuses {dataset} with status {status}",
            "correct PREPARE_DATASET or HF_TOKEN, or try again later",
        ) from error


def gated(dataset: str, token: str | None) -> UserError:
    """The error for a dataset that the hub gives to those who have accepted its terms."""
    why = "this token may not read it" if token else "it is not given without a token"
    return UserError(
        f"{dataset} is gated, and {why}",
        "accept its terms on its page, and set HF_TOKEN (for containers HF_TOKEN_FILE) to a token "
        "of that account which may read gated repositories",
    )


def _problem(response: httpx.Response) -> str | None:
    if response.status_code in _WORTH_A_RETRY:
        return f"{response.status_code} {response.reason_phrase}"
    if response.status_code == 206:
        first, _, last = response.request.headers["Range"].removeprefix("bytes=").partition("-")
        wanted = int(last) + 1 - int(first) if last else None
        if wanted is not None and len(response.content) != wanted:
            return f"{len(response.content):,} of {wanted:,} bytes came"
    return None


def _asked_to_wait(response: httpx.Response) -> float:
    """Seconds of the answer's Retry-After, within reason."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), _LONGEST_WAIT_SECONDS) if said.isdigit() else 0.0
