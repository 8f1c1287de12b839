"""What fits: each recipe's micro-batch on GPUs by memory, as `train` would choose it.

    python benchmarks/memory_table.py

prints the table of docs/recipes.md, which a test compares. Nothing is measured: it is the estimate
of app.train.micro_batch for compiled code on one GPU whose memory is free. No GPU is needed.
"""

import sys
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.sequences import micro_batch_sizes
from app.formats import format_count
from app.hardware.device import Device, Precision
from app.hardware.memory import MemoryEstimate, largest_batch_that_fits
from app.model.architectures import build_config, build_model
from app.settings.settings import Settings
from app.settings.sources import load_settings
from app.train.micro_batch import estimate_memory

# Column -> memory in GiB, and what auto chooses as its precision.
GPUS: dict[str, tuple[int, Precision]] = {
    "8 GB": (8, "bf16"),
    "12 GB": (12, "bf16"),
    "16 GB": (16, "bf16"),
    "16 GB, fp16 (T4, V100)": (16, "fp16"),
    "24 GB": (24, "bf16"),
    "80 GB": (80, "bf16"),
}
RECIPES = ("demo", "original", "fineweb20M", "gpt2-124M", "qwen3-124M", "finetune")
# The shapes of GPT-2 beyond the recipes: layers, width, heads.
GPT2_SHAPES = {"medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)}


def variants() -> dict[str, dict[str, str]]:
    """Return what is set for each row of the table."""
    rows = {recipe: {"RECIPE": recipe} for recipe in RECIPES}
    for name, (layers, width, heads) in GPT2_SHAPES.items():
        shape = {"LAYERS": layers, "HEADS": heads}
        rows[f"gpt2-124M, as large as GPT-2 {name}"] = {
            "RECIPE": "gpt2-124M",
            "MODEL_EMBD_SIZE": str(width),
            **{f"MODEL_NUM_{key}": str(value) for key, value in shape.items()},
        }
    return rows


def choices(settings: Settings) -> list[str]:
    """Return for each GPU the micro-batch in sequences, and whether activations are recomputed."""
    cfg, config = settings.train, build_config(settings.model.shape())
    length = config.context_length
    sizes = micro_batch_sizes(cfg.tokens_per_step // length, 1)

    @cache
    def estimate(precision: Precision, recompute: str) -> MemoryEstimate:
        gpu = Device(torch.device("cuda"), "a GPU", precision, False, None)
        return estimate_memory(cfg.model_copy(update={"recompute": recompute}), config, gpu, 1)

    cells = []
    for gib, auto in GPUS.values():
        precision, cell = auto if cfg.precision == "auto" else cfg.precision, "-"
        # Recomputing is the second choice.
        for recompute, words in (("true", ", recomputed"), ("false", "")):
            it = estimate(precision, recompute)
            if it.fits(1, gib << 30):
                size = largest_batch_that_fits(sizes, length, it, "cuda", gib << 30)
                cell = f"{size}{words}"
        cells.append(cell)
    return cells


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        f"| recipe | parameters | {' | '.join(GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]
    for name, given in variants().items():
        settings = load_settings(given, "train")
        with torch.device("meta"):
            parameters = build_model(build_config(settings.model.shape())).num_parameters()
        cells = [name, format_count(parameters), *choices(settings)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
