"""`prepare` by tasks against `prepare` on this machine: tokens/s of whole processes.

    .venv-cluster/bin/python benchmarks/cluster.py [--out FILE.json] [--work DIR]

Text: that of benchmarks/prepare.py, several times over, so that a start of some seconds is as small
a part as it is of a real job. Processes in turns, as many workers for each; a run counts from fork
to exit. Every split's tokens are compared. CPU seconds are those of a process and of what it waited
for: Ray's workers are not among them.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.dataset import open_dataset
from benchmarks.prepare import parquet_folder, text_of_this_machine, timed

PATHS = {
    "prepare": ["app", "prepare"],
    "local": ["app.cluster", "prepare", "--executor", "local"],
    "ray": ["app.cluster", "prepare", "--executor", "ray"],
}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--work", type=Path, help="keeps the text for another time")
    arguments.add_argument("--megabytes", type=int, default=400, help="of different text")
    arguments.add_argument("--copies", type=int, default=30, help="of that text, one after another")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=os.cpu_count())
    chosen = arguments.parse_args()
    if chosen.work:
        chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.work) as temporary:
        corpus = (chosen.work or Path(temporary)) / f"text-{chosen.megabytes}"
        made = text_of_this_machine(corpus, chosen.megabytes)
        text = Path(temporary) / "text"
        text.mkdir()
        for copy in range(chosen.copies):
            for file in sorted(parquet_folder(corpus).iterdir()):
                (text / f"{copy:03d}-{file.name}").hardlink_to(file)
        runs = compared(text, Path(temporary), chosen.repeats, chosen.workers)
    results = {
        "text_bytes": made["bytes"] * chosen.copies,
        "workers": chosen.workers,
        **runs,
    }
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def compared(text: Path, work: Path, repeats: int, workers: int) -> dict[str, Any]:
    """All paths in turns."""
    settings = {
        "PREPARE_DATASET": str(text),
        "PREPARE_SHUFFLE_FILES": "false",
        "PREPARE_TOTAL_TOKENS": "all",
        "PREPARE_VAL_TOKENS": "1048576",
        "PREPARE_WORKERS": str(workers),
        "DATA_DIR": str(work),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PATHS}
    tokens, identical = 0, True
    for _ in range(repeats):
        for name, words in PATHS.items():
            run = timed(["-m", *words], ROOT, **settings, PREPARE_OUT_DIR=name)
            print(f"{name}: {run}", file=sys.stderr, flush=True)
            found[name].append(run)
            if name != "prepare":
                identical &= same_tokens(work / "prepare", work / name)
                shutil.rmtree(work / name)
        tokens = sum(shard.size for shard in open_dataset(work / "prepare").train)
        shutil.rmtree(work / "prepare")
    medians = {
        name: statistics.median(run["seconds"] for run in runs) for name, runs in found.items()
    }
    return {
        "tokens": tokens,
        "identical": identical,
        "million_tokens_per_second": {
            name: round(tokens / seconds / 1e6, 1) for name, seconds in medians.items()
        },
        "times_prepare": {
            name: round(medians["prepare"] / seconds, 3) for name, seconds in medians.items()
        },
        "seconds": {
            name: [round(run["seconds"], 1) for run in runs] for name, runs in found.items()
        },
        "cpu_seconds": {
            name: [round(run["cpu_seconds"], 1) for run in found[name]]
            for name in ("prepare", "local")
        },
    }


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two datasets hold the same tokens, split by split, wherever their shards end."""
    datasets = open_dataset(one), open_dataset(other)
    return all(
        len({digest(shards) for shards in splits}) == 1
        for splits in ([data.train for data in datasets], [data.val for data in datasets])
    )


def digest(shards: Iterable[Any]) -> str:
    """SHA-256 of the tokens of all shards, one after the other."""
    found = hashlib.sha256()
    for shard in shards:
        found.update(shard.data)
    return found.hexdigest()


if __name__ == "__main__":
    main()
