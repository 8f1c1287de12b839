"""The installed package: the command `gpt-compose`, with `app` in this folder, out of others' way.

Many programs have a package `app`: in site-packages one would overwrite the other, and one on
PYTHONPATH would be taken for this program's. Importing this package lets Python find `app` here;
so `python -m gpt_compose.app.cluster` works as well.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.python import load, prepare, train

__all__ = ["load", "main", "prepare", "train"]

_HERE = Path(__file__).resolve().parent
# After `pip install --editable`, app lies beside this folder.
sys.path.insert(0, str(_HERE if (_HERE / "app").is_dir() else _HERE.parent))


def main() -> None:
    """Run the command that this process's arguments name."""
    from app.__main__ import main as run

    run()


def __getattr__(name: str) -> Any:
    """Import the functions of app.python when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("app.python"), name)
