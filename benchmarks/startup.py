"""How long a command takes to answer, and train to start and to end.

    python benchmarks/startup.py [--repeats 5] [--app DIR] [--shape demo|124M] [--doctor]

Whole processes. A second, untimed start counts the modules that are imported. `train` starts with
full caches: one start before has filled them. Where installed packages have no bytecode, every
process compiles them; the result says whether they have.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
COMMANDS = {
    "help": ["--help"],
    "a wrong setting": ["train", "--seed", "x"],
    "train: no data set": ["train", "--dataset-dir", "nothing"],
    "sample: no run": ["sample", "--run-name", "nothing"],
    "evaluate: no run": ["evaluate", "--run-name", "nothing"],
    "export: no run": ["export", "--run-name", "nothing"],
    "report: no run": ["report", "nothing"],
    "inspect: nothing there": ["inspect", "nothing"],
    "playground: no such host": ["playground", "--host", "nothing.invalid"],
    "prepare: no such text": ["prepare", "--dataset", "/nothing"],
}
# GPT-2 124M on few tokens, for a CPU.
_124M = ["--context-length", "128", "--num-layers", "12", "--embd-size", "768", "--num-heads", "12"]
SHAPES = {"demo": [], "124M": [*_124M, "--tokens-per-step", "128"]}
TRAIN = ["train", "--max-steps", "2", "--warmup-steps", "0", "--val-every", "0"]
TRAIN += ["--sample-every", "0"]
# What train says -> what that is the time of.
MOMENTS = {
    r".": "first line",
    r"Using device: ": "device known",
    r"step:0/": "end of step 0",
    r"step:1/": "end of step 1",
    r"Total time: ": "saved",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--app", type=Path, default=CHECKOUT, help="another checkout")
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--doctor", action="store_true", help="doctor, too: first cold, then warm")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(chosen, Environment(chosen.app.absolute(), Path(folder)))
    text = json.dumps(result, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n", encoding="utf-8")


class Environment:
    """Commands of a checkout, in a DATA_DIR of their own with the demo's settings."""

    def __init__(self, app: Path, folder: Path) -> None:
        self.folder = folder
        own = {"DATA_DIR": str(folder), "RECIPE": "demo", "PYTHONPATH": str(app)}
        self.variables = {**os.environ, **own, "PYTHONUNBUFFERED": "1"}

    def start(self, words: list[str], *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *options, "-m", "app", *words],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, words: list[str]) -> list[tuple[float, str]]:
        """What a command prints, and when; its end is the last, empty line."""
        started = time.perf_counter()
        process = self.start(words)
        assert process.stdout is not None
        printed = [(time.perf_counter() - started, line) for line in process.stdout]
        process.wait()
        return [*printed, (time.perf_counter() - started, "")]

    def modules(self, words: list[str]) -> int:
        printed, _ = self.start(words, "-X", "importtime").communicate()
        return len(re.findall(r"^import time: +\d", printed, re.MULTILINE))


def measured(chosen: argparse.Namespace, there: Environment) -> dict[str, Any]:
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    answers = {
        name: {
            "seconds": median([there.lines(words)[-1][0] for _ in range(chosen.repeats)]),
            "modules": there.modules(words),
        }
        for name, words in COMMANDS.items()
    }
    there.lines(["prepare"])
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages_have_bytecode": Path(cache_from_source(torch.origin)).exists(),
        "writes_bytecode": not sys.dont_write_bytecode,
        "repeats": chosen.repeats,
        "answers": answers,
    }
    if chosen.doctor:
        result["doctor_seconds"] = [round(there.lines(["doctor"])[-1][0], 2) for _ in range(2)]
    words = [*TRAIN, *SHAPES[chosen.shape]]
    first = moments(there.lines([*words, "--run-name", "cold"]))
    starts = [
        moments(there.lines([*words, "--run-name", f"warm{number}"]))
        for number in range(chosen.repeats)
    ]
    result["train"] = {
        "shape": chosen.shape,
        "cold": first,
        "warm": {name: median([one[name] for one in starts]) for name in first},
    }
    return result


def moments(printed: list[tuple[float, str]]) -> dict[str, float]:
    found = {"end": round(printed[-1][0], 2)}
    for seconds, line in printed:
        for pattern, name in MOMENTS.items():
            if name not in found and re.match(pattern, line):
                found[name] = round(seconds, 2)
    missing = set(MOMENTS.values()) - found.keys()
    assert not missing, (missing, printed)
    return dict(sorted(found.items(), key=lambda moment: moment[1]))


def median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    main()
