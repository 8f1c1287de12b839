"""The image by layer, a rebuild after a change, and the first step with cold and warm caches.

    python benchmarks/containers.py [--size NAME=IMAGE ...] [--out FILE.json]

It needs a container engine, and works in a copy of the checkout and in volumes of its own, on the
CPU. Images named with --size are only weighed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.newcomer import copy_checkout

REPEATS = 3
# Part of the command that made a layer -> what the layer holds.
LAYERS = {
    "compileall": "app, compiled",
    "COPY app": "app",
    "lock.txt": "packages but torch",
    "torch.sh": "torch",
    "libpython3-dev": "Python, compilers, headers",
}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--size", action="append", default=[], metavar="NAME=IMAGE")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        compose = Compose(Path(folder))
        try:
            compose("build", "train")
            results = {
                "layers_mb": {
                    "cpu": layers(compose.image),
                    **{name: layers(image) for name, _, image in map(split, chosen.size)},
                },
                "rebuild_seconds": rebuilds(compose),
                "first_step": first_steps(compose),
            }
        finally:
            compose("down", "--volumes", "--rmi", "all")
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def split(pair: str) -> tuple[str, str, str]:
    return pair.partition("=")


class Compose:
    """`docker compose` in the checkout, without a GPU."""

    image = "gpt-compose-benchmark"

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.environment = os.environ | {
            "COMPOSE_FILE": "compose.yaml:docker/compose.cpu.yaml",
            "COMPOSE_PROJECT_NAME": self.image,
            "IMAGE": self.image,
            "RECIPE": "demo",
        }

    def __call__(self, *words: str) -> tuple[str, float]:
        """What a command prints, and its seconds."""
        started = time.perf_counter()
        done = subprocess.run(
            ["docker", "compose", *words],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        return done.stdout, time.perf_counter() - started

    def inside(self, script: str) -> str:
        return self("run", "--rm", "-T", "--entrypoint", "sh", "report", "-c", script)[0]


def layers(image: str) -> dict[str, float]:
    """Megabytes by what the layer holds."""
    form = "{{.Size}}\t{{.CreatedBy}}"
    command = ["docker", "history", "--no-trunc", "--human=false", "--format", form, image]
    history = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = {}
    for line in history.splitlines():
        size, _, made_by = line.partition("\t")
        name = next((name for part, name in LAYERS.items() if part in made_by), "base image")
        found[name] = found.get(name, 0) + int(size) / 1e6
    return {name: round(size, 1) for name, size in found.items()} | {
        "sum": round(sum(found.values()), 1)
    }


def rebuilds(compose: Compose) -> dict[str, object]:
    """Seconds of `docker compose build` after a line was added to the program."""
    seconds = []
    for number in range(REPEATS):
        with (compose.checkout / "app" / "train" / "loop.py").open("a") as code:
            code.write(f"\n# change {number}\n")
        seconds.append(compose("build")[1])
    return summary(seconds)


def first_steps(compose: Compose) -> dict[str, object]:
    """The first step, and the whole of a run of 3 steps, without and with compiled code."""
    compose("run", "--rm", "prepare")
    found: dict[str, list[float]] = {}
    for number in range(REPEATS):
        compose.inside("rm -rf /data/cache/inductor")
        for state in ("cold", "warm"):
            run = f"{state}-{number}"
            job = ("run", "--rm", "-T", "train", "--run-name", run, "--max-steps", "3")
            _, whole = compose(*job)
            line = compose.inside(f"head -n 1 /data/runs/{run}/metrics.jsonl")
            found.setdefault(f"{state}_step0_seconds", []).append(json.loads(line)["step_ms"] / 1e3)
            found.setdefault(f"{state}_run_seconds", []).append(whole)
    results: dict[str, object] = {name: summary(seconds) for name, seconds in found.items()}
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    results["cold_to_warm_step0"] = round(
        median["cold_step0_seconds"] / median["warm_step0_seconds"], 1
    )
    return results


def summary(seconds: list[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(seconds), 2),
        "all": [round(one, 2) for one in seconds],
    }


if __name__ == "__main__":
    main()
