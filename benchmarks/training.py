"""Training: speed beside the original, start-up, what each technique gives, where time goes.

    python benchmarks/training.py --original DIR [--device auto|cpu|cuda] [--quick]
        [--only PART[,PART]] [--dataset-dir DIR] [--repeats N] [--work DIR] [--out FILE.json]

`speed` and `heldout` and `startup` are whole processes, timed by when their lines come. The
original's train.py runs with the settings that are written into it replaced (the result says which)
and with the header offset of its loader, which is wrong there, put right: so both read the same
tokens. Every process of `speed` starts with an empty compile cache. `ladder` changes one thing at a
time against compiled blocks; its processes share a cache, so the first call says little there.

--quick checks every part end to end with a small model; its figures mean nothing. On a CPU the
speed is GPT-2 124M's with short steps, and curves are a small model's. --out is written after each
measurement, so that a run that is cut off keeps what it has.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.training_process import (  # noqa: E402
    Bench,
    Ran,
    Size,
    flag,
    original_copy,
    prepared,
    run_process,
)
from benchmarks.training_setup import meta_model  # noqa: E402

SMALL = {"context_length": 64, "num_layers": 2, "embd_size": 64, "num_heads": 2}
MEDIUM = {"context_length": 128, "num_layers": 4, "embd_size": 128, "num_heads": 4}
ON_GPU = Size(
    {}, 524_288, 32, 38, 5, {}, 524_288, 38, (64, 128, 32, 16, 256, 8, 512), 5
)  # fmt: skip
ON_CPU = Size({}, 8192, 4, 4, 4, MEDIUM, 1024, 80, (1, 2, 4, 8), 3)
QUICK = Size(SMALL, 256, 2, 4, 3, SMALL, 256, 8, (1, 2), 2)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--original", type=Path)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--only", type=lambda names: names.split(","), default=list(PARTS))
    arguments.add_argument("--dataset-dir", type=Path)
    arguments.add_argument("--repeats", type=int, help="processes of each kind in `speed`")
    arguments.add_argument("--work", type=Path, help="keeps the dataset for another time")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    if unknown := set(chosen.only) - set(PARTS):
        arguments.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "speed" in chosen.only and chosen.original is None:
        arguments.error("speed needs --original")
    results: dict[str, Any] = {}

    def keep() -> None:
        if chosen.out:
            partial = chosen.out.with_name(chosen.out.name + ".partial")
            partial.write_text(json.dumps(results, indent=2) + "\n")
            partial.replace(chosen.out)

    with tempfile.TemporaryDirectory() as temporary:
        work = (chosen.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            QUICK, chosen.device, chosen.quick, chosen.original and chosen.original.resolve(),
            Path(), work, 1, chosen.out and chosen.out.with_suffix(".png"), keep,
        )  # fmt: skip
        facts = bench.job("facts", chosen.device)
        if "failed" in facts:
            sys.exit(facts["stderr"])
        products = next(value for name, value in facts.items() if name.startswith("matmul_"))
        bench.facts = facts | {"matmul_flops": products[facts["precision"]]}
        bench.size = QUICK if chosen.quick else ON_GPU if bench.on_gpu else ON_CPU
        bench.facts["flops_per_token"] = meta_model(bench.size.model).flops_per_token()
        bench.repeats = chosen.repeats or (1 if chosen.quick or bench.on_gpu else 3)
        bench.dataset = chosen.dataset_dir.resolve() if chosen.dataset_dir else prepared(bench)
        results["machine"] = bench.facts | {"date": time.strftime("%Y-%m-%d"), "quick": bench.quick}
        for name in chosen.only:
            started = time.perf_counter()
            results[name] = {}
            for key, value in PARTS[name](bench):
                results[name][key] = value
                print(f"{name}: {key}: {json.dumps(value)[:300]}", file=sys.stderr, flush=True)
                keep()
            results[name]["seconds"] = round(time.perf_counter() - started, 1)
            keep()
    print(json.dumps(results, indent=2))


def speed(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Whole processes in turns on the same tokens, each from an empty compile cache."""
    size = bench.size
    same = {
        **size.model,
        "max_steps": size.steps,
        "tokens_per_step": size.tokens_per_step,
    }
    as_original = {**same, "micro_batch_size": size.micro_batch}
    kinds: dict[str, Callable[[Path], Ran]] = {
        "ours, original's recipe": lambda folder: bench.train(
            "speed", folder, "original", **as_original
        ),
        "ours, default recipe": lambda folder: bench.train("speed", folder, "fineweb20M", **same),
    }
    if not bench.on_gpu:
        # The original's autocast names CUDA, and does nothing on a CPU.
        kinds["ours, original's recipe in float32"] = lambda folder: bench.train(
            "speed", folder, "original", precision="float32", **as_original
        )
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(bench.repeats):
        with tempfile.TemporaryDirectory(dir=bench.work) as temporary:
            folder = Path(temporary)
            if "original" not in runs:
                yield "replaced in the original", original_copy(bench, folder / "original")
            else:
                original_copy(bench, folder / "original")
            environment = bench.environment(bench.cache(folder / "cache"))
            paths = [str(folder / "original"), *bench.more_paths]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
            ran = run_process(["train.py"], folder / "original", environment, None, bench.on_gpu)
            runs.setdefault("original", []).append(ran.summary(bench, size.tokens_per_step))
            yield "original", medians(runs["original"])
            for number, (kind, run) in enumerate(kinds.items()):
                ran = run(folder / str(number))
                runs.setdefault(kind, []).append(ran.summary(bench, size.tokens_per_step))
                yield kind, medians(runs[kind])
    theirs = medians(runs["original"])
    yield (
        "times the original",
        {
            kind: {
                key: medians(runs[kind])[key] / theirs[key]
                for key in ("tokens_per_second", "tokens_per_second_by_lines")
            }
            | {
                "start_to_end_of_step_0": theirs["start_to_end_of_step_0_seconds"]
                / medians(runs[kind])["start_to_end_of_step_0_seconds"]
            }
            for kind in kinds
        },
    )


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Number by number; what is no number, of the last run."""
    result = {"processes": len(runs), **runs[-1]}
    for key, value in runs[-1].items():
        if isinstance(value, int | float):
            result[key] = statistics.median(run[key] for run in runs)
    return result


def startup(bench: Bench) -> Iterator[tuple[str, Any]]:
    """From the process's start to the end of its first step, with an empty and a full cache."""
    size = bench.size
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        for cache in ("cold", "warm"):
            ran = bench.train(
                cache, Path(folder), "original", Path(folder) / "cache",
                max_steps=size.start_steps, tokens_per_step=size.tokens_per_step,
                micro_batch_size=size.micro_batch, **size.model,
            )  # fmt: skip
            found = ran.summary(bench, size.tokens_per_step)
            yield (
                cache,
                {key: found[key] for key in (
                    "start_to_end_of_step_0_seconds", "step_0_seconds", "step_ms",
                    "tokens_per_second_by_lines", "said",
                )},
            )  # fmt: skip


