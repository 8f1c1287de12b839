"""Text from the Hugging Face hub, or from a folder with the layout of a Hub repository.

`datasets` resolves the configuration to files. Parquet files are then read directly, a row group
at a time: only the text column is transferred, and the stream can end anywhere. All other files
are streamed by `datasets`.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
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

from app.errors import UserError
from app.prepare.documents import Documents, Place, Position, RowChunk, Texts
from app.prepare.hub_client import (
    Repository,
    checked_token,
    gated,
    giving_up,
    hub_errors,
    short,
    use_hub_client,
)
from app.prepare.listing import SourceFile, listing, source_file
from app.prepare.local_files import FileDocuments, missing_column
from app.prepare.spec import TextSource
from app.prepare.texts import as_texts

_ROW_GROUPS_AHEAD = 8
_TIMEOUT_SECONDS = 20.0

# Enters hub_errors() for the dataset.
Errors = Callable[[], AbstractContextManager[None]]


@dataclass
class HubFileDocuments(FileDocuments):
    """Documents in parquet files of a hub dataset."""

    errors: Errors = nullcontext

    def read_metadata(self, file: SourceFile) -> pq.FileMetaData:
        """Read the footer of a parquet file."""
        with self.errors():
            return super().read_metadata(file)

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on; see app.prepare.documents.Documents."""
        giving_up.clear()
        try:
            with self.errors():
                yield from super().chunks(start)
        finally:
            # Threads that still read ahead do not retry.
            giving_up.set()


@dataclass
class StreamedDocuments:
    """Documents of any dataset that `datasets` can stream."""

    rows: IterableDataset
    text_column: str
    source: Mapping[str, Any]
    errors: Errors = nullcontext

    def chunks(self, start: Position) -> Generator[RowChunk]:
        """Yield all rows from `start` on; see app.prepare.documents.Documents."""
        with self.errors():
            row = start.row
            place = Place(self.source["dataset"], self.source["dataset"])
            for texts in self._texts(row):
                yield RowChunk.parsed(Position(0, row), texts, place)
                row += len(texts.rows)

    def _texts(self, first_row: int) -> Iterator[Texts]:
        rows = self.rows.skip(first_row) if first_row else self.rows
        dataset = self.source["dataset"]
        try:
            for values in rows.iter(batch_size=256):
                if self.text_column not in values:
                    fault = missing_column(self.text_column, values)
                    raise UserError(f"{dataset} {fault.reason}", fault.fix)
                yield as_texts(values[self.text_column])
        except (DatasetsError, ValueError) as error:
            raise UserError(
                f"{dataset} cannot be read: {short(error)}",
                "correct its files, or set PREPARE_DATASET to another dataset",
            ) from error


def hub_documents(place: str | Path, source: TextSource, hf_token: str | None) -> Documents:
    """Find the documents of a hub dataset; see app.prepare.sources.open_documents.

    Args:
        place: a Hub dataset ID, or a local folder (which has no revision).

    Raises:
        UserError: there is no such dataset, configuration or split.
        NetworkError: the hub does not answer.
    """
    column = source.text_column
    if isinstance(place, Path):
        root = str(place.resolve())
        builder = _builder(root, source.config, None, None)
        paths = _paths_of_split(builder, root, source.split)
        files = [file for path in paths if (file := source_file(path, os.path.relpath(path, root)))]
        identity = {"dataset": Path(root).name, "config": builder.config.name}
        identity |= {"split": source.split, "listing": listing(files)}
        if _is_parquet(paths):
            return FileDocuments(files, column, identity)
        return StreamedDocuments(_stream(builder, source.split), column, identity)

    token = checked_token(hf_token)
    repository = Repository(place, source.revision)
    use_hub_client(source.retry_seconds, repository)
    giving_up.clear()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    errors = partial(hub_errors, repository, token)
    with errors():
        # This request comes first: its answer shows that the hub is reachable.
        hub = HfApi(token=hf_token)
        info = hub.dataset_info(place, revision=source.revision, timeout=_TIMEOUT_SECONDS)
        commit = str(info.sha)
        builder = _builder(place, source.config, commit, hf_token)
        paths = _paths_of_split(builder, place, source.split)
        identity = {"dataset": place, "config": builder.config.name}
        identity |= {"split": source.split, "revision": commit}
        if not _is_parquet(paths):
            return StreamedDocuments(_stream(builder, source.split), column, identity, errors)
        system = HfFileSystem(token=hf_token)
        files = [SourceFile(path, path, int(system.info(path)["size"])) for path in paths]
        return HubFileDocuments(
            files,
            column,
            identity,
            filesystem=system,
            row_groups_ahead=_ROW_GROUPS_AHEAD,
            errors=errors,
        )


def _is_parquet(paths: list[str]) -> bool:
    return all(path.endswith(".parquet") for path in paths)


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
                f"{place} cannot be read: {short(error)}", "set PREPARE_DATASET to another dataset"
            ) from error
        raise UserError(
            f"{place} has no configuration {config!r}"
            if config
            else f"{place} has several configurations",
            f"set PREPARE_DATASET_CONFIG to one of: {', '.join(names)}",
        ) from error
    except (DatasetsError, FileNotFoundError, RuntimeError, yaml.YAMLError) as error:
        # RuntimeError: a dataset that is a program, which `datasets` no longer runs.
        if "gated dataset" in str(error):
            raise gated(place, token) from error
        raise UserError(
            f"{place} cannot be read: {short(error)}",
            "correct PREPARE_DATASET, or choose another dataset; a gated one needs HF_TOKEN",
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
    # `datasets` would import torch, only for a base class that is not needed here.
    datasets.config.TORCH_AVAILABLE = False
    return builder.as_streaming_dataset(split)
