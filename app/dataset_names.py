"""Names of datasets: those of the Hub, of local text and of Python's own library."""

import re
from contextlib import suppress
from pathlib import Path

STDLIB = "stdlib"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# The ending of a file's name -> the kind as which it is read.
_KINDS = {
    ".txt": ".txt",
    ".md": ".md",
    ".py": ".py",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".jsonl",
    ".parquet": ".parquet",
}
KINDS = tuple(kind for kind in _KINDS if kind != ".json")
HUB_ID = r"[A-Za-z0-9_-][\w.-]*(?:/[\w.-]+)?"


def kind_of(name: str) -> str | None:
    """Return how a file is read, from its name: .txt, .jsonl, …; None for any other file."""
    stem, _, ending = name.lower().rpartition(".")
    if f".{ending}" in COMPRESSIONS:
        ending = stem.rpartition(".")[2]
        # Parquet compresses by itself; with more around it, no row group can be read.
        return None if ending == "parquet" else _KINDS.get(f".{ending}")
    return _KINDS.get(f".{ending}") if stem else None


def is_hub_id(dataset: str) -> bool:
    """Return True if `dataset` names a hub dataset, not something on this machine."""
    is_here = dataset == STDLIB or Path(dataset).exists() or kind_of(dataset) is not None
    return not is_here and re.fullmatch(HUB_ID, dataset, re.ASCII) is not None


def is_own_text(dataset: str) -> bool:
    """Return True for local files, also if they are missing; not for a copy of a Hub repository."""
    is_local = dataset != STDLIB and not is_hub_id(dataset)
    return is_local and not is_hub_layout(local_path(dataset))


def local_path(dataset: str) -> Path:
    """Return the path of local text; a ~ is the home folder, if there is such a user."""
    with suppress(RuntimeError):
        return Path(dataset).expanduser()
    return Path(dataset)


def is_hub_layout(folder: Path) -> bool:
    """Return True for a folder that is laid out as a Hub repository: its README has `configs:`."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    _, _, rest = readme.read_text("utf-8", "replace").partition("---\n")
    return "\nconfigs:" in "\n" + rest.partition("\n---")[0]
