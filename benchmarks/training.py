"""Training beside the original: speed, where a step's time goes, what each change gives, losses.

    python benchmarks/training.py --original DIR [--dataset-dir DIR] [--device auto|cpu|cuda]
        [--quick] [--only PART[,PART]] [--seconds N] [--work DIR] [--out FILE.json]

--out is written after each measurement, and what it already holds is not measured again: the same
command goes on where an earlier one was cut off. The original's train.py runs with its constants
replaced and the header offset of its loader, which is wrong there, put right: all programs read the
same tokens. --quick checks every part with a small model; its figures mean nothing.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.training_process import Bench, ProcessError, Ran, Size, flag

Found = Iterator[tuple[str, Any]]

SMALL = {"context_length": 64, "num_layers": 2, "embd_size": 64, "num_heads": 2}
ON_GPU = Size({}, 524_288, 32, speed_steps=12, job_steps=38, repeats=5)
ON_CPU = Size({}, 8192, 4, speed_steps=4, job_steps=4, repeats=3)
QUICK = Size(SMALL, 256, 2, speed_steps=3, job_steps=4, repeats=1)


def main() -> None:
    chosen = parsed()
    # So that what it has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + chosen.seconds
    out = chosen.out
    results = json.loads(out.read_text()) if out and out.exists() else {"complete": []}
    with tempfile.TemporaryDirectory() as temporary:
        work = (chosen.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(QUICK, chosen.device, chosen.original.resolve(), Path(), work, end)
        measure_part("machine", bench, end, results, out)
        if not results["machine"]:
            sys.exit(1)
        bench.on_gpu = results["machine"]["cudnn"] is not None
        bench.size = QUICK if chosen.quick else ON_GPU if bench.on_gpu else ON_CPU
        bench.dataset = (chosen.dataset_dir or prepared(bench)).resolve()
        for part in chosen.only:
            measure_part(part, bench, end, results, out)
    if missing := [part for part in chosen.only if part not in results["complete"]]:
        sys.exit(f"not complete: {', '.join(missing)}; the same command goes on there")


def parsed() -> argparse.Namespace:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--original", type=Path, required=True)
    arguments.add_argument("--dataset-dir", type=Path)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--only", type=lambda names: names.split(","), default=list(PARTS)[1:])
    arguments.add_argument("--seconds", type=float, default=1e6, help="for all parts")
    arguments.add_argument("--work", type=Path, help="keeps the dataset for another time")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    if unknown := set(chosen.only) - set(PARTS):
        arguments.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return chosen


def measure_part(
    part: str, bench: Bench, end: float, results: dict[str, Any], out: Path | None
) -> None:
    """Measure what is missing of a part, as far as the time goes, and keep it."""
    if part in results["complete"]:
        return
    measure, seconds = PARTS[part]
    started = time.monotonic()
    bench.deadline = min(end, started + seconds) if bench.on_gpu else end
    found = results.setdefault(part, {})
    try:
        if end - started < 10:
            raise ProcessError("no time left")
        for name, value in measure(bench, found):
            found[name] = value
            print(f"{part}: {name}: {json.dumps(value)[:200]}", flush=True)
            keep(results, out)
    except ProcessError as error:
        print(f"{part}: {error}", flush=True)
    else:
        results["complete"].append(part)
        print(f"{part}: complete, {time.monotonic() - started:.0f} s", flush=True)
    keep(results, out)


def keep(results: dict[str, Any], out: Path | None) -> None:
    if out:
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(out)


def prepared(bench: Bench) -> Path:
    """A dataset of Python's own library, where no other is given: training goes round in it."""
    train, val = (400_000, 4_096) if bench.size is QUICK else (4_000_000, 65_536)
    folder = bench.work / f"stdlib{train}"
    if not (folder / "manifest.json").exists():
        subprocess.run(
            [sys.executable, "-m", "app", "prepare", "--dataset", "stdlib",
             "--total-tokens", str(train), "--val-tokens", str(val), "--out-dir", folder.name,
             "--data-dir", str(bench.work)],
            env=bench.environment("prepare"), cwd=bench.work, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    return folder


def machine(bench: Bench, known: Container[str]) -> Found:
    """What is measured on."""
    yield from bench.job("training_setup", "machine")


def speed(bench: Bench, known: Container[str]) -> Found:
    """Whole processes on the same tokens, each with an empty compile cache."""
    size = bench.size
    of_original = {"micro_batch_size": size.micro_batch}
    runs: dict[str, Callable[[str, Path], Ran]] = {
        "original script": bench.train_original,
        # The whole job: its held-out loss is what the others are compared with.
        "RECIPE=original": lambda cache, folder: bench.train(
            cache, folder, "original", **of_original, **whole_job(size)
        ),
        "RECIPE=fineweb20M": lambda cache, folder: bench.train(
            cache, folder, "fineweb20M", max_steps=size.speed_steps
        ),
    }
    if size is ON_CPU:
        # The original's autocast names CUDA, and does nothing on a CPU.
        runs["RECIPE=original in float32"] = lambda cache, folder: bench.train(
            cache, folder, "original", **of_original, **whole_job(size), precision="float32"
        )
    for name, run in runs.items():
        if name not in known:
            # torch's compiler bears no spaces in its paths.
            cache = name.replace(" ", "-")
            shutil.rmtree(bench.work / "caches" / cache, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                yield name, run(cache, Path(folder, "it")).summary()


def whole_job(size: Size) -> dict[str, int]:
    """Flags of a run with its held-out loss at the end."""
    return {"max_steps": size.job_steps, "val_every": size.job_steps}


def profile(bench: Bench, known: Container[str]) -> Found:
    """A step of the default recipe, by class of kernel."""
    yield from bench.job("training_profile", "RECIPE=fineweb20M", **inside(bench.size))


def variants(bench: Bench, known: Container[str]) -> Found:
    """Output layer, block, step and update with one thing changed at a time."""
    yield from bench.job("gpu_variants", "RECIPE=fineweb20M", **inside(bench.size), known=[*known])


def inside(size: Size) -> dict[str, Any]:
    """What a process needs that looks inside a step."""
    windows = size.tokens_per_step // size.model.get("context_length", 1024)
    return {
        "model": size.model, "micro_batch": size.micro_batch, "sequences_per_step": windows,
        "repeats": size.repeats,
    }  # fmt: skip


def jobs(bench: Bench, known: Container[str]) -> Found:
    """The default job with its code in the cache, and what other precisions do to its loss."""
    size, cache = bench.size, "RECIPE=fineweb20M"
    runs: dict[str, dict[str, Any]] = {"RECIPE=fineweb20M, code from the cache": {}}
    if bench.on_gpu:
        runs["RECIPE=fineweb20M, TRAIN_PRECISION=fp8"] = {"precision": "fp8"}
    runs["RECIPE=fineweb20M, TRAIN_RESIDUAL=float32"] = {"residual": "float32"}
    for name, flags in runs.items():
        if name not in known:
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                if cache not in bench.filled:
                    bench.train(cache, Path(folder, "first"), "fineweb20M", max_steps=1)
                job = {**whole_job(size), **flags}
                yield name, bench.train(cache, Path(folder, "it"), "fineweb20M", **job).summary()


def recipes(bench: Bench, known: Container[str]) -> Found:
    """The recipes of GPT-2's quality beside the default, shortened: their speed and their loss."""
    size = bench.size
    for steps in (size.job_steps, 10 * size.job_steps):
        for recipe in ("fineweb20M", "gpt2-124M", "qwen3-124M"):
            name = f"RECIPE={recipe}, {steps} steps"
            if name not in known:
                flags = {"max_steps": steps, "val_every": steps, "sample_every": 0}
                with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                    cache = f"RECIPE={recipe}"
                    yield name, bench.train(cache, Path(folder, "it"), recipe, **flags).summary()


def determinism(bench: Bench, known: Container[str]) -> Found:
    """What it costs, and whether a run that was cut ends with the same files as a whole one."""
    name = "RECIPE=fineweb20M, TRAIN_DETERMINISTIC=true"
    if name in known:
        return
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        flags = {"max_steps": 4, "checkpoint_every": 2, "keep_checkpoints": 9}
        hashes, found = [], {}
        for cut in (False, True):
            ran = bench.train(
                "deterministic", Path(folder), "fineweb20M", deterministic="true", **flags
            )
            if not cut:
                found = ran.summary()
            last = Path(folder, "runs", "run", "checkpoints", "step-000004")
            hashes.append({file.name: digest(file) for file in last.glob("*.safetensors")})
            # As if it had been killed before: the same command goes on after step 2.
            shutil.rmtree(last)
    yield name, found | {"cut_and_continued_is_identical": hashes[0] == hashes[1]}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def doctor(bench: Bench, known: Container[str]) -> Found:
    """Its table, and what it takes."""
    flags = {
        "device": bench.device, "dataset_dir": bench.dataset, "data_dir": bench.work,
        "tokens_per_step": bench.size.tokens_per_step, **bench.size.model,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in flag(name, value)]
    started = time.monotonic()
    lines = []
    try:
        for _, line in bench.lines(
            ["-m", "app", "doctor", *words], bench.work, bench.environment("doctor")
        ):
            lines.append(line)
    except ProcessError as error:
        # It exits with 1 if a check fails, as that of the hub without a network.
        lines.append(str(error).splitlines()[0])
    yield "seconds", time.monotonic() - started
    yield "lines", lines


# In the order of importance, each with the seconds it may take on a GPU.
PARTS: dict[str, tuple[Callable[[Bench, Container[str]], Found], int]] = {
    "machine": (machine, 60),
    "speed": (speed, 240),
    "profile": (profile, 60),
    "variants": (variants, 180),
    "jobs": (jobs, 240),
    "determinism": (determinism, 120),
    "doctor": (doctor, 60),
    "recipes": (recipes, 1800),
}

if __name__ == "__main__":
    main()
