"""The processes that training.py measures: ours, the original, jobs of training_steps.py."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.setting_groups import VARIABLES

ROOT = Path(__file__).parent.parent
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:([\d.]+) train_time:(\d+)ms token/s:([\d.]+)")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Size:
    """What is trained, and how long."""

    model: dict[str, int]
    tokens_per_step: int
    micro_batch: int
    steps: int
    start_steps: int
    curve_model: dict[str, int]
    curve_tokens_per_step: int
    curve_steps: int
    micro_batches: tuple[int, ...]
    repeats: int

    @property
    def accumulation(self) -> int:
        return self.tokens_per_step // (self.micro_batch * self.model.get("context_length", 1024))


@dataclass
class Bench:
    """What every part needs."""

    size: Size
    device: str
    quick: bool
    original: Path | None
    dataset: Path
    work: Path
    repeats: int
    plot: Path | None
    keep: Callable[[], None]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.facts["device_type"] == "cuda"

    def environment(self, cache: Path) -> dict[str, str]:
        """No settings of this machine's, an own compile cache, no network."""
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return kept | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *self.more_paths]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **{name: str(cache / name.lower()) for name in CACHES},
            **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}),
        }

    @property
    def more_paths(self) -> list[str]:
        """Where else this machine keeps packages."""
        return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]

    def cache(self, own: Path) -> Path:
        """The compile cache of a process; the quick check shares one."""
        return self.work / "cache" if self.quick else own

    def job(self, name: str, spec: Any) -> Any:
        """What a job of training_steps.py finds, in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.training_steps", name, json.dumps(spec)],
            env=self.environment(self.work / "cache"), cwd=self.work,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return {"failed": done.returncode, "stderr": done.stderr[-1500:]}
        return json.loads(done.stdout.splitlines()[-1])

    def spec(self, **changes: Any) -> dict[str, Any]:
        size = self.size
        own = {"device": self.device, "model": size.model, "micro_batch": size.micro_batch}
        return own | {"repeats": size.repeats} | changes

    def model_flags(self, model: dict[str, int]) -> list[str]:
        return [word for name, value in model.items() for word in flag(name, value)]

    def train(
        self, name: str, data_dir: Path, recipe: str, cache: Path | None = None, **flags: Any
    ) -> "Ran":
        """A run of the program, in which nothing but the training takes time."""
        flags = {"device": self.device, "val_every": 0, "sample_every": 0, **flags}
        words = [word for key, value in flags.items() for word in flag(key, value)]
        return run_process(
            ["-m", "app", "train", "--recipe", recipe, "--data-dir", str(data_dir),
             "--run-name", name, "--dataset-dir", str(self.dataset), *words],
            self.work,
            self.environment(cache or self.cache(data_dir / "cache")),
            data_dir / "runs" / name / "metrics.jsonl",
            self.on_gpu,
        )  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """What a process printed, and when."""

    lines: list[tuple[float, str]]
    seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    metrics: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [line["train_loss"] for line in self.metrics]

    def summary(self, bench: Bench, tokens_per_step: int) -> dict[str, Any]:
        """Speed without the first step, start, memory."""
        steps = [
            (at, match) for at, line in self.lines if (match := STEP_LINE.match(line)) is not None
        ]
        text = "\n".join(line for _, line in self.lines)
        total = re.search(r"^Total time: ([\d.]+)s", text, re.MULTILINE)
        micro_batch = re.search(r"^Tokens per micro-batch: (\d+)", text, re.MULTILINE)
        printed = statistics.median(float(match[4]) for _, match in steps[1:])
        flops = bench.facts["flops_per_token"]
        peak = bench.facts["peak_flops"]
        matmul = bench.facts["matmul_flops"]
        return {
            "tokens_per_second": printed,
            "tokens_per_second_by_lines": (len(steps) - 1)
            * tokens_per_step
            / (steps[-1][0] - steps[0][0]),
            "step_ms": statistics.median(float(match[3]) for _, match in steps[1:]),
            "step_0_seconds": float(steps[0][1][3]) / 1000,
            "start_to_end_of_step_0_seconds": steps[0][0],
            "total_time_seconds": float(total[1]) if total else None,
            "process_seconds": self.seconds,
            "tokens_per_micro_batch": int(micro_batch[1]) if micro_batch else None,
            "mfu": printed * flops / peak if peak else None,
            "share_of_matmul_speed": printed * flops / matmul,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_gpu_bytes_by_nvidia_smi": self.peak_gpu_bytes,
            "peak_memory_bytes": self.metrics[-1]["memory_bytes"] if self.metrics else None,
            "losses": [float(match[2]) for _, match in steps],
            "said": [line for _, line in self.lines if line.startswith(("attention", "CPU", "NV"))]
            + [line for _, line in self.lines if "came from the cache" in line],
        }


def flag(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", str(value)]


def prepared(bench: Bench) -> Path:
    """A dataset of Python's own library; training on it goes round and round."""
    train, val = (400_000, 4_096) if bench.quick else (4_000_000, 65_536)
    folder = bench.work / f"stdlib{train}"
    if not (folder / "manifest.json").exists():
        subprocess.run(
            [sys.executable, "-m", "app", "prepare", "--dataset", "stdlib",
             "--total-tokens", str(train), "--val-tokens", str(val), "--out-dir", folder.name,
             "--data-dir", str(bench.work)],
            env=bench.environment(bench.work / "cache"), cwd=bench.work,
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    return folder


def run_process(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    metrics: Path | None,
    watch_gpu: bool,
) -> Ran:
    """Run Python, note when each line comes, and the most memory in use."""
    over = threading.Event()
    used: list[int] = []
    watcher = threading.Thread(target=watch_memory, args=(over, used), daemon=True)
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        if watch_gpu:
            watcher.start()
        assert process.stdout is not None
        lines = [(time.perf_counter() - started, line.rstrip("\n")) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        if process.returncode:
            errors.seek(0)
            said = "\n".join(line for _, line in lines[-5:])
            sys.exit(f"{arguments} failed ({process.returncode}):\n{said}\n{errors.read()[-2000:]}")
    records = metrics.read_text().splitlines() if metrics else []
    return Ran(
        lines, seconds, usage.ru_maxrss * 1024, max(used, default=None), [*map(json.loads, records)]
    )


def watch_memory(over: threading.Event, used: list[int]) -> None:
    """All of the GPU's memory in use, also what torch keeps for itself."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not over.wait(1):
        said = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=False).stdout
        used += [int(line) << 20 for line in said.split()[:1] if line.isdigit()]


def original_copy(bench: Bench, folder: Path) -> dict[str, str]:
    """Write the original with other settings, and say which."""
    assert bench.original is not None
    size, changed = bench.size, {}
    shards = folder / "shards"
    shards.mkdir(parents=True)
    manifest = json.loads((bench.dataset / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["split"] == "train":
            (shards / shard["file"]).symlink_to(bench.dataset / shard["file"])
    length = size.model.get("context_length", 1024)
    replaced = {
        "data/dataloader.py": {r"offset_bytes=256": "offset_bytes=1024"},
        "model/gpt.py": {},
        "train.py": {
            r"(?m)^total_batch_size = \d+": f"total_batch_size = {size.tokens_per_step}",
            r"(?m)^batch_size = \d+": f"batch_size = {size.micro_batch}",
            r"(?m)^sequence_length = \d+": f"sequence_length = {length}",
            r"(?m)^max_steps = \d+": f"max_steps = {size.steps}",
            r'(?m)^data_root = ".*"': f"data_root = {str(shards)!r}",
        },
    }
    if size.model:
        shape = ", ".join(f"{name}={value}" for name, value in size.model.items())
        replaced["train.py"][r"GPTConfig\(context_length=sequence_length\)"] = f"GPTConfig({shape})"
    for name, patterns in replaced.items():
        text = (bench.original / name).read_text()
        for pattern, value in patterns.items():
            found = re.findall(pattern, text)
            assert len(found) == 1, f"the original's {pattern} is not where it was"
            text = text.replace(found[0], value)
            if found[0] != value:
                changed[f"{name}: {found[0]}"] = value.replace(str(shards), "…/shards")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("data", "model"):
        (folder / name / "__init__.py").touch()
    return changed