def ladder(bench: Bench) -> Iterator[tuple[str, Any]]:
    """One thing changed at a time, against compiled blocks."""
    rungs: dict[str, dict[str, Any]] = {
        "compiled blocks": {},
        "whole model compiled": {"mode": "default"},
        "not compiled": {"compile": False},
    }
    if bench.on_gpu:
        rungs |= {
            "vocabulary not padded": {"vocab_multiple": 1},
            "attention: cuDNN": {"attention": "CUDNN_ATTENTION"},
            "attention: flash": {"attention": "FLASH_ATTENTION"},
            "attention: memory-efficient": {"attention": "EFFICIENT_ATTENTION"},
        }
    other = "float32" if bench.facts["precision"] == "bf16" else "bf16"
    rungs |= {
        f"precision: {other}{', which is TF32' if bench.on_gpu else ''}": {"precision": other},
        "deterministic": {"deterministic": "true"},
        "not deterministic": {"deterministic": "false"},
        "torch's linear_cross_entropy": {"loss": "linear_cross_entropy"},
        "linear_cross_entropy, not compiled": {"loss": "linear_cross_entropy", "compile": False},
    }
    if bench.on_gpu:
        # Deterministic is not the default there: it would be measured twice.
        del rungs["not deterministic"]
    else:
        del rungs["deterministic"]
    for name, changes in rungs.items():
        yield name, bench.job("rung", bench.spec(**changes))
    for name in ("adamw, fused", "adamw, foreach", "muon"):
        yield f"update: {name}", bench.job("optimizer_step", bench.spec(optimizer=name))
    if bench.on_gpu:
        yield (
            "whole model, max-autotune-no-cudagraphs",
            bench.job("rung", bench.spec(mode="max-autotune-no-cudagraphs")),
        )


