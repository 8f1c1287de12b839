"""Text from the Hugging Face hub, or from a folder that is laid out as a repository of it.

`datasets` resolves the configuration to files and the revision to a commit. Parquet files are
then read directly, a row group at a time: only the text column travels, and the stream ends
cleanly wherever it is left. Anything else goes through `datasets`' own streaming.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DownloadConfig, IterableDataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError

from app.data.documents import Batch, Documents, FileDocuments, SourceFile, batched, listing
from app.errors import NetworkError, UserError


@dataclass
class StreamedDocuments:
    """Documents of any dataset that `datasets` can stream."""

    rows: IterableDataset
    text_column: str
    source: Mapping[str, Any]
    counts: Counter[str] = field(default_factory=Counter)

    def batches(self) -> Iterator[Batch]:
        """All documents, in order; see app.data.documents.Documents."""
        return batched(self._texts(), self.counts)

    def _texts(self) -> Iterator[tuple[Iterable[object], float | None]]:
        for rows in self.rows.iter(batch_size=256):
            if self.text_column not in rows:
                raise UserError(
                    f"the dataset has no column {self.text_column!r}",
                    f"set PREPARE_TEXT_COLUMN to one of: {', '.join(rows)}",
                )
            yield rows[self.text_column], None


def hub_documents(
    dataset: str,
    config: str | None,
    revision: str,
    split: str,
    text_column: str,
    hf_token: str | None,
) -> Documents:
    """Find the documents of a hub dataset; see app.data.documents.open_documents.

    Raises:
        UserError: there is no such dataset, configuration or split.
        NetworkError: the hub does not answer.
    """
    is_local = "/" in dataset and LocalFileSystem().isdir(dataset)
    try:
        builder = load_dataset_builder(
            dataset,
            config,
            revision=None if is_local else revision,
            token=hf_token,
            download_config=DownloadConfig(max_retries=3, token=hf_token),
        )
    except DatasetNotFoundError as error:
        raise UserError(
            f"no dataset {dataset} at revision {revision}, or no right to read it: {error}",
            "check PREPARE_DATASET and PREPARE_DATASET_REVISION; a gated dataset needs HF_TOKEN",
        ) from error
    except (ConnectionError, HfHubHTTPError, TimeoutError) as error:
        raise NetworkError(
            f"the hub does not answer: {error}",
            "try again later, or point PREPARE_DATASET to local files",
        ) from error
    except ValueError as error:
        raise UserError(
            f"{dataset}: {error}", "correct PREPARE_DATASET_CONFIG or PREPARE_DATASET"
        ) from error
    data_files = builder.config.data_files or {}
    if split not in data_files:
        raise UserError(
            f"{dataset} has no split {split!r}",
            f"set PREPARE_SPLIT to one of: {', '.join(map(str, data_files))}",
        )
    paths = [str(path) for path in data_files[split]]
    source = {"dataset": dataset, "config": builder.config.name, "split": split}
    commit = re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", paths[0])
    if commit:
        source["revision"] = commit[1]
    if not all(path.endswith(".parquet") for path in paths):
        rows = builder.as_streaming_dataset(split=split)
        return StreamedDocuments(rows, text_column, source)
    filesystem = HfFileSystem(token=hf_token) if commit else LocalFileSystem()
    files = [
        SourceFile(path, path.partition(commit[0] if commit else dataset)[2].lstrip("/"), size)
        for path in paths
        for size in [int(filesystem.info(path)["size"])]
    ]
    if is_local:
        source |= {"dataset": Path(dataset).name, "listing": listing(files)}
    return FileDocuments(files, text_column, source, filesystem)
