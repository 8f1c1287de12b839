"""Where text comes from: files here, parquet on the hub, any hub dataset, Python's own library.

All of it is a sequence of batches of documents in a fixed order. Parquet is read a row group at
a time through a file system, which reads only the text column and nothing twice.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from app.errors import UserError

STDLIB = "stdlib"
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_WHOLE_FILE = (".txt", ".md", ".py")
KINDS = (*_WHOLE_FILE, ".jsonl", ".parquet")
_NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Batch:
    """Consecutive documents.

    Attributes:
        texts: none of them empty
        fraction: how much of the source is read once these are, in [0, 1]; None if unknown
    """

    texts: list[str]
    fraction: float | None


class Documents(Protocol):
    """A source of documents.

    Attributes:
        source: what identifies the text, for the manifest; equal sources give equal documents
        counts: `skipped` documents without text, `not_utf8` files with replaced bytes
    """

    source: Mapping[str, Any]
    counts: Counter[str]

    def batches(self) -> Iterator[Batch]:
        """All documents, in order.

        Raises:
            UserError: a file or column that cannot be read as text.
        """
        ...


@dataclass(frozen=True)
class SourceFile:
    """A file of text: `path` opens it, `name` says its place in the source."""

    path: str
    name: str
    bytes: int


@dataclass
class FileDocuments:
    """Documents in files of one file system, local or remote."""

    files: list[SourceFile]
    text_column: str
    source: Mapping[str, Any]
    filesystem: AbstractFileSystem = field(default_factory=LocalFileSystem)
    counts: Counter[str] = field(default_factory=Counter)

    def batches(self) -> Iterator[Batch]:
        """All documents, in order; see Documents."""
        total_bytes = sum(file.bytes for file in self.files) or 1
        return batched(self._texts(total_bytes), self.counts)

    def _texts(self, total_bytes: int) -> Iterator[tuple[Iterable[object], float]]:
        done_bytes = 0
        for file in self.files:
            for values, fraction in self._read(file):
                yield values, (done_bytes + fraction * file.bytes) / total_bytes
            done_bytes += file.bytes

    def _read(self, file: SourceFile) -> Iterator[tuple[Iterable[object], float]]:
        kind = kind_of(file.name)
        if kind == ".parquet":
            yield from self._row_groups(file)
        elif kind == ".jsonl":
            with self._open(file) as lines:
                yield self._json_texts(file, lines), 1.0
        else:
            with self._open(file) as opened:
                content = opened.read()
            try:
                yield [content.decode("utf-8-sig")], 1.0
            except UnicodeDecodeError:
                self.counts["not_utf8"] += 1
                yield [content.decode("utf-8-sig", "replace")], 1.0

    def _open(self, file: SourceFile) -> Any:
        return self.filesystem.open(file.path, "rb", compression="infer")

    def _json_texts(self, file: SourceFile, lines: Iterable[bytes]) -> Iterator[object]:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(
                        f"{file.path}, line {number} is not JSON: {error}",
                        "write one JSON object a line, or leave the file out",
                    ) from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{file.path}, line {number} is not a JSON object",
                        f'write one object a line, such as {{"{self.text_column}": "…"}}',
                    )
                yield row.get(self.text_column)

    def _row_groups(self, file: SourceFile) -> Iterator[tuple[Iterable[object], float]]:
        with self.filesystem.open(file.path, "rb", cache_type="none") as opened:
            try:
                parquet = pq.ParquetFile(opened, pre_buffer=True)
            except pa.ArrowInvalid as error:
                raise UserError(
                    f"{file.path} is not a parquet file: {error}", "download it again"
                ) from None
            columns = parquet.schema_arrow.names
            if self.text_column not in columns:
                raise UserError(
                    f"{file.path} has no column {self.text_column!r}",
                    f"set PREPARE_TEXT_COLUMN to one of: {', '.join(columns)}",
                )
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=[self.text_column])
                texts = (value.as_py() for value in table.column(0))
                yield texts, (group + 1) / parquet.num_row_groups


def batched(
    pieces: Iterable[tuple[Iterable[object], float | None]], counts: Counter[str]
) -> Iterator[Batch]:
    """Gather texts into batches of a useful size, leaving out and counting the empty ones."""
    texts: list[str] = []
    characters = 0
    fraction: float | None = 0.0
    for values, after in pieces:
        for value in values:
            if value is None or value == "":
                counts["skipped"] += 1
                continue
            if not isinstance(value, str):
                raise UserError(
                    f"the text column holds {type(value).__name__}, not text: {value!r:.80}",
                    "set PREPARE_TEXT_COLUMN to the column that holds the text",
                )
            texts.append(value)
            characters += len(value)
            if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                yield Batch(texts, fraction)
                texts, characters = [], 0
        fraction = after
    if texts:
        yield Batch(texts, 1.0)


def open_documents(
    dataset: str,
    *,
    config: str | None = None,
    revision: str = "main",
    split: str = "train",
    text_column: str = "text",
    shuffle_files: bool = True,
    hf_token: str | None = None,
) -> Documents:
    """Find the documents of a dataset without reading them.

    Args:
        dataset: `stdlib`, a local file, folder or glob, or a hub id. A folder that is laid out
            as a hub repository is read as one.
        config, revision, split: of a hub dataset.
        text_column: of .jsonl, .parquet and hub datasets.
        shuffle_files: local files in an order fixed by the hash of their names, since folders
            are sorted by topic; otherwise by name.
        hf_token: for gated hub datasets.

    Raises:
        UserError: there is no such dataset, configuration, split or file.
        NetworkError: the hub does not answer.
    """
    path = Path(dataset).expanduser()
    if dataset == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in _below(root, _NOT_THE_LIBRARY) if path.suffix == ".py"]
        return _file_documents(STDLIB, files, root, text_column, shuffle_files)
    if path.is_file():
        return _file_documents("files", [path], path.parent, text_column, shuffle_files)
    if path.is_dir() and not _is_hub_layout(path):
        return _file_documents("files", list(_below(path)), path, text_column, shuffle_files)
    if not path.is_dir() and not is_hub_id(dataset):
        fixed = [part for part in path.parts if not _is_pattern(part)]
        matches = [Path(name) for name in glob(str(path), recursive=True)]
        if not matches:
            raise UserError(
                f"{'nothing matches' if _is_pattern(dataset) else 'there is no'} {path}",
                "correct PREPARE_DATASET",
            )
        return _file_documents("files", matches, Path(*fixed), text_column, shuffle_files)

    # The hub's libraries take a second to import; local text does not need them.
    from app.data.hub import hub_documents

    place = str(path) if path.is_dir() else dataset
    return hub_documents(place, config, revision, split, text_column, hf_token)


def is_hub_id(dataset: str) -> bool:
    """Whether `dataset` names a hub dataset, and not something on this machine."""
    path = Path(dataset).expanduser()
    is_place = path.is_absolute() or dataset[0] in ".~" or path.exists() or _is_pattern(dataset)
    return dataset != STDLIB and not is_place


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _file_documents(
    dataset: str, paths: list[Path], root: Path, text_column: str, shuffle_files: bool
) -> FileDocuments:
    files = [
        SourceFile(str(path), path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
        if kind_of(path.name) and path.is_file()
    ]
    if not files:
        raise UserError(
            f"no text in {paths[0] if len(paths) == 1 else root}: none of {len(paths)} files "
            f"ends in {' '.join(KINDS)}",
            f"name other files; compressed ones may also end in {' '.join(_COMPRESSIONS)}",
        )
    files.sort(key=lambda file: (_digest(file.name) if shuffle_files else "", file.name))
    source = {"dataset": dataset, "files": len(files), "listing": listing(files)}
    return FileDocuments(files, text_column, source)


def _below(folder: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
        yield from (Path(parent, name) for name in names if name[0] != ".")


def listing(files: Iterable[SourceFile]) -> str:
    """SHA-256 of names and sizes, in order: it changes when files come, go or grow."""
    return _digest("".join(f"{file.name}\t{file.bytes}\n" for file in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def kind_of(name: str) -> str | None:
    """The kind of text file that `name` says: .txt, .jsonl, …; None if it is no text file."""
    path = PurePosixPath(name.lower())
    stem = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    return stem.suffix if stem.suffix in KINDS else None


def _is_hub_layout(folder: Path) -> bool:
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    _, _, rest = readme.read_text("utf-8", "replace").partition("---\n")
    return "\nconfigs:" in "\n" + rest.partition("\n---")[0]