def micro_batch(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Speed and memory by micro-batch, with Muon, beside what `auto` expects."""
    yield "auto", bench.job(
        "micro_batch_choice", bench.spec(tokens_per_step=bench.size.tokens_per_step)
    )  # fmt: skip
    too_large = sys.maxsize
    for windows in bench.size.micro_batches:
        if windows < too_large:
            found = bench.job("rung", bench.spec(micro_batch=windows, optimizer="muon"))
            too_large = windows if found.get("out_of_memory") else too_large
            yield str(windows), found


def profile(bench: Bench) -> Iterator[tuple[str, Any]]:
    """A whole step of the default optimizer, by class of kernel."""
    yield "step", bench.job(
        "profile", bench.spec(optimizer="muon", accumulation=bench.size.accumulation)
    )  # fmt: skip


def heldout(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Held-out loss of the original's recipe and of the default one, on the same tokens."""
    size, curves = bench.size, {}
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        for recipe in ("original", "fineweb20M"):
            ran = bench.train(
                recipe, Path(folder), recipe, max_steps=size.curve_steps,
                tokens_per_step=size.curve_tokens_per_step, micro_batch_size="auto",
                val_every=max(2, size.curve_steps // 19), **size.curve_model,
            )  # fmt: skip
            curves[recipe] = {
                "tokens": [line["tokens"] for line in ran.metrics],
                "train_loss": ran.losses,
                "held_out": {
                    line["tokens"]: line["val_loss"] for line in ran.metrics if "val_loss" in line
                },
            }
            yield recipe, curves[recipe]
    yield (
        "last",
        {recipe: list(curve["held_out"].values())[-1] for recipe, curve in curves.items()},
    )
    if bench.plot:
        yield "plot", draw(curves, bench.plot)


def draw(curves: dict[str, Any], path: Path) -> str:
    try:
        import vl_convert
    except ImportError:
        return "not drawn: vl-convert-python is missing"
    rows = [
        {"recipe": recipe, "tokens": tokens, kind: loss}
        for recipe, curve in curves.items()
        for kind, points in (
            ("training", zip(curve["tokens"], curve["train_loss"], strict=True)),
            ("held-out", curve["held_out"].items()),
        )
        for tokens, loss in points
    ]
    y = {"type": "quantitative", "title": "loss, nats per token", "scale": {"zero": False}}
    spec = {
        "title": "held-out loss (faint: training)", "width": 760, "height": 440, "padding": 20,
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "tokens", "type": "quantitative", "title": "tokens trained on"},
            "color": {"field": "recipe", "type": "nominal", "title": None},
        },
        "layer": [
            {"transform": [{"filter": f"isValid(datum['{kind}'])"}], "mark": mark,
             "encoding": {"y": {"field": kind, **y}}}
            for kind, mark in (
                ("training", {"type": "line", "opacity": 0.35, "strokeWidth": 1}),
                ("held-out", {"type": "line", "point": True}),
            )
        ],
    }  # fmt: skip
    path.write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))
    return path.name


