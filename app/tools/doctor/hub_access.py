"""Whether the Hugging Face hub answers, and gives this user the dataset."""

import json
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from app.data.hub_client import checked_token, use_hub_client
from app.errors import NetworkError, UserError
from app.tools.doctor.finding import Finding, failure
from app.tools.doctor.machine import CLOCK_TOLERANCE_SECONDS

_CHECK = "hub"


def check_hub(dataset: str, revision: str, token: str | None) -> Iterator[Finding]:
    """Ask the hub once for the dataset, and once more if it is gated. The token is not shown.

    Args:
        dataset: its id.
        revision: branch, tag or commit.
        token: None for what huggingface_hub finds in files.
    """
    try:
        token = checked_token(token)
    except UserError as error:
        yield failure(_CHECK, error)
        return
    # One try: whoever waits for a table does not wait for retries.
    use_hub_client(())
    address = f"{constants.ENDPOINT}/api/datasets/{dataset}"
    try:
        response = _ask(f"{address}/revision/{quote(revision, safe='')}?expand=gated", token)
        known = response.json()
        if known.get("gated"):
            _ask(f"{address}/auth-check", token)
    except (NetworkError, httpx.RequestError) as error:
        yield Finding(
            _CHECK,
            "fail",
            error.problem if isinstance(error, NetworkError) else f"{constants.ENDPOINT}: {error}",
            "connect this machine to the hub, wait, or point PREPARE_DATASET to local files",
        )
    except json.JSONDecodeError:
        yield Finding(
            _CHECK,
            "fail",
            f"what answers at {constants.ENDPOINT} is not the hub, but a log-in page, say",
            "connect this machine to the hub, or point PREPARE_DATASET to local files",
        )
    except HfHubHTTPError as error:
        yield _refusal(error, dataset, revision, has_token=token is not None)
    else:
        yield Finding(
            _CHECK,
            "pass",
            f"{constants.ENDPOINT} gives {dataset}"
            + (", which is gated" if known.get("gated") else "")
            + ("; the token is accepted" if token else "; no token is set, and none is needed"),
        )
        yield from _clock(response.headers.get("Date"))


def _ask(address: str, token: str | None) -> Any:
    response = get_session().get(address, headers=build_hf_headers(token=token or False))
    hf_raise_for_status(response)
    return response


def _refusal(error: HfHubHTTPError, dataset: str, revision: str, *, has_token: bool) -> Finding:
    if isinstance(error, GatedRepoError):
        fix = (
            "accept its terms on its page with the account of this token; a fine-grained token "
            "also needs the permission to read gated repositories"
            if has_token
            else "accept its terms on its page, and set HF_TOKEN, or HF_TOKEN_FILE for containers"
        )
        whose = "this token may not read it" if has_token else "it is not given without a token"
        return Finding(_CHECK, "fail", f"{dataset} is gated, and {whose}", fix)
    if isinstance(error, RepositoryNotFoundError):
        return Finding(
            _CHECK,
            "fail",
            f"there is no dataset {dataset} on the hub, or it is private",
            "correct PREPARE_DATASET; a private dataset needs HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return Finding(
            _CHECK,
            "fail",
            f"{dataset} has no revision {revision!r}",
            "correct PREPARE_DATASET_REVISION",
        )
    if error.response.status_code == 401:
        return Finding(
            _CHECK,
            "fail",
            "the hub does not know this token (401): it is mistyped, expired or revoked",
            "make a new one in the hub's settings; without any, public datasets can be read",
        )
    return Finding(
        _CHECK,
        "fail",
        f"the hub refuses {dataset} with status {error.response.status_code}",
        "correct PREPARE_DATASET or HF_TOKEN, or try again later",
    )


def _clock(date: str | None) -> Iterator[Finding]:
    """The clock against the hub's `Date`, which has whole seconds."""
    if date is None:
        return
    ahead = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(ahead) > CLOCK_TOLERANCE_SECONDS:
        yield Finding(
            "clock",
            "warn",
            f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the hub's",
            "set it (timedatectl set-ntp true): secure connections need it",
        )
    else:
        yield Finding("clock", "pass", "agrees with the hub's")
