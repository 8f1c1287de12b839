"""Finding the documents of a source: local files, a hub dataset, Python's own library."""

import itertools
import os
import sysconfig
from collections.abc import Iterator
from glob import glob
from pathlib import Path

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
from app.prepare.spec import STDLIB, TextSource, absence, is_doubtful, is_hub_id

_EXCLUDED_FROM_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


def open_documents(source: TextSource, hf_token: str | None = None) -> Documents:
    """Find the documents of a source without reading them.

    Args:
        hf_token: access token for private and gated Hub datasets.

    Raises:
        UserError: there is no such dataset, configuration, split or file.
        NetworkError: the hub does not answer.
    """
    dataset = source.dataset
    path = _expanded(dataset)
    is_hub_folder = dataset != STDLIB and path.is_dir() and _is_hub_layout(path)
    if is_hub_folder or is_hub_id(dataset):
        if not is_hub_folder and is_doubtful(dataset):
            # Said at once, because a network that swallows everything takes long to fail.
            print(f"{absence(dataset)}: asking the hub", flush=True)
        # The hub's libraries take a second to import, and local text does not need them.
        from app.prepare.hub import hub_documents

        return hub_documents(path if is_hub_folder else dataset, source, hf_token)

    paths, root = _find(dataset)
    files = [
        SourceFile(str(path.absolute()), path.relative_to(root).as_posix(), path.stat().st_size)
        for path in paths
        if kind_of(path.name) and path.is_file()
    ]
    if not files:
        raise UserError(
            f"no text in {path}: none of {len(paths)} files ends in {' '.join(KINDS)}",
            f"choose other files; compressed ones may also end in {' '.join(COMPRESSIONS)}",
        )
    files.sort(key=lambda file: (digest(file.name) if source.shuffle_files else "", file.name))
    kind = STDLIB if dataset == STDLIB else "files"
    identity = {"dataset": kind, "files": len(files), "listing": listing(files)}
    return FileDocuments(files, source.text_column, identity)


def _find(dataset: str) -> tuple[list[Path], Path]:
    """Return files that may hold text, and the folder that their names are relative to."""
    path = _expanded(dataset)
    if dataset == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return [path for path in _below(root, _EXCLUDED_FROM_STDLIB) if path.suffix == ".py"], root
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


def _below(folder: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        yield from (Path(parent, name) for name in names if name[0] != ".")


def _raise(error: OSError) -> None:
    raise error


def _is_hub_layout(folder: Path) -> bool:
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    _, _, rest = readme.read_text("utf-8", "replace").partition("---\n")
    return "\nconfigs:" in "\n" + rest.partition("\n---")[0]