def loader(bench: Bench) -> Iterator[tuple[str, Any]]:
    """The share of a step that waits for batches; less than 1 % is the aim."""
    size = bench.size
    for recipe in ("original", "fineweb20M"):
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            flags = {
                "recipe": recipe, "data_dir": folder, "run_name": "run", "sample_every": 0,
                "dataset_dir": bench.dataset, "device": bench.device, "val_every": 0,
                "tokens_per_step": size.tokens_per_step, "micro_batch_size": size.micro_batch,
                "max_steps": size.start_steps, **size.model,
            }  # fmt: skip
            words = [word for name, value in flags.items() for word in flag(name, value)]
            metrics = f"{folder}/runs/run/metrics.jsonl"
            order = "in order" if recipe == "original" else "shuffled"
            yield order, bench.job("loader", {"arguments": ["train", *words], "metrics": metrics})


def correctness(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Losses in bf16, compiled, beside float32, uncompiled: same weights, same tokens."""
    # Weights are drawn on the CPU from the seed: the same for every run.
    steps = 8 if bench.quick else 50
    model = SMALL if bench.quick else MEDIUM
    fast = {"precision": "bf16", "deterministic": "auto"}
    plain = {"precision": "float32", "compile": "false"}
    runs = {
        "float32": plain,
        "bf16, compiled": fast,
        "float32, compiled": {"precision": "float32"},
    }
    if bench.on_gpu:
        # First, since what is called float32 on a GPU multiplies in TF32.
        runs = {"float32 on the CPU": plain | {"device": "cpu"}, **runs}
    yield from compared(bench, runs, "", steps, tokens_per_step=1024, micro_batch_size=4, **model)
    if bench.on_gpu and not bench.quick:
        of_both = "float32 on the CPU", "bf16, compiled"
        on_cpu = {name: runs[name] for name in of_both}
        yield from compared(
            bench, on_cpu, "124M, ", 4, tokens_per_step=8192, micro_batch_size=4
        )  # fmt: skip


def compared(
    bench: Bench, runs: dict[str, dict[str, Any]], prefix: str, steps: int, **flags: Any
) -> Iterator[tuple[str, Any]]:
    """Each run beside the first."""
    first: list[float] = []
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        for number, (name, changes) in enumerate(runs.items()):
            ran = bench.train(
                str(number), Path(folder), "original", max_steps=steps, **flags, **changes
            )
            first = first or ran.losses
            yield (
                prefix + name,
                {
                    "largest_difference": max(
                        abs(a - b) for a, b in zip(ran.losses, first, strict=True)
                    ),
                    "first_loss": ran.losses[0],
                    "last_loss": ran.losses[-1],
                },
            )


def ddp(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Two processes on two cores, and what more GPUs would move."""
    small = bench.quick
    shape = SMALL if small else {"num_layers": 4, "context_length": 256}
    yield "two processes", bench.job(
        "ddp", bench.spec(model=shape, micro_batch=2, accumulation=8)
    )  # fmt: skip
    parameters = meta_model({}).num_parameters()
    # What one GPU needs for a step of 524,288 tokens at the aim of 600,000 tokens/s.
    compute = 524_288 / 600_000
    links = {
        "8 GPUs, NVLink 450 GB/s each way": (8, 450e9),
        "4 nodes of 8, 50 GB/s a GPU": (32, 5e10),
    }
    for name, (ranks, bandwidth) in links.items():
        moved = 2 * (ranks - 1) / ranks * 4 * parameters
        yield (
            f"arithmetic: {name}",
            {
                "bytes_a_step": round(moved),
                "all_reduce_ms": 1000 * moved / bandwidth,
                "compute_ms": 1000 * compute / ranks,
                "efficiency_without_overlap": compute
                / ranks
                / (compute / ranks + moved / bandwidth),
            },
        )


PARTS: dict[str, Callable[[Bench], Iterator[tuple[str, Any]]]] = {
    part.__name__: part
    for part in (
        speed, profile, ladder, heldout, startup, micro_batch, correctness, loader, ddp,
    )
}  # fmt: skip

if __name__ == "__main__":
    main()
