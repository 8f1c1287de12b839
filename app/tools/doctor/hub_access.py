"""Whether the Hugging Face hub answers, and gives this user the dataset."""

import json
from collections.abc import Iterator
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
from app.tools.doctor.finding import Finding

_CONNECT = (
    "connect this machine to the hub, check its clock, wait, or set PREPARE_DATASET to local files"
)


def check_hub(dataset: str, revision: str, token: str | None) -> Iterator[Finding]:
    """Ask the hub once for the dataset, and once more if it is gated. The token is not shown.

    Args:
        dataset: its id.
        revision: branch, tag or commit.
        token: None for what huggingface_hub finds in files.

    Raises:
        UserError: the hub does not know the dataset or the token, or keeps them apart.
        NetworkError: it does not answer.
    """
    token = checked_token(token)
    # One try: whoever waits for a table does not wait for retries.
    use_hub_client(())
    try:
        asked = f"{dataset}/revision/{quote(revision, safe='')}?expand=gated"
        is_gated = _ask(asked, token).json().get("gated")
        if is_gated:
            _ask(f"{dataset}/auth-check", token)
    except NetworkError as error:
        raise NetworkError(error.problem, _CONNECT) from None
    except httpx.RequestError as error:
        raise NetworkError(f"{constants.ENDPOINT}: {error}", _CONNECT) from None
    except json.JSONDecodeError:
        raise NetworkError(
            f"what answers at {constants.ENDPOINT} is not the hub, but a log-in page, say", _CONNECT
        ) from None
    except GatedRepoError:
        if token:
            raise UserError(
                f"{dataset} is gated, and this token may not read it",
                "accept its terms on its page with the account of this token; a fine-grained token "
                "also needs the permission to read gated repositories",
            ) from None
        raise UserError(
            f"{dataset} is gated, and it is not given without a token",
            "accept its terms on its page, and set HF_TOKEN, or HF_TOKEN_FILE for containers",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no dataset {dataset} on the hub, or it is private",
            "correct PREPARE_DATASET; a private dataset needs HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{dataset} has no revision {revision!r}", "correct PREPARE_DATASET_REVISION"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(
                "the hub does not know this token (401): it is mistyped, expired or revoked",
                "make a new one in the hub's settings; without any, public datasets can be read",
            ) from None
        raise UserError(
            f"the hub refuses {dataset} with status {status}",
            "correct PREPARE_DATASET or HF_TOKEN, or try again later",
        ) from None
    gated = ", which is gated" if is_gated else ""
    accepted = "the token is accepted" if token else "no token is set, and none is needed"
    yield Finding("hub", "pass", f"{constants.ENDPOINT} gives {dataset}{gated}; {accepted}")


def _ask(place: str, token: str | None) -> httpx.Response:
    address = f"{constants.ENDPOINT}/api/datasets/{place}"
    response = get_session().get(address, headers=build_hf_headers(token=token or False))
    hf_raise_for_status(response)
    return response
