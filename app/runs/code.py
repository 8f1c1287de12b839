"""The code of a run: its revision, its files' hashes, and patches with what no revision has."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Mapping
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from app.files import atomic_file
from app.runs.checkpoint import Checkpoint
from app.runs.folder import RunFolder

_PACKAGE = Path(__file__).parents[1]
_PYTHON_FILES = "app/*.py"
# The parts of the program that decide a run's numbers; the first decides what its weights compute.
_DECIDING = ("app/model/", "app/data/", "app/distributed/", "app/inference/", "app/train/")
_MODEL = _DECIDING[0]
_ONLY_FOR_TEXT = ("app/model/generate.py", "app/model/kv_cache.py")
_MAX_PATCH_CHARACTERS = 300_000
_MOST_NAMES = 5


@cache
def source() -> dict[str, Any]:
    """Return what state.json has under `source`, and settings.json, beside its git_revision.

    That is the commit, whether the program's Python files differ from it (each None if it is not
    known), and a SHA-256 over these files.
    """
    patch = _patch()
    return {
        "revision": (git_revision() or "").removesuffix("-dirty") or None,
        "differs": None if patch is None else bool(patch),
        "sha256": hashlib.sha256(repr(_files()).encode()).hexdigest(),
    }


def describe_source(source: Mapping[str, Any]) -> str:
    """Return the commit of a source in words, and whether the code differed from it."""
    revision = source.get("revision") or "unknown"
    return f"revision {revision}{' with changes' if source.get('differs') else ''}"


@cache
def code_hashes(within: str = "") -> dict[str, str]:
    """Return a SHA-256 of the code of each file that decides a run's numbers.

    Comments and docstrings do not count.

    Args:
        within: what the files' names begin with.
    """
    return {
        name: hashlib.sha256(_without_comments(content).encode()).hexdigest()
        for name, content in _files().items()
        if name.startswith(_DECIDING) and name.startswith(within) and name not in _ONLY_FOR_TEXT
    }


def changed_files(checkpoint: Checkpoint, within: str = "") -> list[str]:
    """Return the files that differ from those that wrote a checkpoint; none if it has no hashes.

    Args:
        within: what the files' names begin with.
    """
    before, now = checkpoint.state.code_hashes, code_hashes(within)
    names = sorted(before.keys() | now.keys()) if before else []
    return [it for it in names if it.startswith(within) and before.get(it) != now.get(it)]


def name_changed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def warn_of_other_model(checkpoint: Checkpoint) -> None:
    """Print a warning if other code of the model wrote the checkpoint."""
    if changed := changed_files(checkpoint, _MODEL):
        other = f"{checkpoint.folder} was trained with other code of the model"
        files = f"{name_changed(changed)} {'differs' if len(changed) == 1 else 'differ'}"
        print(f"warning: {other}: {files}", file=sys.stderr, flush=True)


def patch_name(step: int) -> str:
    """Return the name of the file with the code that a run has from a step on."""
    return f"code-{step:06d}.patch" if step else "code.patch"


def record_code(run: RunFolder, checkpoint: Checkpoint | None) -> None:
    """Write a patch if this start's code is that of no commit, or not that of the steps before.

    Args:
        checkpoint: where the run continues; patches of later steps are deleted.
    """
    step = checkpoint.step if checkpoint else 0
    for later in (it for it in read_patches(run.path) if it >= step):
        (run.path / patch_name(later)).unlink()
    before, patch = checkpoint.state if checkpoint else None, _patch()
    changed = changed_files(checkpoint) if checkpoint else []
    # A branch, and a run from before code was recorded, have no patch of their own yet.
    begins = not (before and before.code_hashes) or (before.origin or "").endswith(f"@{step}")
    if not changed and not (begins and patch):
        return
    lines = [f"Since step {step}: {describe_source(source())}", "", patch or ""]
    if changed and before:
        until = f"Until step {step}: {describe_source(before.source)}"
        lines = [until, *lines[:1], f"Changed: {', '.join(changed)}", *lines[1:]]
    with atomic_file(run.path / patch_name(step)) as file:
        file.write("\n".join(lines).encode())


def read_patches(run_dir: Path) -> dict[int, str]:
    """Return the patches of a run, by the step from which on each is its code, in order."""
    names = (path.name for path in run_dir.glob("code*.patch"))
    found = filter(None, (re.fullmatch(r"code(?:-(\d{6,}))?\.patch", name) for name in names))
    steps = sorted((int(name[1] or 0), name[0]) for name in found)
    return {step: (run_dir / name).read_text("utf-8", errors="replace") for step, name in steps}


def git_revision() -> str | None:
    """Return the commit of the program, with `-dirty` if files differ; None if it is not known.

    An image has the commit it was built from in a file, with no dirty flag.
    """
    file = _PACKAGE.parent / "revision"
    if file.exists():
        return file.read_text(encoding="utf-8").strip() or None
    described = _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    return (described or "").strip() or None


@cache
def _files() -> dict[str, str]:
    """Return each Python file of the program as this process found it, by its path, in order."""
    return {
        f"app/{path.relative_to(_PACKAGE).as_posix()}": path.read_text("utf-8", "backslashreplace")
        for path in sorted(_PACKAGE.rglob("*.py"))
    }


def _without_comments(content: str) -> str:
    """Return the lines of a Python file without comments, docstrings and blank lines."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return content  # Nothing imports it.
    lines = content.split("\n")
    for token in tokenize.generate_tokens(StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            first, last = node.lineno - 1, (node.end_lineno or 0) - 1
            begins = not lines[first][: node.col_offset].strip()
            # Other code may share its lines.
            if begins and len(lines[last].rstrip().encode()) == node.end_col_offset:
                lines[first : last + 1] = [""] * (last + 1 - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _patch() -> str | None:
    """Return how the program's Python files, new ones included, differ from the commit.

    Other files are left out, which may hold secrets. None without git.
    """
    changed = _git("diff", "HEAD", "--", _PYTHON_FILES)
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", _PYTHON_FILES)
    if changed is None or new is None:
        return None
    added = [_git("diff", "--no-index", "--", "/dev/null", name) for name in new.split("\0")[:-1]]
    patch = "".join(filter(None, (changed, *added)))
    if len(patch) > _MAX_PATCH_CHARACTERS:
        patch = f"{patch[:_MAX_PATCH_CHARACTERS]}\n... {len(patch):,} characters, cut here\n"
    return patch


def _git(command: str, *arguments: str) -> str | None:
    """Return what git prints about the program's checkout; None if it is no checkout."""
    folder, git = _PACKAGE.parent, shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    if command == "diff":
        # As without the user's settings.
        arguments = ("--no-ext-diff", "--no-textconv", "--no-color", *arguments)
    options = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false")
    ended = subprocess.run(
        [git, "-C", str(folder), *options, command, *arguments],
        # A hook of another repository has GIT_DIR, which would be asked in place of the folder.
        env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    # 1 says that files differ.
    return ended.stdout if ended.returncode < 2 else None
