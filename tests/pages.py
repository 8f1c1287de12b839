"""The commands of the documentation, as they stand on its pages."""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGES = tuple(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
)


@dataclass(frozen=True)
class Block:
    """Commands that belong together.

    Attributes:
        page: its path in the checkout
        where: why they are not run here; empty for those that are
        script: for a shell
    """

    page: str
    where: str
    script: str

    @property
    def is_for_containers(self) -> bool:
        """Return True if it is run with a container engine."""
        return not self.where and "docker " in self.script

    @property
    def is_run_here(self) -> bool:
        """Return True if it is run without containers."""
        return not self.where and "docker " not in self.script


def blocks(page: str) -> list[Block]:
    """The shell blocks of a page: those that begin with ```sh, and perhaps a reason after it."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = re.findall(r"^```sh *(.*?)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, where, script) for where, script in found]
