"""What it costs that a run is never lost: how long a step waits for a checkpoint, and for the rest.

    python benchmarks/safety.py [--folder DIR] [--out FILE.json]

GPT-2 124M on the CPU, with Muon's and AdamW's state as in training. `stall` is what the loop waits
for: a copy in memory. `written` is how long the thread then writes, hashes and syncs. `agreement`
is the question to all ranks in each step, between two gloo processes. On a GPU the copy goes over
the bus: 1.4 GB in 30 ms at 50 GB/s.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.distributed.world import World, init_world
from app.model.gpt import GPT, GPTConfig
from app.runs.checkpoint import Checkpoint, open_checkpoint
from app.runs.checkpoint_state import CheckpointState
from app.runs.folder import RunFolder
from app.runs.metrics import MetricsLog, StepRecord
from app.runs.run_logger import RunLogger
from app.settings.train import TrainSettings
from app.train.checkpointer import Checkpointer
from app.train.optimizer import build_optimizers

SAVES = 5
STEPS_BETWEEN_SAVES = 250
# At the aim of 600,000 tokens/s.
STEP_ON_A_GPU_SECONDS = 524_288 / 600_000
ASKED = 2000
STATE = CheckpointState(
    step=0, micro_batch_size=0, sequences_consumed=0, model={}, settings={}, identity={},
    versions={},
)  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", type=Path, help="on the disk to measure")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.rank:
        print(json.dumps(agreement()))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = checkpoints(Path(folder))
    found["agreement_ms"] = 1000 * statistics.median(two_ranks())
    interval = STEPS_BETWEEN_SAVES * STEP_ON_A_GPU_SECONDS
    found["share_of_an_interval"] = {
        "of": f"{STEPS_BETWEEN_SAVES} steps of {STEP_ON_A_GPU_SECONDS:.2f} s",
        "checkpoint": found["stall_seconds"] / interval,
        "agreement": found["agreement_ms"] / 1000 / STEP_ON_A_GPU_SECONDS,
        "metrics": found["metrics_line_ms"] / 1000 / STEP_ON_A_GPU_SECONDS,
    }
    results = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
        **found,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


def checkpoints(folder: Path) -> dict[str, Any]:
    """Save GPT-2 124M again and again."""
    model = GPT(GPTConfig())
    optimizers = build_optimizers(model, TrainSettings())
    optimizers.begin_step(0, 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    stalls, written = [], []
    run = RunFolder(folder / "run")
    run.checkpoints.mkdir(parents=True)
    log = RunLogger(run, None, {}, print)
    with Checkpointer(run, 2, World(), log, None, print) as checkpointer:
        for step in range(1, SAVES + 1):
            started = time.perf_counter()
            checkpointer.save(replace(STATE, step=step), model, optimizers)
            stalls.append(time.perf_counter() - started)
            checkpointer.wait()
            written.append(time.perf_counter() - started - stalls[-1])
    last: Checkpoint = open_checkpoint(folder / "run" / "checkpoints" / f"step-{SAVES:06d}")
    started = time.perf_counter()
    last.verify()
    verified = time.perf_counter() - started
    lines = []
    log = MetricsLog(folder / "metrics.jsonl", 0)
    for step in range(200):
        started = time.perf_counter()
        log.append(StepRecord(step, step, 1.5))
        lines.append(time.perf_counter() - started)
    return {
        "bytes": sum(file.stat().st_size for file in last.folder.iterdir()),
        "first_stall_seconds": stalls[0],
        "stall_seconds": statistics.median(stalls[1:]),
        "written_seconds": statistics.median(written[1:]),
        "verified_seconds": verified,
        "metrics_line_ms": 1000 * statistics.median(lines),
    }


def two_ranks() -> list[float]:
    """Seconds of each question, asked by two processes."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            variables = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29571, "TORCHELASTIC_RUN_ID": "bench",
            }  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            command = [sys.executable, __file__, "--rank"]
            children.append(Popen(command, env=environment, stdout=PIPE, text=True, cwd=folder))
        printed = [child.communicate()[0] for child in children]
    return [max(pair) for pair in zip(*map(json.loads, printed), strict=True)]


def agreement() -> list[float]:
    """Ask all ranks whether to stop, as each step does."""
    seconds = []
    with init_world(torch.device("cpu"), 60) as ranks:
        for _ in range(ASKED):
            started = time.perf_counter()
            ranks.any(False)
            seconds.append(time.perf_counter() - started)
    return seconds[ASKED // 10 :]


if __name__ == "__main__":
    main()
