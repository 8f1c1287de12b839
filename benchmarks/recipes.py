"""Recipes against each other: loss on held-out text after equal tokens and equal FLOPs.

    python benchmarks/recipes.py --dataset DIR [--out FILE.json] [--only PART]
        [--plot PNG] [--plot-changes PNG]

DIR is what `prepare` has written. Each run is a whole `train` process of a small GPT in a folder of
its own; all share one compiler cache. Runs that FILE.json already holds, with the same settings,
are not repeated, so that an interrupted comparison continues.

Coarse: one seed, one to three settings of the default recipe changed. 38 steps of 16,384 tokens
with a width of 256, or of 8,192 with one of 512, are what two cores can do in two minutes.
Finals: original and default, three seeds, with a held-out curve, at the larger width.
Short: 38 steps of 2,048 tokens: each change of the default recipe alone, three seeds, width 256.
Long: 200 steps of 1,024 tokens: each change alone, all together, and all with the second
architecture, three seeds, width 256; the last two at width 384 as well.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

Settings = dict[str, str]

ALWAYS: Settings = {
    "MODEL_CONTEXT_LENGTH": "256",
    "MODEL_NUM_LAYERS": "4",
    "MODEL_EMBD_SIZE": "256",
    "MODEL_NUM_HEADS": "4",
    "TRAIN_TOKENS_PER_STEP": "16384",
    "TRAIN_MAX_STEPS": "38",
    "TRAIN_VAL_TOKENS": "65536",
    "TRAIN_SAMPLE_EVERY": "0",
    "TRAIN_CHECKPOINT_EVERY": "0",
    "TRAIN_RUN_NAME": "run",
    "TRAIN_PRECISION": "bf16",
}
VAL_EVERY = {"coarse": "38", "finals": "13", "short": "38", "long": "200"}
DEFAULT: Settings = {
    "TRAIN_OPTIMIZER": "muon",
    "TRAIN_LEARNING_RATE": "3.6e-3",
    "TRAIN_BETAS": "0.9,0.95",
    "TRAIN_WEIGHT_DECAY": "0.1",
    "TRAIN_WEIGHT_DECAY_ON": "matrices",
    "TRAIN_GRAD_CLIP": "1.0",
    "TRAIN_WARMUP_STEPS": "0",
    "TRAIN_LR_SCHEDULE": "cosine",
    "TRAIN_MIN_LR_RATIO": "0.1",
    "TRAIN_SHUFFLE": "true",
    "TRAIN_RESIDUAL": "bf16",
    "TRAIN_MUON_SPLIT": "false",
}
ORIGINAL: Settings = {
    "TRAIN_OPTIMIZER": "adamw",
    "TRAIN_LEARNING_RATE": "3e-4",
    "TRAIN_BETAS": "0.9,0.999",
    "TRAIN_WEIGHT_DECAY": "0.01",
    "TRAIN_WEIGHT_DECAY_ON": "all",
    "TRAIN_GRAD_CLIP": "0",
    "TRAIN_WARMUP_STEPS": "0",
    "TRAIN_LR_SCHEDULE": "constant",
    "TRAIN_MIN_LR_RATIO": "0.1",
    "TRAIN_SHUFFLE": "false",
    "TRAIN_RESIDUAL": "float32",
}
# As wide as a CPU allows, to see how the best rate moves with the width; half the tokens.
WIDE: Settings = {
    "MODEL_EMBD_SIZE": "512",
    "MODEL_NUM_HEADS": "8",
    "TRAIN_TOKENS_PER_STEP": "8192",
}
FINALS = {
    "original": ORIGINAL | WIDE,
    "default": DEFAULT | WIDE,
    "default, residual stream in float32": DEFAULT | WIDE | {"TRAIN_RESIDUAL": "float32"},
}
SEEDS = (0, 1, 2)
CHANGES: dict[str, Settings] = {
    "q, k, v split": {"TRAIN_MUON_SPLIT": "true"},
    "embeddings at twice the rate": {"TRAIN_EMBEDDING_LEARNING_RATE": "1.44e-2"},
    "output projections from zero": {"TRAIN_ZERO_INIT": "true"},
    "no decay of embeddings": {"TRAIN_WEIGHT_DECAY_ON": "blocks"},
}
LONGER: dict[str, Settings] = {
    "momentum warm-up of 32 steps": {"TRAIN_MOMENTUM_WARMUP_STEPS": "32"},
    "constant, then linear to 0 in the last half": {
        "TRAIN_LR_SCHEDULE": "wsd",
        "TRAIN_COOLDOWN": "0.5",
        "TRAIN_MIN_LR_RATIO": "0",
    },
}
QWEN3: Settings = {"MODEL_ARCHITECTURE": "qwen3", "MODEL_NUM_HEADS": "2"}


def at(rate: str, **changes: str) -> Settings:
    """The default recipe with another rate, and other settings: warmup_steps="4"."""
    return {"TRAIN_LEARNING_RATE": rate} | {
        f"TRAIN_{name.upper()}": value for name, value in changes.items()
    }


COARSE: dict[str, Settings] = {
    "1.8e-3": at("1.8e-3"),
    "3.6e-3": at("3.6e-3"),
    "7.2e-3": at("7.2e-3"),
    "1.8e-3, warm-up of 4 steps": at("1.8e-3", warmup_steps="4"),
    "3.6e-3, warm-up of 4 steps": at("3.6e-3", warmup_steps="4"),
    "7.2e-3, warm-up of 4 steps": at("7.2e-3", warmup_steps="4"),
    "1.44e-2, warm-up of 4 steps": at("1.44e-2", warmup_steps="4"),
    "7.2e-3, warm-up of 4 steps, linear to 0": at(
        "7.2e-3", warmup_steps="4", lr_schedule="linear", min_lr_ratio="0"
    ),
    "AdamW 3.6e-3, warm-up of 4 steps": at("3.6e-3", warmup_steps="4", optimizer="adamw"),
    "AdamW 7.2e-3, warm-up of 4 steps": at("7.2e-3", warmup_steps="4", optimizer="adamw"),
    "wide: original": ORIGINAL | WIDE,
    "wide: 1.8e-3": at("1.8e-3") | WIDE,
    "wide: 3.6e-3": WIDE,
    "wide: 7.2e-3": at("7.2e-3") | WIDE,
}
SHORT: Settings = {
    "TRAIN_TOKENS_PER_STEP": "2048",
    "TRAIN_LEARNING_RATE": "7.2e-3",
    "TRAIN_VAL_TOKENS": "32768",
}
LONG: Settings = SHORT | {
    "TRAIN_TOKENS_PER_STEP": "1024",
    "TRAIN_MAX_STEPS": "200",
    "TRAIN_LEARNING_RATE": "3.6e-3",
}
NARROWER: Settings = {
    "MODEL_EMBD_SIZE": "384",
    "MODEL_NUM_HEADS": "6",
    "TRAIN_LEARNING_RATE": "2.4e-3",
}
ALL = {name: value for change in (CHANGES | LONGER).values() for name, value in change.items()}
COLORS = {"original": "#7f7f7f", "default": "#1f77b4"}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--dataset", type=Path, required=True, help="a prepared dataset folder")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--only", choices=tuple(VAL_EVERY))
    arguments.add_argument("--plot", type=Path, metavar="PNG", help="the finals' curves")
    arguments.add_argument("--plot-changes", type=Path, metavar="PNG", help="the changes' gains")
    chosen = arguments.parse_args()
    before = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    known = [settings for *_, settings in planned()]
    kept = [run for run in before.get("runs", []) if run["settings"] in known]
    results = about(chosen.dataset) | {"runs": kept}
    with tempfile.TemporaryDirectory() as cache:
        for part, name, settings in planned():
            if chosen.only not in (None, part):
                continue
            run = next((run for run in results["runs"] if run["settings"] == settings), None)
            if run is None:
                measured = train(chosen.dataset.resolve(), settings, Path(cache))
                run = {"settings": settings} | measured
                results["runs"].append(run)
                print(f"{part}, {name}: {run['val_loss'][-1]:.4f}", file=sys.stderr, flush=True)
            run |= {"part": part, "name": name}
            results["summary"] = summary(results["runs"])
            if chosen.out:
                chosen.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if chosen.plot:
        plot(results["runs"], chosen.plot)
    if chosen.plot_changes:
        plot_changes(results["runs"], chosen.plot_changes)


def about(dataset: Path) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo").read_text()
    model = next(line for line in cpu.splitlines() if line.startswith("model name"))
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {model.partition(':')[2].strip()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dataset": json.loads((dataset / "manifest.json").read_text()),
    }


def planned() -> Iterator[tuple[str, str, Settings]]:
    """Part, name and all settings of each run."""
    for name, changes in COARSE.items():
        yield "coarse", name, run_settings("coarse", DEFAULT | changes, seed=0)
    for part, recipes in (("finals", FINALS), ("short", shorter()), ("long", longer())):
        for seed in SEEDS:
            for name, recipe in recipes.items():
                yield part, name, run_settings(part, recipe, seed)


def shorter() -> dict[str, Settings]:
    """The recipes of 38 steps by name."""
    return {
        name: DEFAULT | SHORT | changes for name, changes in ({"default": {}} | CHANGES).items()
    }


def longer() -> dict[str, Settings]:
    """The recipes of 200 steps by name."""
    of_all = {"default": {}, "all": ALL, "all, qwen3": ALL | QWEN3}
    others = {"all but the projections from zero": ALL | {"TRAIN_ZERO_INIT": "false"}}
    narrow = DEFAULT | LONG
    recipes = {
        name: narrow | changes | embeddings("7.2e-3", changes)
        for name, changes in (of_all | CHANGES | LONGER | others).items()
    }
    for name, changes in of_all.items():
        heads = {"MODEL_NUM_HEADS": "3"} if changes.get("MODEL_NUM_HEADS") == "2" else {}
        recipes[f"width 384: {name}"] = (
            narrow | NARROWER | changes | embeddings("4.8e-3", changes) | heads
        )
    return recipes


def embeddings(rate: str, changes: Settings) -> Settings:
    """The rate of the embeddings, if the changes have one of their own."""
    name = "TRAIN_EMBEDDING_LEARNING_RATE"
    return {name: rate} if name in changes else {}


def run_settings(part: str, recipe: Settings, seed: int) -> Settings:
    return ALWAYS | {"TRAIN_VAL_EVERY": VAL_EVERY[part], "TRAIN_SEED": str(seed)} | recipe


def train(dataset: Path, settings: Settings, cache: Path) -> dict[str, Any]:
    """Losses of a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dataset").symlink_to(dataset)
        environment = {
            "DATA_DIR": folder,
            "TRAIN_DATASET_DIR": "dataset",
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
        }
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "app", "train"], cwd=ROOT,
            env=os.environ | settings | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{settings} failed ({done.returncode}):\n{done.stdout[-2000:]}")
        metrics = Path(folder) / "runs" / settings["TRAIN_RUN_NAME"] / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured = [record for record in records if "val_loss" in record]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "val_tokens_seen": [record["tokens"] for record in measured],
        "val_loss": [round(record["val_loss"], 5) for record in measured],
        "train_loss": [round(record["train_loss"], 4) for record in records],
        "grad_norm": [round(record["grad_norm"], 4) for record in records],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out losses at the end: mean and deviation over seeds, and the gain seed by seed."""
    result: dict[str, Any] = {
        "coarse": {run["name"]: run["val_loss"][-1] for run in runs if run["part"] == "coarse"}
    }
    for part in ("finals", "short", "long"):
        losses: dict[str, list[float]] = {}
        for run in (run for run in runs if run["part"] == part):
            losses.setdefault(run["name"], []).append(run["val_loss"][-1])
        result[part] = {
            name: {
                "mean": round(statistics.fmean(values), 4),
                "standard_deviation": deviation(values),
                "seeds": len(values),
                "below": reference(name, losses),
            }
            | gain(losses[reference(name, losses)], values)
            for name, values in losses.items()
        }
    return result


def reference(name: str, losses: dict[str, list[float]]) -> str:
    """The recipe that a recipe is compared with: the first one of the same width."""
    width = name.partition(": ")[0] if ": " in name else ""
    return next(other for other in losses if other.startswith(width))


def gain(before: list[float], after: list[float]) -> dict[str, Any]:
    """How many nats lower the losses are, seed by seed."""
    differences = [one - other for one, other in zip(before, after, strict=False)]
    return {
        "nats": round(statistics.fmean(differences), 4),
        "nats_standard_deviation": deviation(differences),
    }


def deviation(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


def plot_changes(runs: list[dict[str, Any]], path: Path) -> None:
    """What each change gains over the default: a point for each seed."""
    import vl_convert

    rows = []
    for part, title in (("short", "38 steps of 2,048 tokens"), ("long", "200 steps of 1,024")):
        losses: dict[str, list[float]] = {}
        for run in (run for run in runs if run["part"] == part):
            losses.setdefault(run["name"], []).append(run["val_loss"][-1])
        for name, values in losses.items():
            default = reference(name, losses)
            rows += [
                {"part": title, "change": name, "nats": before - after}
                for before, after in zip(losses[default], values, strict=False)
                if name != default
            ]
    order = list(dict.fromkeys(row["change"] for row in rows))
    spec = {
        "title": "Held-out loss below the default recipe's, seed by seed",
        "data": {"values": rows},
        "facet": {"row": {"field": "part", "type": "nominal", "title": None, "sort": None,
                          "header": {"labelAngle": 0, "labelAlign": "left"}}},
        "resolve": {"scale": {"y": "independent"}},
        "spec": {"width": 460, "layer": [
            {"mark": {"type": "rule", "color": "#999"}, "encoding": {"x": {"datum": 0}}},
            {"mark": {"type": "point", "filled": True, "size": 45}, "encoding": {
                "x": {"field": "nats", "type": "quantitative", "title": "nats per token"},
                "y": {"field": "change", "type": "nominal", "title": None, "sort": order,
                      "axis": {"labelLimit": 300}}}},
        ]},
    }  # fmt: skip
    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss against tokens: a thin line for each seed of the finals."""
    import vl_convert

    finals = [run for run in runs if run["part"] == "finals" and run["name"] in COLORS]
    rows = [
        {"recipe": run["name"], "seed": seed, "tokens": tokens, "loss": loss}
        for seed, run in enumerate(finals)
        for tokens, loss in zip(run["val_tokens_seen"], run["val_loss"], strict=True)
    ]
    colors = {"domain": list(COLORS), "range": list(COLORS.values())}
    last = {"groupby": ["recipe"], "aggregate": [
        {"op": "max", "field": "tokens", "as": "tokens"},
        {"op": "mean", "field": "loss", "as": "loss"},
    ]}  # fmt: skip
    words = "datum.recipe + ': ' + format(datum.loss, '.2f')"
    spec = {
        "title": "The same 38 steps and tokens, two recipes, three seeds each",
        "width": 700, "height": 420, "padding": {"left": 20, "top": 20, "right": 60, "bottom": 20},
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "tokens", "type": "quantitative", "title": "training tokens"},
            "y": {"field": "loss", "type": "quantitative", "scale": {"zero": False},
                  "title": "held-out loss, nats per token"},
            "color": {"field": "recipe", "type": "nominal", "scale": colors, "legend": None},
        },
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1, "point": {"size": 12}},
             "encoding": {"detail": {"field": "seed"}}},
            {"transform": [
                {"joinaggregate": [{"op": "max", "field": "tokens", "as": "end"}]},
                {"filter": "datum.tokens == datum.end"}, last, {"calculate": words, "as": "words"}],
             "mark": {"type": "text", "align": "left", "dx": 8},
             "encoding": {"text": {"field": "words", "type": "nominal"}}},
        ],
    }  # fmt: skip
    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=1.3))


if __name__ == "__main__":
    main()
