"""Models on the Hugging Face hub: their files, in a folder of the cache.

A file gets its name when its hash is the one that the hub has. Once all are there, the hub is not
asked again.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from app.errors import NetworkError, UserError
from app.files import PARTIAL, atomic_file, filename_in_errors, read_json, sha256_of, write_json
from app.formats import format_bytes
from app.locks import locked
from app.prepare.hub_client import Repository, checked_token, giving_up, hub_errors, use_hub_client
from app.prepare.model_folder import SMALL_FILES, read_model_folder, weight_files
from app.progress import Bar

# The hash of each file; written when all of them are there.
_HASHES = "files.json"
_TIMEOUT_SECONDS = 20.0
_PART_BYTES = 32 << 20
# Another process may be downloading gigabytes.
_WAIT_SECONDS = 7200.0


def download_model(
    repository: Repository, cache_dir: Path, hf_token: str | None, retry_seconds: Sequence[float]
) -> tuple[Path, str]:
    """Return the folder with a model's files, and its commit; download what is not there.

    Raises:
        UserError: there is no such model, or it cannot be trained further here.
        NetworkError: the hub does not answer.
    """
    reference = commit_file(repository, cache_dir)
    root = reference.parent
    if not reference.exists():
        root.mkdir(parents=True, exist_ok=True)
        with locked(root, "download", wait_seconds=_WAIT_SECONDS):
            if not reference.exists():
                commit = _download(repository, root, checked_token(hf_token), retry_seconds)
                with atomic_file(reference) as file:
                    file.write(commit.encode())
    commit = reference.read_text("utf-8")
    folder = root / commit
    again = f"delete {root}, and the files are downloaded again"
    for name, sha256 in read_json(folder / _HASHES, again).items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != sha256:
            raise UserError(f"{path} is damaged: its SHA-256 does not match", again)
    return folder, commit


def commit_file(repository: Repository, cache_dir: Path) -> Path:
    """Return the file that has the commit of a revision, once the model is downloaded."""
    root = cache_dir / "models" / repository.name.replace("/", "--")
    return root / f"{quote(repository.revision, safe='')}.commit"


def _download(
    repository: Repository, root: Path, token: str | None, retry_seconds: Sequence[float]
) -> str:
    """Download a model's files, and return its commit."""
    use_hub_client(retry_seconds, repository)
    giving_up.clear()
    with hub_errors(repository, token):
        commit, files, _ = begin_download(repository, root, token)
        folder, name = root / commit, repository.name
        weights = weight_files(folder, name, files.__contains__)
        size = format_bytes(sum(files[it].size or 0 for it in weights))
        print(f"{folder}: downloading {name} from the hub, {size}", flush=True)
        for file in weights:
            _fetch(repository, commit, files[file], folder, token)
    hashes = {path.name: sha256_of(path) for path in folder.iterdir() if path.name in files}
    write_json(folder / _HASHES, hashes)
    return commit


def begin_download(
    repository: Repository, root: Path, token: str | None
) -> tuple[str, dict[str, RepoSibling], dict[str, Any]]:
    """Download the files that tell whether a model can be used, into a folder of its commit's name.

    Returns:
        commit, all of the model's files by name, and its shape.

    Raises:
        UserError: the model cannot be trained further here.
        Exception: see app.prepare.hub_client.hub_errors.
    """
    name, hub = repository.name, HfApi(token=token or False)
    info = hub.model_info(
        name, revision=repository.revision, files_metadata=True, timeout=_TIMEOUT_SECONDS
    )
    commit, files = str(info.sha), {it.rfilename: it for it in info.siblings or ()}
    (root / commit).mkdir(exist_ok=True)
    for file in SMALL_FILES:
        if file in files:
            _fetch(repository, commit, files[file], root / commit, token)
    return commit, files, read_model_folder(root / commit, name)


def _fetch(
    repository: Repository, commit: str, file: RepoSibling, folder: Path, token: str | None
) -> None:
    """Download a file, a part at a time, unless it is there. One that was begun is continued."""
    path = folder / file.rfilename
    if path.exists():
        return
    partial, size = path.with_name(path.name + PARTIAL), file.size or 0
    url = hf_hub_url(repository.name, file.rfilename, revision=commit)
    # As it is stored: a compressed answer has other ranges.
    headers = build_hf_headers(token=token or False) | {"Accept-Encoding": "identity"}
    with (
        filename_in_errors(partial),
        partial.open("ab") as out,
        Bar(total=size, initial=out.tell(), unit="B", unit_scale=True, disable=None) as bar,
    ):
        while (first := out.tell()) < size:
            part = {"Range": f"bytes={first}-{min(first + _PART_BYTES, size) - 1}"}
            response = get_session().get(url, headers=headers | part)
            hf_raise_for_status(response)
            if response.status_code == 200:
                out.truncate(0)  # all of it, from a server that knows no ranges
            out.write(response.content)
            bar.update(len(response.content))
            if response.status_code == 200:
                break
        out.flush()
        os.fsync(out.fileno())
        received = out.tell()
    # Git has another hash of small files.
    actual, expected = (sha256_of(partial), file.lfs.sha256) if file.lfs else (received, size)
    if actual != expected:
        partial.unlink()
        raise NetworkError(
            f"{file.rfilename} of {repository.name} is not what the hub has: its hash differs",
            "run the same command again; it is downloaded once more",
        )
    partial.replace(path)
