"""Checks that the Hugging Face hub answers, and gives this user the dataset."""

from collections.abc import Iterator

from huggingface_hub import HfApi

from app.errors import NetworkError
from app.prepare.hub_client import checked_token, hub_errors, use_hub_client
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
        with hub_errors(dataset, revision, token):
            is_gated = hub.dataset_info(dataset, revision=revision, expand=["gated"]).gated
            if is_gated:
                hub.auth_check(dataset, repo_type="dataset")
    except NetworkError as error:
        raise NetworkError(error.problem, _CONNECT) from None
    gated = ", which is gated" if is_gated else ""
    accepted = "the token is accepted" if token else "no token is set, and none is needed"
    yield Finding("hub", "pass", f"{hub.endpoint} gives {dataset}{gated}; {accepted}")
