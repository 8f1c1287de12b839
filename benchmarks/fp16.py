"""The demo in float32, bf16 and fp16 with loss scaling: losses of the same steps, and overflows.

    python benchmarks/fp16.py [--steps 80] [--out FILE.json]

For a machine without a GPU: a CPU multiplies in fp16 so slowly that its products are computed here
as tensor cores do, from inputs in fp16, with sums in float32, rounded to fp16 at the end. All else
is `app train`, uncompiled. The last run begins with a loss scale that overflows.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.runs.metrics import StepRecord, read_metrics
from app.settings.sources import load_settings
from app.tools.prepare import prepare
from app.train import state
from app.train.command import start_training
from app.train.loss_scale import LossScale

# Run -> TRAIN_PRECISION, and the loss scale to begin with.
RUNS = {
    "float32": ("float32", None),
    "bf16": ("bf16", None),
    "fp16": ("fp16", None),
    "fp16, overflowing": ("fp16", 2.0**20),
}
_PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")]


class TensorCores(TorchDispatchMode):
    """Computes matrix products of fp16 in float32, and rounds the result."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in _PRODUCTS or args[-1].dtype != torch.float16:
            return func(*args, **(kwargs or {}))
        return func(*(it.float() for it in args), **(kwargs or {})).half()


def records_of(data_dir: Path, name: str, steps: int) -> list[StepRecord]:
    precision, scale = RUNS[name]
    state.LossScale = LossScale if scale is None else partial(LossScale, scale)
    given = {
        "RECIPE": "demo",
        "DATA_DIR": data_dir,
        "TRAIN_DEVICE": "cpu",
        "TRAIN_COMPILE": "false",
        "TRAIN_PRECISION": precision,
        "TRAIN_MAX_STEPS": steps,
        "TRAIN_SAMPLE_EVERY": 0,
        "TRAIN_RUN_NAME": name.replace(", ", "-"),
    }
    settings = load_settings({key: str(value) for key, value in given.items()}, "train")
    with TensorCores() if precision == "fp16" else nullcontext():
        start_training(settings)
    return read_metrics(settings.run_dir / "metrics.jsonl")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=80)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    results: dict[str, Any] = {"steps": given.steps, "torch": torch.__version__, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings({"RECIPE": "demo", "DATA_DIR": folder}, "prepare")
        prepare(settings)
        runs = {name: records_of(Path(folder), name, given.steps) for name in RUNS}
    exact = [record.train_loss for record in runs["float32"]]
    for name, records in runs.items():
        losses = [record.train_loss for record in records]
        differences = [abs(one - other) for one, other in zip(losses, exact, strict=True)]
        results["runs"][name] = {
            "val_loss": records[-1].val_loss,
            "mean_difference_of_a_training_loss": statistics.fmean(differences),
            "largest_difference": max(differences),
            "skipped_steps": [record.step for record in records if record.skipped],
            "last_loss_scale": records[-1].loss_scale,
            "training_losses": [round(loss, 5) for loss in losses],
        }
    print(json.dumps(results, indent=2))
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
