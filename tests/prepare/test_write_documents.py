"""From chunks of rows to shards: what is read, and which of two failures is reported."""

from collections.abc import Generator
from functools import partial
from pathlib import Path

import pytest

from app.data.manifest import Manifest
from app.errors import UserError
from app.prepare.documents import Place, Position, RowChunk
from app.prepare.encoder import DocumentEncoder
from app.prepare.pipeline import write_documents
from app.prepare.shard_writer import ShardWriter
from app.prepare.spec import DatasetSpec, TextSource
from app.prepare.texts import as_texts
from app.progress import TokenProgress

# A batch has 1024 rows, each of them two tokens.
ROWS, TOKENS = 1024, 2048


@pytest.fixture(scope="module")
def encoder() -> DocumentEncoder:
    return DocumentEncoder()


def chunks(
    count: int, read: list[int] | None = None, error: Exception | None = None
) -> Generator[RowChunk]:
    """Yield chunks of a batch each, and note the number of each that is read."""
    texts = partial(as_texts, ["word"] * ROWS)
    for number in range(count):
        if read is not None:
            read.append(number)
        position, fraction = Position(number, 0), (number + 1) / count
        yield RowChunk(position, ROWS, 4 * ROWS, texts, fraction, Place("texts", "texts"))
    if error:
        raise error


def writer(folder: Path, total: int | None = None) -> ShardWriter:
    spec = DatasetSpec(TextSource("texts"), "text", total, 0, TOKENS)
    return ShardWriter(folder, spec, Manifest({}, {}, spec.settings))


@pytest.mark.parametrize("workers", (1, 2))
def test_a_batch_becomes_a_shard(tmp_path: Path, encoder: DocumentEncoder, workers: int) -> None:
    with writer(tmp_path) as shards:
        write_documents(chunks(3), encoder, shards, workers)
        manifest = shards.finish()
    assert [shard.tokens for shard in manifest.shards] == [TOKENS] * 3
    assert [shard.documents for shard in manifest.shards] == [ROWS] * 3


@pytest.mark.parametrize("workers", (1, 2))
def test_little_more_is_read_than_is_needed(
    tmp_path: Path, encoder: DocumentEncoder, workers: int
) -> None:
    read: list[int] = []
    with writer(tmp_path, total=TOKENS + 1) as shards:
        write_documents(chunks(1000, read), encoder, shards, workers)
        assert shards.full
    assert len(read) <= 2 + 2 * workers


def test_progress_shows_tokens_and_the_share_of_the_source(
    tmp_path: Path, encoder: DocumentEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    with writer(tmp_path) as shards, TokenProgress(None, seconds_between_lines=0) as progress:
        write_documents(chunks(2), encoder, shards, 1, progress)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2,048 of 4,096 tokens (50%), ")
    assert second.startswith("4,096 of 4,096 tokens (100%), ")


def test_error_of_the_source_is_raised_after_the_shards_before_it(
    tmp_path: Path, encoder: DocumentEncoder
) -> None:
    broken = UserError("line 7 is not JSON", "correct it")
    with pytest.raises(UserError, match="line 7 is not JSON"), writer(tmp_path) as shards:
        write_documents(chunks(3, error=broken), encoder, shards, 1)
    assert len(shards.manifest.shards) == 3
    assert Manifest.load(tmp_path) == shards.manifest


def test_error_of_the_disk_is_raised_rather_than_a_later_one_of_the_source(
    tmp_path: Path, encoder: DocumentEncoder
) -> None:
    broken = UserError("line 7 is not JSON", "correct it")
    with pytest.raises(FileNotFoundError), writer(tmp_path / "missing") as shards:
        write_documents(chunks(3, error=broken), encoder, shards, 1)
