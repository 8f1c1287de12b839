"""Private memory (RssAnon) of drawing batches in random order from a shard of 100M tokens.

python benchmarks/memory.py [--out FILE.json]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.sequences import BatchPlan, SequenceOrder, num_sequences
from app.data.shards import ShardFile, open_shard
from app.train.dataloader import BatchLoader, TokenStream

SHARD_TOKENS = 100_000_000


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"batches": batches_growth(Path(folder))}
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def batches_growth(work: Path) -> dict[str, float]:
    """What drawing 200 batches of 32 x 1024 adds."""
    path = work / "batches.bin"
    with ShardFile(path, SHARD_TOKENS) as shard:
        shard.write(np.random.default_rng(0).integers(0, 50257, SHARD_TOKENS, dtype=np.uint16))
        shard.commit()
    stream = TokenStream([open_shard(path)])
    windows = num_sequences(len(stream), 1024)
    loader = BatchLoader(
        stream, SequenceOrder(windows, 0, True), BatchPlan(512, 1, 32), rank=0,
        sequences_consumed=0, context_length=1024, device=torch.device("cpu"),
    )  # fmt: skip
    before = rss_anon(os.getpid())
    peak, total = 0, 0
    with loader:
        for _ in range(200):
            inputs, _ = loader.next_batch()
            total += int(inputs[0, 0])
            peak = max(peak, rss_anon(os.getpid()) - before)
    return {"added_mb": peak / 1e6, "shard_tokens": SHARD_TOKENS, "batches": 200}


def family(pid: int) -> list[int]:
    """A process and everything it has started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [one for child in task.read_text().split() for one in family(int(child))]
        except OSError:
            continue
    return found


def rss_anon(pid: int) -> int:
    """Private bytes of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((one for one in status.splitlines() if one.startswith("RssAnon:")), "RssAnon: 0")
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
