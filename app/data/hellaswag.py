"""HellaSwag: beginnings of texts with four endings each, of which one is right.

Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?" (2019).
"""

import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from app.errors import NetworkError, UserError
from app.files import atomic_file, read_bytes, sha256_of
from app.locks import WAIT_SECONDS, locked

ENDINGS = 4
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# The file of the 10,042 validation questions has 12,246,618 bytes, as in Hugging Face's
# datasets/hellaswag/dataset_infos.json.
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
_DOWNLOAD_SECONDS = 300.0
_ANSWER_SECONDS = 30.0
_MAX_BYTES = 20_000_000


@dataclass(frozen=True)
class Question:
    """A line of the file, without the keys that are not needed.

    Its texts are prepared as in lm_eval/tasks/hellaswag/utils.py.
    """

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=ENDINGS, max_length=ENDINGS)]
    label: Annotated[int, Field(ge=0, lt=ENDINGS)]

    @property
    def beginning(self) -> str:
        """Return the text to continue, as lm-eval reads it."""
        return _clean(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")

    @property
    def choices(self) -> list[str]:
        """Return the endings as lm-eval reads them."""
        return [_clean(ending) for ending in self.endings]


_QUESTION = TypeAdapter(Question)


def _clean(text: str) -> str:
    """Remove the marks of WikiHow's articles."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def read_questions(path: Path) -> list[Question]:
    """Read a file of the form of hellaswag_val.jsonl: a JSON object a line.

    Raises:
        UserError: there is no such file, it holds no question, or a line is not one.
    """
    fix = "correct TRAIN_HELLASWAG_FILE, or unset it for the 10,042 published questions"
    if not path.is_file():
        raise UserError(f"HellaSwag's questions: {path} is not a file", fix)
    questions = []
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(_QUESTION.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            fault = " ".join([*map(str, first["loc"]), first["msg"]])
            raise UserError(
                f"{path}, line {number} is not a question of HellaSwag: {fault}", fix
            ) from None
    if not questions:
        raise UserError(f"{path} has no questions of HellaSwag", fix)
    return questions


def provide_questions(path: Path, url: str = URL, sha256: str = SHA256) -> None:
    """Download the published questions to `path`, unless they are there.

    Raises:
        UserError: the file is there, but is another.
        NetworkError: the download has failed.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with locked(path, "download", wait_seconds=WAIT_SECONDS, file=lock):
            if not path.exists():
                _download(path, url, sha256)
    if sha256_of(path) != sha256:
        raise UserError(
            f"{path} is not HellaSwag's published file: its SHA-256 does not match",
            "delete it; to score other questions of this form, set TRAIN_HELLASWAG_FILE",
        )


def _download(path: Path, url: str, sha256: str) -> None:
    print(f"{path}: downloading HellaSwag's questions from {url}", flush=True)
    try:
        content = _fetch(url)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("what answers is another file, perhaps a log-in page")
    except ValueError as error:
        raise NetworkError(
            f"HellaSwag's questions could not be downloaded: {error} ({url})",
            f"put that file there yourself, as {path}, or set TRAIN_HELLASWAG_EVERY=0",
        ) from error
    with atomic_file(path) as file:
        file.write(content)


def _fetch(url: str) -> bytes:
    """Return what a server answers; a ValueError says why it does not."""
    # With the certificates that the hub's libraries bring along.
    from huggingface_hub.utils import httpx

    content, deadline = b"", time.monotonic() + _DOWNLOAD_SECONDS
    try:
        with httpx.stream("GET", url, timeout=_ANSWER_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                content += part
                if len(content) > _MAX_BYTES:
                    break
                if time.monotonic() > deadline:
                    raise ValueError(f"it has not ended after {_DOWNLOAD_SECONDS:g} s")
    # The last two come from a wrong proxy or certificate in the environment.
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError) as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    return content
