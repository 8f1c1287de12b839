"""Puts the checkout's commit into what is built: a run's settings.json has it as git_revision."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_COMMAND = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


class Revision(BuildHookInterface[Any]):
    """Adds the file `revision`, with `-dirty` where files differ; none without git's history."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add it, from git or from the sdist that this is."""
        file = Path(self.root, "revision")
        if Path(self.root, ".git").exists():
            try:
                told = subprocess.run(_COMMAND, cwd=self.root, capture_output=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                return
            file = Path(self.directory, "revision")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(told.stdout)
        if version != "editable" and file.exists():
            place = "revision" if self.target_name == "sdist" else "gpt_compose/revision"
            build_data["force_include"][str(file)] = place

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file from the folder of what is built."""
        Path(self.directory, "revision").unlink(missing_ok=True)
