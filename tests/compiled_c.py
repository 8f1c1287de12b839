"""The C sources of these tests, each compiled once in a process."""

import functools
import subprocess
import tempfile
from pathlib import Path


@functools.cache
def compiled(source: Path, *options: str) -> Path:
    """The program or library, in a folder that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix=f"{source.stem}-")
    _folders.append(folder)
    binary = Path(folder.name, source.stem)
    # g++ is what torch.compile needs, too.
    subprocess.run(["g++", "-x", "c", *options, "-o", binary, source, "-ldl"], check=True)
    return binary


def preloaded(source: Path, *options: str) -> Path:
    """The library for LD_PRELOAD."""
    return compiled(source, "-shared", "-fPIC", *options)


_folders: list[tempfile.TemporaryDirectory[str]] = []
