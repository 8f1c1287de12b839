"""What is installed: the command `gpt-compose`, and `app` in this folder, out of others' way.

Many programs have a package `app`: in site-packages one would overwrite the other, and one on
PYTHONPATH would be taken for this program's.
"""

import sys
from pathlib import Path


def main() -> None:
    """Run the command that this process's arguments name."""
    here = Path(__file__).resolve().parent
    # After `pip install --editable`, app lies beside this folder.
    sys.path.insert(0, str(here if (here / "app").is_dir() else here.parent))
    from app.__main__ import main as run

    run()
