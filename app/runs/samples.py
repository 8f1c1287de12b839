"""samples.txt: what a model generated during training, under a heading for each text."""

import re
from collections.abc import Sequence
from pathlib import Path

from app.files import read_bytes

_HEADING = re.compile(r"^----- after (\d+) steps -----\n", re.MULTILINE)


def format_samples(step: int, texts: Sequence[str]) -> bytes:
    """Return the part of samples.txt for the texts after `step` steps, in UTF-8."""
    heading = f"----- after {step} steps -----"
    return "".join(f"{heading}\n{text}\n\n" for text in texts).encode("utf-8", "replace")


def read_samples(path: Path) -> list[tuple[int, list[str]]]:
    """Return (steps done, texts) in the order of samples.txt; empty if there is no file.

    What stands before the first heading is left out; bytes that are not UTF-8 are replaced.
    """
    content = read_bytes(path).decode("utf-8", "replace") if path.is_file() else ""
    _, *parts = _HEADING.split(content)
    samples: list[tuple[int, list[str]]] = []
    for step, text in zip(map(int, parts[::2]), parts[1::2], strict=True):
        if not samples or samples[-1][0] != step:
            samples.append((step, []))
        samples[-1][1].append(text.removesuffix("\n\n"))
    return samples
