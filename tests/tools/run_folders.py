"""Made-up folders of runs, of any length and with any content."""

import json
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS: dict[str, Any] = {
    "settings": {
        "general": {"data_dir": "data", "recipe": None},
        "model": {"num_layers": 12},
        "train": {"max_steps": 38, "learning_rate": 0.0036, "betas": [0.9, 0.95], "shuffle": True},
    },
    "versions": {"torch": "2.13.0"},
    "machine": {"system": "Linux", "cpus": 16},
    "device": {"name": "NVIDIA H200", "memory_bytes": 140 * 2**30, "precision": "bf16"},
    "dataset": {
        "folder": "fineweb20M",
        "train_tokens": 20_000_000,
        "source": {"dataset": "HuggingFaceFW/fineweb"},
    },
    "processes": 1,
    "git_revision": None,
    "parameters": 124439808,
}


def rows(
    steps: int, val_every: int = 0, tokens_per_step: int = 524288, lowest: float = 3.0
) -> list[dict[str, Any]]:
    """Return the metrics of a run whose loss falls from 11, with the compilation in step 0."""
    noise = np.random.default_rng(0).standard_normal(steps)
    result: list[dict[str, Any]] = []
    for step in range(steps):
        loss = lowest + 8 / (1 + step / 20) + 0.05 * float(noise[step])
        step_ms = 60000.0 if step == 0 else 2500 + 20 * float(noise[step])
        result.append(
            {
                "step": step,
                "tokens": (step + 1) * tokens_per_step,
                "train_loss": loss,
                "lr": 6e-4 * min(1, (step + 1) / 10),
                "grad_norm": 0.3 + 10 / (1 + step),
                "step_ms": step_ms,
                "tokens_per_second": tokens_per_step / step_ms * 1000,
                "mfu": None,
                "memory_bytes": 41 * 2**30,
                "data_ms": 1.0,
            }
        )
        if val_every and (step + 1) % val_every == 0:
            result[-1] |= {"val_loss": loss + 0.1, "val_ms": 9000.0}
    result[0]["setup_ms"] = 20000.0
    return result


def make_run(
    folder: Path,
    metrics: list[dict[str, Any]],
    settings: Any = SETTINGS,
    samples: dict[int, list[str]] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "settings.json").write_text(json.dumps(settings))
    written = (
        f"----- after {step} steps -----\n{text}\n\n"
        for step, texts in (samples or {}).items()
        for text in texts
    )
    (folder / "samples.txt").write_text("".join(written), encoding="utf-8")
    return folder
