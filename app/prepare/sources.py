"""Sources of text: files here, a hub dataset, Python's own library."""

import itertools
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.prepare.documents import Documents
from app.prepare.local_files import (
    COMPRESSIONS,
    KINDS,
    FileDocuments,
    SourceFile,
    digest,
    kind_of,
    listing,
)

STDLIB = "stdlib"
_NOT_THE_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Attributes:
        dataset: `stdlib`, a local file, folder or glob, or a hub id; a folder that is laid out as a
            hub repository is read as one
        config, revision, split: of a hub dataset
        text_column: of .jsonl, .parquet and hub datasets
        shuffle_files: local files in an order fixed by the hash of their names, since folders are
            sorted by topic; otherwise by name
        retry_seconds: waits before each new try when the hub does not answer
    """

    dataset: str
    config: str | None = None
    revision: str = "main"
    split: str = "train"
    text_column: str = "text"
    shuffle_files: bool = True
    retry_seconds: Sequence[float] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Return what of it determines a dataset's bytes, for its manifest."""
        settings: dict[str, Any] = {
            "text_column": self.text_column,
            "shuffle_files": self.shuffle_files,
        }
        if is_hub_id(self.dataset):
            settings |= {"dataset": self.dataset, "config": self.config}
            settings |= {"revision": self.revision, "split": self.split}
        return settings


def open_documents(source: TextSource, hf_token: str | None = None) -> Documents:
    """Find the documents of a source without reading them.

    Args:
        hf_token: for gated hub datasets.

    Raises:
        UserError: there is no such dataset, configuration, split or file.
        NetworkError: the hub does not answer.
    """
    dataset = source.dataset
    path = _expanded(dataset)
    is_hub_folder = dataset != STDLIB and path.is_dir() and _is_hub_layout(path)
    if is_hub_folder or is_hub_id(dataset):
        # The hub's libraries take a second to import; local text does not need them.
        from app.prepare.hub import hub_documents

        place = path if is_hub_folder else dataset
        return hub_documents(place, source, hf_token)

    paths, root = _find(dataset)
    files = [
        SourceFile(str(path.absolute()), path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
        if kind_of(path.name) and path.is_file()
    ]
    if not files:
        raise UserError(
            f"no text in {path}: none of {len(paths)} files ends in {' '.join(KINDS)}",
            f"name other files; compressed ones may also end in {' '.join(COMPRESSIONS)}",
        )
    files.sort(key=lambda file: (digest(file.name) if source.shuffle_files else "", file.name))
    kind = STDLIB if dataset == STDLIB else "files"
    found = {"dataset": kind, "files": len(files), "listing": listing(files)}
    return FileDocuments(files, source.text_column, found)


def is_hub_id(dataset: str) -> bool:
    """Return True if `dataset` names a hub dataset, not something on this machine."""
    is_here = dataset == STDLIB or Path(dataset).exists() or kind_of(dataset) is not None
    return not is_here and _HUB_ID.fullmatch(dataset) is not None


def _find(dataset: str) -> tuple[list[Path], Path]:
    """Files that may hold text, and the folder that their names are relative to."""
    path = _expanded(dataset)
    if dataset == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return [path for path in _below(root, _NOT_THE_LIBRARY) if path.suffix == ".py"], root
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        return list(_below(path)), path
    matches = {Path(name) for name in glob(str(path), recursive=True)}
    if not matches:
        raise UserError(
            f"{'nothing matches' if _is_pattern(dataset) else 'there is no'} {dataset}",
            "correct PREPARE_DATASET",
        )
    fixed = itertools.takewhile(lambda part: not _is_pattern(part), path.parts)
    return list(matches), Path(*fixed)


def _expanded(dataset: str) -> Path:
    try:
        return Path(dataset).expanduser()
    except RuntimeError as error:
        raise UserError(f"{dataset}: {error}", "correct PREPARE_DATASET") from None


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _below(folder: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
        yield from (Path(parent, name) for name in names if name[0] != ".")


def _raise(error: OSError) -> None:
    raise error


def _is_hub_layout(folder: Path) -> bool:
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    _, _, rest = readme.read_text("utf-8", "replace").partition("---\n")
    return "\nconfigs:" in "\n" + rest.partition("\n---")[0]
