"""A git repository with a copy of the program, to edit."""

import shutil
import subprocess
from pathlib import Path

from tests.train.processes import CHECKOUT


class Clone:
    """A git repository with a copy of the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(CHECKOUT / "app", folder / "app", ignore=shutil.ignore_patterns("*.pyc"))
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.com")
        command = ["git", *identity, *arguments]
        return subprocess.run(
            command, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def commit(self) -> str:
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "state")
        return self.git("rev-parse", "HEAD").strip()

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
