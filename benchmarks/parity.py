"""The original scripts against this program: same shard bytes, same model, same losses.

    python benchmarks/parity.py --original DIR [--out FILE.json]

DIR holds the original's prepare.py, train.py, model/ and data/. They are run as they are, but for
the settings that are written into them and the header offset of the loader, which is wrong there.
"""

import argparse
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.tokenizer import VOCABULARY, vocabulary_files
from app.model.gpt import GPT, GPTConfig
from app.prepare.documents import Position
from app.prepare.sources import open_documents
from app.prepare.spec import TextSource

VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SHARD_CASES = {
    "last shard partial": ("--total_tokens", "400000", "--shard_size", "150000"),
    "documents larger than a shard": ("--total_tokens", "30000", "--shard_size", "500"),
    "limit inside a document, one shard": ("--total_tokens", "123457", "--shard_size", "1000000"),
    "everything, shards of a prime size": ("--shard_size", "99991"),
}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--original", type=Path, required=True)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "torch": torch.__version__,
            "shards": compare_shards(chosen.original.resolve(), Path(folder)),
            "model_124M": compare_models(chosen.original.resolve()),
            "losses_50_steps": compare_losses(chosen.original.resolve(), Path(folder)),
        }
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def compare_shards(original: Path, work: Path) -> dict[str, Any]:
    """Prepare the same hub-like folder with both, and compare every shard byte for byte."""
    texts = [
        text
        for piece in open_documents(TextSource("stdlib")).chunks(Position(0, 0))
        for text in piece.texts().rows.to_pylist()
        if text
    ]
    texts = [text[:200_000] for text in texts[:150]]
    hub = work / "HuggingFaceFW" / "fineweb"
    parquet = hub / "sample" / "10BT" / "000_00000.parquet"
    parquet.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), parquet, row_group_size=40)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: sample/10BT/*\n---\n"
    )
    seed_tiktoken_cache(work / "tiktoken")
    results = {}
    for number, (case, flags) in enumerate(SHARD_CASES.items()):
        theirs, ours = work / f"theirs{number}", work / f"ours{number}"
        run([str(original / "prepare.py"), *flags, "--out_dir", str(theirs)], work)
        if "--total_tokens" not in flags:
            flags = (*flags, "--total_tokens", "all")
        run(
            ["-m", "app", "prepare", *flags, "--dataset", str(hub), "--dataset-config",
             "sample-10BT", "--val-tokens", "0", "--out-dir", str(ours)],
            work,
        )  # fmt: skip
        mine = {path.name: digest(path) for path in sorted(ours.glob("*.bin"))}
        results[case] = {
            "shards": len(mine),
            "identical": mine == {path.name: digest(path) for path in sorted(theirs.iterdir())},
        }
    return results


def compare_models(original: Path) -> dict[str, float]:
    """Largest differences at 124M in float32, relative to the largest value."""
    theirs_class = runpy.run_path(str(original / "model" / "gpt.py"))
    torch.manual_seed(0)
    ours = GPT(GPTConfig())
    theirs = theirs_class["GPT"](theirs_class["GPTConfig"]())
    weights = ours.state_dict()
    theirs.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    tokens = torch.randint(0, 50257, (2, 513))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    logits, their_loss = theirs(inputs, targets, return_logits=True)
    our_loss = ours(inputs, targets)
    our_loss.backward()
    their_loss.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    gradients["transformer.wte.weight"] = theirs.lm_head.weight.grad
    return {
        "logits": relative(ours(inputs), logits),
        "loss": abs(our_loss.item() - their_loss.item()),
        "gradients": max(
            relative(weight.grad, gradients[name]) for name, weight in ours.named_parameters()
        ),
    }


def compare_losses(original: Path, work: Path) -> dict[str, Any]:
    """Train both for 50 steps from the same weights on the same shard."""
    data, steps, length, batch = work / "data", 50, 64, 4
    run(
        ["-m", "app", "prepare", "--dataset", "stdlib", "--total-tokens", "60000",
         "--val-tokens", "0", "--out-dir", "tokens", "--data-dir", str(data)],
        work,
    )  # fmt: skip
    config = GPTConfig(length, 50257, 3, 48, 4)
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    start = work / "start.safetensors"
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}, start)
    shards = work / "only_shards"
    shards.mkdir()
    (shards / "tokens.bin").symlink_to(data / "tokens" / "stdlib_000000.bin")

    copy = work / "original"
    for name in ("model/__init__.py", "model/gpt.py", "data/__init__.py", "data/dataloader.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        text = (original / name).read_text()
        (copy / name).write_text(text.replace("offset_bytes=256", "offset_bytes=1024"))
    script = (original / "train.py").read_text()
    for pattern, value in {
        r"total_batch_size = \d+": f"total_batch_size = {2 * batch * length}",
        r"\nbatch_size = \d+": f"\nbatch_size = {batch}",
        r"sequence_length = \d+": f"sequence_length = {length}",
        r"max_steps = \d+": f"max_steps = {steps}",
        r'data_root = ".*"': f"data_root = {str(shards)!r}",
        r"GPTConfig\(.*\)": f"GPTConfig({length}, 50257, 3, 48, 4)",
        r"\nmodel\.to\(device\)": "\nfrom safetensors.torch import load_file"
        f"\nmodel.load_state_dict(load_file({str(start)!r}))",
        r"loss_accum\.item\(\):\.4f": "loss_accum.item():.9f",
    }.items():
        script, count = re.subn(pattern, lambda _, value=value: value, script)
        assert count >= 1, f"the original's {pattern} is not where it was"
    (copy / "train.py").write_text(script)
    printed = run(["train.py"], copy)
    theirs = [float(loss) for loss in re.findall(r"train_loss:([\d.]+)", printed)]

    run(
        ["-m", "app", "train", "--recipe", "original", "--dataset-dir", "tokens", "--run-name",
         "ours", "--data-dir", str(data), "--device", "cpu", "--max-steps", str(steps),
         "--tokens-per-step", str(2 * batch * length), "--micro-batch-size", str(batch),
         "--context-length", str(length), "--num-layers", "3", "--embd-size", "48",
         "--num-heads", "4", "--sample-every", "0", "--precision", "float32"],
        work,
    )  # fmt: skip
    lines = (data / "runs" / "ours" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["train_loss"] for line in lines]
    assert len(ours) == len(theirs) == steps
    return {
        "original": theirs,
        "ours": ours,
        "largest_difference": float(np.abs(np.subtract(ours, theirs)).max()),
    }


def run(arguments: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT) if arguments[0] == "-m" else str(folder),
        "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    # Leaving a parquet stream early aborts the original at exit, after its shards are written.
    if done.returncode not in (0, -6):
        sys.exit(f"{arguments} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.stdout


def seed_tiktoken_cache(folder: Path) -> None:
    folder.mkdir()
    for name, file in zip(VOCABULARY, vocabulary_files() or (), strict=True):
        key = hashlib.sha1((VOCABULARY_URL + name).encode()).hexdigest()
        (folder / key).write_bytes(file.read_bytes())


def relative(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
