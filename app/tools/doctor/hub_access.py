"""Whether the Hugging Face hub answers, and gives this user the dataset."""

import json
from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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
    hub = HfApi(token=token or False)
    try:
        is_gated = hub.dataset_info(dataset, revision=revision, expand=["gated"]).gated
        if is_gated:
            hub.auth_check(dataset, repo_type="dataset")
    except NetworkError as error:
        raise NetworkError(error.problem, _CONNECT) from None
    except json.JSONDecodeError:
        raise NetworkError(
            f"what answers at {hub.endpoint} is not the hub, but a log-in page, say", _CONNECT
        ) from None
    except GatedRepoError:
        why = "this token may not read it" if token else "it is not given without a token"
        raise UserError(
            f"{dataset} is gated, and {why}",
            "accept its terms on its page, and set HF_TOKEN (for containers HF_TOKEN_FILE) to a "
            "token of that account which may read gated repositories",
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
    yield Finding("hub", "pass", f"{hub.endpoint} gives {dataset}{gated}; {accepted}")
