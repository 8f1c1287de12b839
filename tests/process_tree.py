"""Which process has started which, by /proc."""

from pathlib import Path


def children() -> dict[int, list[Path]]:
    """Number of a process -> folders in /proc of those that it has started and that are there."""
    found: dict[int, list[Path]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which is in parentheses, come state and parent.
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        found.setdefault(int(parent), []).append(place)
    return found
