"""Break the product in a named way, and see which tests go red.

    python benchmarks/mutations.py [--out FILE.json]

Works on a copy of the checkout. Each line of the result is a fault and the tests that saw it.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/data/test_shards.py", "tests/train/test_dataloader.py", "tests/model",
         "tests/train/test_loop.py", "tests/train/test_trainer.py",
         "tests/runs/test_checkpoint.py"]  # fmt: skip

# What breaks: file, what stands there, what is put in its place.
FAULTS = {
    "header offset": (
        "app/data/shards.py",
        "_open_files()(self), HEADER_BYTES + 2 * begin, 0",
        "_open_files()(self), 256 + 2 * begin, 0",
    ),
    "target shift": ("app/data/token_stream.py", "tokens[:, 1:]", "tokens[:, :-1]"),
    "attention scale": (
        "app/model/gpt.py",
        "self.output_scale = 1 / math.sqrt(2 * config.num_layers)",
        "self.output_scale = 1.0",
    ),
    "mean over micro-batches": (
        "app/train/loop.py",
        "loss = parallel.loss(inputs, targets) / accumulation_steps",
        "loss = parallel.loss(inputs, targets)",
    ),
    "damaged checkpoints": (
        "app/runs/checkpoint.py",
        "if sha256 != self.state.sha256[file]:",
        "if not sha256:",
    ),
    "weight tying": (
        "app/model/gpt.py",
        "        return self.transformer.wte.weight\n",
        "        return self.transformer.wte.weight.detach()\n",
    ),
}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    results = {}
    for fault, (file, right, wrong) in FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for name in ("app", "tests", "pyproject.toml", ".env.example"):
                place = ROOT / name
                (shutil.copytree if place.is_dir() else shutil.copy)(place, copy / name)
            text = (copy / file).read_text()
            assert text.count(right) == 1, f"{file} no longer has: {right}"
            (copy / file).write_text(text.replace(right, wrong))
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
                cwd=copy, capture_output=True, text=True, check=False,
            )  # fmt: skip
        results[fault] = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        print(f"{fault}: {len(results[fault])} tests red", flush=True)
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
