"""One file of text: recipe own-text against nanoGPT's recipe for Shakespeare on a CPU.

    python benchmarks/own_text.py --nanogpt DIR --text FILE [--out FILE.json]

`DIR` is a checkout of nanoGPT; its command is the one of its README for a CPU. Both train on the
same text and are measured on the same held-out bytes, all of them: those that `prepare` holds out.
Four runs, one after the other: nanoGPT's; ours in its time (TRAIN_MAX_HOURS); ours to its end; and
nanoGPT's with as many steps as take that long. Seconds are of whole commands, with their start.
About ten minutes on two quiet cores.
"""

import argparse
import importlib.util
import json
import math
import os
import pickle  # noqa: TID251 (nanoGPT's format)
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.dataset import open_dataset
from app.data.tokenizer import Tokenizer
from app.hardware.device import select_device
from app.hardware.proc import cpu_model
from app.runs.checkpoints import latest_checkpoint
from app.runs.load import load_model

STEPS = 2000
# It measures, and saves, at multiples of this only.
EVERY = 250
# nanoGPT's README, "I only have a macbook"; `dataset` and `out_dir` are added.
NANOGPT = """
config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0
"""
SEQUENCES_AT_ONCE = 16


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--nanogpt", type=Path, required=True)
    arguments.add_argument("--text", type=Path, required=True)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options.nanogpt.resolve(), options.text.resolve(), Path(folder))
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def compare(nanogpt: Path, text: Path, work: Path) -> dict[str, Any]:
    """Prepare the text for both, train both in turns, and measure all models."""
    prepare_seconds, _ = timed(["-m", "app", "prepare", "--dataset", str(text)], work)
    dataset = open_dataset(next((work / "data").glob("*/manifest.json")).parent)
    tokens = [
        np.concatenate([shard[:] for shard in shards]) for shards in (dataset.val, dataset.train)
    ]
    held_out, train = (Tokenizer().decode(part[1:].tolist()) for part in tokens)
    assert held_out + train == text.read_text("utf-8"), "the text is not one document"
    characters = write_characters(nanogpt / "data" / "own_text", held_out, train)

    def run_nanogpt(steps: int) -> dict[str, Any]:
        out = work / f"nanogpt-{steps}"
        flags = f"{NANOGPT} --max_iters={steps} --lr_decay_iters={steps} --dataset=own_text"
        seconds, _ = timed(["train.py", *flags.split(), f"--out_dir={out}"], nanogpt)
        sums = nanogpt_loss(nanogpt, out / "ckpt.pt", characters)
        return measured("nanoGPT, its recipe for a CPU", seconds, steps, sums, held_out)

    def run_ours(name: str, *flags: str) -> dict[str, Any]:
        seconds, output = timed(["-m", "app", "train", "--run-name", name, *flags], work)
        checkpoint = latest_checkpoint(work / "data/runs" / name)
        model = load_model(checkpoint, select_device("cpu", "float32", "auto"))
        length = model.config.context_length
        sums = loss_of(model, tokens[0].astype(np.int64), length)
        sizes = next(re.finditer(r"^RECIPE=own-text.*: (.*)$", output, re.MULTILINE), None)
        done = measured("RECIPE=own-text", seconds, checkpoint.step, sums, held_out)
        return {**done, "sizes": sizes[1] if sizes else ""}

    runs = [run_nanogpt(STEPS)]
    runs.append(run_ours("short", "--max-hours", f"{runs[0]['seconds'] / 3600:.6f}"))
    runs.append(run_ours("whole"))
    ratio = runs[2]["seconds"] / runs[0]["seconds"]
    runs.append(run_nanogpt(max(1, round(STEPS * ratio / EVERY)) * EVERY))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{cpu_model()}, {os.cpu_count()} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "text": {
            "name": text.name,
            "bytes": text.stat().st_size,
            "held_out_bytes": len(held_out.encode()),
            "held_out_tokens": len(tokens[0]) - 1,
        },
        "prepare_seconds": round(prepare_seconds, 2),
        "runs": runs,
    }


def timed(command: Sequence[str], folder: Path) -> tuple[float, str]:
    """Run a Python command in a folder; return its seconds and its output."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s: {' '.join(command)}", file=sys.stderr, flush=True)
    return seconds, done.stdout


def write_characters(folder: Path, held_out: str, train: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Write nanoGPT's dataset of characters; return the held-out ones, after a line end.

    nanoGPT predicts no first character, and ours begins with a token that has no text.
    """
    characters = sorted({*held_out, *train})
    numbers = {character: number for number, character in enumerate(characters)}
    folder.mkdir(exist_ok=True)
    for name, text in (("val", held_out), ("train", train)):
        np.array([numbers[one] for one in text], np.uint16).tofile(folder / f"{name}.bin")
    meta = {
        "vocab_size": len(characters),
        "stoi": numbers,
        "itos": dict(enumerate(characters)),
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return np.array([numbers[one] for one in "\n" + held_out], np.int64)


def nanogpt_loss(nanogpt: Path, checkpoint: Path, characters: Any) -> float:
    """Return the loss of nanoGPT's best checkpoint, in nats over all characters."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The file was written a moment ago by this script's own child.
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)  # noqa: TID251
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    # It returns the logits of the last position only, unless it is given targets.
    return loss_of(lambda x: model(x, x)[0], characters, saved["model_args"]["block_size"])


@torch.no_grad()
def loss_of(model: Callable[[Tensor], Tensor], sequence: Any, length: int) -> float:
    """Return the loss over all of a sequence but its first token, in nats: the sum of windows.

    Args:
        model: idx, int64 [B, T] -> logits, [B, T, vocabulary].
        sequence: int64 [count].
        length: of a window; the last one may be shorter.
    """
    stream, total = torch.from_numpy(sequence), 0.0
    whole = (len(stream) - 1) // length * length
    windows = [
        *zip(
            stream[:whole].view(-1, length).split(SEQUENCES_AT_ONCE),
            stream[1 : whole + 1].view(-1, length).split(SEQUENCES_AT_ONCE),
            strict=True,
        ),
        (stream[None, whole:-1], stream[None, whole + 1 :]),
    ]
    for inputs, targets in windows:
        if targets.numel():
            logits = model(inputs).flatten(0, 1).float()
            total += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    return total


def measured(name: str, seconds: float, steps: int, nats: float, text: str) -> dict[str, Any]:
    bits = nats / math.log(2) / len(text.encode())
    return {
        "program": name,
        "seconds": round(seconds, 1),
        "steps": steps,
        "bits_per_byte": round(bits, 4),
    }


def table(result: dict[str, Any]) -> str:
    """Return the runs as a table."""
    text = result["text"]
    lines = [
        f"{text['name']}: {text['bytes']:,} bytes, measured on all {text['held_out_bytes']:,} that "
        f"are held out; prepare took {result['prepare_seconds']} s",
        "",
        "| | seconds | steps | bits per byte |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {run['program']} | {run['seconds']:.0f} | {run['steps']:,} | "
        f"**{run['bits_per_byte']:.3f}** |"
        for run in result["runs"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
