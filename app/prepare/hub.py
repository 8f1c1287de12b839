"""Text from the Hugging Face hub, or from a folder that is laid out as a repository of it.

`datasets` resolves the configuration to files. Parquet files are then read directly, a row group
at a time: only the text column travels, and the stream ends cleanly wherever it is left. Anything
else goes through `datasets`' own streaming.
"""

import os
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import (
    DatasetBuilder,
    DownloadConfig,
    IterableDataset,
    get_dataset_config_names,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from app.errors import AppError, NetworkError, UserError
from app.prepare.documents import Documents, Position, RowChunk
from app.prepare.hub_client import checked_token, gated, giving_up, refusals_named, use_hub_client
from app.prepare.local_files import FileDocuments, SourceFile, listing
from app.prepare.texts import as_texts

if TYPE_CHECKING:
    from app.prepare.sources import TextSource

_NETWORK_ERRORS = (httpx.RequestError, HfHubHTTPError, ConnectionError, TimeoutError)
_ROW_GROUPS_AHEAD = 8
_TIMEOUT_SECONDS = 20.0


class HubFileDocuments(FileDocuments):
    """Documents in parquet files of a hub dataset."""

    def read_metadata(self, file: SourceFile) -> pq.FileMetaData:
        """The footer of a parquet file."""
        with _network():
            return super().read_metadata(file)

    def pieces(self, start: Position) -> Generator[RowChunk]:
        """All rows from `start` on, in order; see app.prepare.documents.Documents."""
        giving_up.clear()
        try:
            with _network():
                yield from super().pieces(start)
        finally:
            # A thread that has read ahead in vain does not try again.
            giving_up.set()


@dataclass
class StreamedDocuments:
    """Documents of any dataset that `datasets` can stream."""

    rows: IterableDataset
    text_column: str
    source: Mapping[str, Any]

    def pieces(self, start: Position) -> Generator[RowChunk]:
        """All rows from `start` on, in order; see app.prepare.documents.Documents."""
        with _network():
            row = start.row
            for texts in self._texts(row):
                yield RowChunk.parsed(Position(0, row), texts, None)
                row += len(texts)

    def _texts(self, first_row: int) -> Iterator[pa.LargeStringArray]:
        rows = self.rows.skip(first_row) if first_row else self.rows
        row = first_row
        try:
            for values in rows.iter(batch_size=256):
                if self.text_column not in values:
                    raise UserError(
                        f"{self.source['dataset']} has no column {self.text_column!r}",
                        f"set PREPARE_TEXT_COLUMN to one of: {', '.join(values)}",
                    )
                texts = as_texts(values[self.text_column], "row", row)
                yield texts
                row += len(texts)
        except (DatasetsError, ValueError) as error:
            raise UserError(
                f"{self.source['dataset']} cannot be read: {_short(error)}",
                "correct its files, or set PREPARE_DATASET to another dataset",
            ) from error


def hub_documents(place: str | Path, source: "TextSource", hf_token: str | None) -> Documents:
    """Find the documents of a hub dataset; see app.prepare.sources.open_documents.

    Args:
        place: a hub id, or a folder, which has no revision.
        source, hf_token: as there.

    Raises:
        UserError: there is no such dataset, configuration or split.
        NetworkError: the hub does not answer.
    """
    column = source.text_column
    if isinstance(place, Path):
        root = str(place.resolve())
        builder = _builder(root, source.config, None, None)
        paths = _paths_of_split(builder, root, source.split)
        files = [
            SourceFile(path, os.path.relpath(path, root), Path(path).stat().st_size)
            for path in paths
        ]
        found = {"dataset": Path(root).name, "config": builder.config.name, "split": source.split}
        found["listing"] = listing(files)
        if _is_parquet(paths):
            return FileDocuments(files, column, found)
        return StreamedDocuments(_stream(builder, source.split), column, found)

    checked_token(hf_token)
    use_hub_client(source.retry_seconds)
    giving_up.clear()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    with _network():
        commit = _commit(place, source.revision, hf_token)
        builder = _builder(place, source.config, commit, hf_token)
        paths = _paths_of_split(builder, place, source.split)
        found = {"dataset": place, "config": builder.config.name, "split": source.split}
        found["revision"] = commit
        if not _is_parquet(paths):
            return StreamedDocuments(_stream(builder, source.split), column, found)
        hub = HfFileSystem(token=hf_token)
        files = [SourceFile(path, path, int(hub.info(path)["size"])) for path in paths]
        return HubFileDocuments(files, column, found, hub, _ROW_GROUPS_AHEAD)


def _is_parquet(paths: list[str]) -> bool:
    return all(path.endswith(".parquet") for path in paths)


def _commit(dataset: str, revision: str, token: str | None) -> str:
    """The commit that a revision names. Asked for first: the answer shows that the hub is there."""
    with refusals_named(dataset, revision, token):
        found = HfApi(token=token).dataset_info(
            dataset, revision=revision, timeout=_TIMEOUT_SECONDS
        )
    return str(found.sha)


def _builder(
    place: str, config: str | None, commit: str | None, token: str | None
) -> DatasetBuilder:
    download = DownloadConfig(max_retries=3, token=token)
    try:
        return load_dataset_builder(place, config, revision=commit, download_config=download)
    except ValueError as error:
        names = get_dataset_config_names(place, revision=commit, download_config=download)
        if config in names:
            raise UserError(
                f"{place} cannot be read: {_short(error)}",
                "set PREPARE_DATASET to another dataset",
            ) from error
        raise UserError(
            f"{place} has no configuration {config!r}"
            if config
            else f"{place} has several configurations",
            f"set PREPARE_DATASET_CONFIG to one of: {', '.join(names)}",
        ) from error
    except (DatasetsError, FileNotFoundError, RuntimeError, yaml.YAMLError) as error:
        # RuntimeError: a dataset that is a program, which `datasets` does not run any more.
        if "gated dataset" in str(error):
            raise gated(place, token) from error
        raise UserError(
            f"{place} cannot be read: {_short(error)}",
            "correct PREPARE_DATASET, or take another dataset; a gated one needs HF_TOKEN",
        ) from error


def _paths_of_split(builder: DatasetBuilder, place: str, split: str) -> list[str]:
    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(
            f"{place} has no split {split!r}",
            f"set PREPARE_SPLIT to one of: {', '.join(map(str, splits))}",
        )
    return [str(path) for path in splits[split]]


def _stream(builder: DatasetBuilder, split: str) -> IterableDataset:
    # Only for a base class that nobody here needs, `datasets` would import torch.
    datasets.config.TORCH_AVAILABLE = False
    return builder.as_streaming_dataset(split)


@contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except _NETWORK_ERRORS as error:
        raise _failure(error) from error


def _failure(error: Exception) -> AppError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (400, 401, 403, 404):
        return UserError(
            f"the hub refuses: {_short(error)}",
            "correct PREPARE_DATASET or HF_TOKEN; a gated or private dataset needs one",
        )
    return NetworkError(
        f"the hub does not answer: {_short(error)}",
        "try again later, or point PREPARE_DATASET to local files",
    )


def _short(error: Exception) -> str:
    said = str(error).partition("For more information")[0]
    # Whoever has a signed address may read.
    said = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]*", r"\1", said)
    return " ".join(said.split())[:200] or type(error).__name__
