"""Python programs of a few lines, in processes of their own."""

import os
import subprocess
import sys


def run_python(
    program: str, *words: object, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run a program with these arguments and variables until it ends, however that is."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )
