"""The processes that training.py measures: ours, the original's, those that look inside a step."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from app.settings.settings import VARIABLES

ROOT = Path(__file__).parent.parent
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:([\d.]+) train_time:(\d+)ms token/s:([\d.]+)")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class ProcessError(Exception):
    """A process failed, or was ended because its time was over."""


@dataclass(frozen=True)
class Size:
    """What is trained, and how long."""

    model: dict[str, int]
    tokens_per_step: int
    micro_batch: int
    speed_steps: int
    job_steps: int
    repeats: int


@dataclass
class Bench:
    """What every part needs.

    Attributes:
        work: dataset, compile caches and runs; what is left there from earlier is used again.
        deadline: when processes are ended, by time.monotonic.
        on_gpu: whether what is measured runs on one.
        filled: compile caches that have the code of a whole run.
    """

    size: Size
    device: str
    original: Path | None
    dataset: Path
    work: Path
    deadline: float
    on_gpu: bool = False
    filled: set[str] = field(default_factory=set)

    def environment(self, cache: str) -> dict[str, str]:
        """No settings of this machine's, a compile cache by name, no network."""
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *self.more_paths]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **{name: str(self.work / "caches" / cache / name.lower()) for name in CACHES},
            **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}),
        }

    @property
    def more_paths(self) -> list[str]:
        """Where else this machine keeps packages."""
        return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

    def lines(
        self, arguments: list[str], folder: Path, environment: dict[str, str]
    ) -> Iterator[tuple[float, str]]:
        """Run Python, and yield each line with the seconds from its start; the end is "".

        Raises:
            ProcessError: it failed, or the deadline came.
        """
        left = max(1, round(self.deadline - time.monotonic()))
        with tempfile.TemporaryFile("w+") as errors:
            started = time.perf_counter()
            process = subprocess.Popen(
                # It ends what Python has started as well.
                ["timeout", "--kill-after=5", str(left), sys.executable, *arguments],
                cwd=folder, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
            last = ""
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    last = line.rstrip("\n")
                    yield time.perf_counter() - started, last
                code = process.wait()
            finally:
                process.terminate()
                process.wait()
            if code in (124, 137):
                raise ProcessError(f"cut off after {time.perf_counter() - started:.0f} s: {last}")
            if code:
                errors.seek(0)
                raise ProcessError(f"exit code {code}: {last}\n{errors.read()[-2000:]}")
            yield time.perf_counter() - started, ""

    def job(self, module: str, cache: str, **spec: Any) -> Iterator[tuple[str, Any]]:
        """What a module of this folder finds, as it prints it."""
        words = ["-m", f"benchmarks.{module}", json.dumps({"device": self.device, **spec})]
        environment = self.environment(cache)
        if module == "gpu_variants" and not self.on_gpu:
            environment["TRITON_INTERPRET"] = "1"
        for _, line in self.lines(words, self.work, environment):
            if line.startswith("{"):
                yield from json.loads(line).items()

    def train(self, cache: str, data_dir: Path, recipe: str, **flags: Any) -> "Ran":
        """A run of the program; it measures no held-out loss and draws no samples unless asked."""
        flags = {
            "device": self.device, "dataset_dir": self.dataset, "data_dir": data_dir,
            "run_name": "run", "tokens_per_step": self.size.tokens_per_step,
            "val_every": 0, "sample_every": 0, **self.size.model, **flags,
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in flag(name, value)]
        arguments = ["-m", "app", "train", "--recipe", recipe, *words]
        lines = list(self.lines(arguments, self.work, self.environment(cache)))
        self.filled.add(cache)
        metrics = (data_dir / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        return Ran(lines, [json.loads(line) for line in metrics])

    def train_original(self, cache: str, folder: Path) -> "Ran":
        """A run of the original script: a copy of it in `folder`, with other constants."""
        original_copy(self, folder)
        environment = self.environment(cache)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *self.more_paths])
        return Ran(list(self.lines(["train.py"], folder, environment)), [])


@dataclass(frozen=True)
class Ran:
    """What a training process printed, and when, and our metrics.jsonl."""

    lines: list[tuple[float, str]]
    metrics: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Speed after the first step, start, losses, memory."""
        steps = [(at, match) for at, line in self.lines if (match := STEP_LINE.match(line))]
        later = [match for _, match in steps[1:]]
        gaps = [after - before for (before, _), (after, _) in pairwise(steps)]
        said = [line for _, line in self.lines if "came from the cache" in line]
        last = self.metrics[-1] if self.metrics else {}
        return {
            "tokens_per_second": statistics.median(float(match[4]) for match in later),
            "step_ms": statistics.median(float(match[3]) for match in later),
            # By the times of the lines, which needs neither program's clock.
            "step_ms_by_lines": 1000 * statistics.median(gaps),
            "first_line_seconds": self.lines[0][0],
            "end_of_step_0_seconds": steps[0][0],
            "process_seconds": self.lines[-1][0],
            "steps": len(steps),
            "held_out_loss": last.get("val_loss"),
            "peak_memory_bytes": last.get("memory_bytes"),
            "compiler": said[0] if said else None,
            "losses": [float(match[2]) for _, match in steps],
        }


def flag(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def original_copy(bench: Bench, folder: Path) -> None:
    """Write the original with our constants, and with the wrong header of its loader put right."""
    assert bench.original is not None
    size = bench.size
    shards = folder / "shards"
    shards.mkdir(parents=True)
    manifest = json.loads((bench.dataset / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["split"] == "train":
            (shards / shard["file"]).symlink_to(bench.dataset / shard["file"])
    replaced = {
        "data/dataloader.py": {r"offset_bytes=256": "offset_bytes=1024"},
        "model/gpt.py": {},
        "train.py": {
            r"(?m)^total_batch_size = \d+": f"total_batch_size = {size.tokens_per_step}",
            r"(?m)^batch_size = \d+": f"batch_size = {size.micro_batch}",
            r"(?m)^sequence_length = \d+": "sequence_length = "
            f"{size.model.get('context_length', 1024)}",
            r"(?m)^max_steps = \d+": f"max_steps = {size.speed_steps}",
            r'(?m)^data_root = ".*"': f"data_root = {str(shards)!r}",
        },
    }
    if size.model:
        shape = ", ".join(f"{name}={value}" for name, value in size.model.items())
        replaced["train.py"][r"GPTConfig\(context_length=sequence_length\)"] = f"GPTConfig({shape})"
    for name, patterns in replaced.items():
        text = (bench.original / name).read_text()
        for pattern, value in patterns.items():
            text, found = re.subn(pattern, lambda _, value=value: value, text)
            assert found == 1, f"the original's {pattern} is not where it was"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("data", "model"):
        (folder / name / "__init__.py").touch()
