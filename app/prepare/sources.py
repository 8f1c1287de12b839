"""Finding the documents of a source: local files, a hub dataset, Python's own library."""

import itertools
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path

from app.dataset_names import (
    COMPRESSIONS,
    KINDS,
    STDLIB,
    is_hub_id,
    is_hub_layout,
    kind_of,
    local_path,
)
from app.errors import UserError
from app.prepare.documents import Documents, Fault
from app.prepare.listing import SourceFile, digest, listing, source_file
from app.prepare.local_files import FileDocuments, file_fault
from app.prepare.spec import TextSource, absence, is_doubtful
from app.prepare.text_streams import UTF_8, BadFileError, check_no_pointer, encoding_of
from app.prepare.texts import utf8_fault

_HEAD_BYTES = 1 << 16
# Files that mark the folder of a run, a dataset, a model and a cache.
_OWN_FILES = (
    ("metrics.jsonl", "settings.json"),
    ("manifest.json", "sources.jsonl"),
    ("model.safetensors",),
    ("CACHEDIR.TAG",),
)
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
    path = local_path(dataset)
    is_hub_folder = dataset != STDLIB and path.is_dir() and is_hub_layout(path)
    if is_hub_folder or is_hub_id(dataset):
        if not is_hub_folder and is_doubtful(dataset):
            # Printed first, because a request may take long to fail.
            print(f"{absence(dataset)}: asking the hub", flush=True)
        # The hub's libraries take a second to import, and local text does not need them.
        from app.prepare.hub import hub_documents

        return hub_documents(path if is_hub_folder else dataset, source, hf_token)

    own: list[str] = []
    paths, root = _find(source, own)
    # An uncompressed .json is text only if it is named: most of them are settings.
    is_json_named = dataset.lower().endswith(".json")
    files = [
        file
        for path in paths
        if kind_of(path) and (is_json_named or not path.lower().endswith(".json"))
        if (file := source_file(path, path.removeprefix(root)))
    ]
    if not files:
        without = f"; not read: {', '.join(own)}, which this program has written" if own else ""
        raise UserError(
            f"no text in {path}: none of {len(paths)} files ends in {' '.join(KINDS)}{without}",
            f"choose other files; compressed ones may also end in {' '.join(COMPRESSIONS)}, and "
            ".json files have to be named, as in FOLDER/*.json",
        )
    files.sort(key=lambda file: (digest(file.name) if source.shuffle_files else "", file.name))
    kind = STDLIB if dataset == STDLIB else "files"
    identity = {"dataset": kind, "files": len(files), "listing": listing(files)}
    return FileDocuments(files, source.text_column, identity, source.encoding, own=own)


def check_heads(documents: FileDocuments) -> None:
    """Look at the beginning of each file, so that a wrong one does not stop the work later.

    Raises:
        UserError: a file is not text, or its encoding is not known.
    """
    if documents.filesystem is not None:
        return
    faults: dict[str, Fault] = {}
    for file in documents.files:
        try:
            _check_head(file, documents.encoding)
        except (BadFileError, OSError) as error:
            fault = file_fault(error)
            if fault is None:
                raise
            faults[file.path] = fault
    if not faults:
        return
    shown = [f"{path} {fault.reason}" for path, fault in itertools.islice(faults.items(), 10)]
    if len(faults) > 1:
        count = f"{len(faults):,} of {len(documents.files):,} files cannot be read as text"
        shown = [count, *shown, "…"] if len(faults) > len(shown) else [count, *shown]
    fixes = dict.fromkeys(fault.fix for fault in faults.values())
    fix = "; ".join([*fixes, "or leave them out with PREPARE_SKIP_BAD"])
    raise UserError("\n  ".join(shown), fix)


def _check_head(file: SourceFile, encoding: str) -> None:
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        head = os.read(descriptor, _HEAD_BYTES)
    finally:
        os.close(descriptor)
    check_no_pointer(head)
    if (
        not file.name.lower().endswith((*COMPRESSIONS, ".parquet"))
        and encoding_of(head, encoding) == UTF_8
    ):
        errors = "surrogatepass" if kind_of(file.name) == ".jsonl" else "strict"
        fault = utf8_fault(head, errors=errors, is_cut=len(head) < file.bytes)
        if fault:
            raise BadFileError(fault)


def _find(source: TextSource, own: list[str]) -> tuple[list[str], str]:
    """Return absolute paths of files that may hold text, and the prefix that names leave out.

    Args:
        own: takes the names of this program's own folders, which are left out.
    """
    dataset = source.dataset
    path = local_path(dataset).absolute()
    if dataset == STDLIB:
        root = sysconfig.get_paths()["stdlib"]
        paths = [path for path in _below(root, own, _EXCLUDED_FROM_STDLIB) if path.endswith(".py")]
        return paths, f"{root}/"
    if path.is_file():
        return [str(path)], f"{path.parent}/"
    is_own = partial(_is_own, {folder.resolve() for folder in source.own})
    if path.is_dir():
        return list(_below(str(path), own, is_own=is_own)), f"{path}/"
    if path.exists():
        problem = f"{dataset} is neither a file nor a folder"
        raise UserError(problem, "write its text to a file first")
    matches = sorted(set(glob(str(path), recursive=True)))
    if not matches:
        raise UserError(
            f"nothing matches {dataset}" if _is_pattern(dataset) else absence(dataset),
            "correct PREPARE_DATASET",
        )
    fixed = Path(*itertools.takewhile(lambda part: not _is_pattern(part), path.parts))
    parents = {match: Path(match).parents for match in matches}
    folders = {folder for above in parents.values() for folder in above if fixed in folder.parents}
    own_folders = {folder for folder in folders if is_own(folder)}
    own += sorted(map(str, own_folders))
    paths = [match for match, above in parents.items() if own_folders.isdisjoint(above)]
    return paths, f"{fixed}/"


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _below(
    root: str,
    own: list[str],
    excluded: frozenset[str] = frozenset(),
    is_own: Callable[[Path], bool] = lambda _folder: False,
) -> Iterator[str]:
    for parent, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        for name in [name for name in folders if is_own(Path(parent, name))]:
            folders.remove(name)
            own.append(str(Path(parent, name)))
        yield from (f"{parent}/{name}" for name in names if name[0] != ".")


def _is_own(known: Collection[Path], folder: Path) -> bool:
    """Return True for a run, a dataset, a model, a report or a cache."""
    # A folder that cannot be read is reported when it is walked.
    with suppress(PermissionError):
        marks = (all((folder / name).exists() for name in names) for names in _OWN_FILES)
        return folder.resolve() in known or any(marks)
    return False


def _raise(error: OSError) -> None:
    raise UserError(
        f"the folder {error.filename} cannot be read: {error.strerror}",
        "make it readable, or move it out of the source",
    )
