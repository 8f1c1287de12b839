"""Private memory (RssAnon, summed over processes) of preparing and of drawing batches.

    python benchmarks/memory.py [--out FILE.json]

`prepare` reads parquet of generated text that fills more than one shard of 100M tokens. Batches
are drawn from a shard of 100M tokens, in random order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.batches import Position  # noqa: E402
from app.data.documents import open_documents  # noqa: E402
from app.data.loader import BatchLoader, TokenStream  # noqa: E402
from app.data.shards import ShardFile, open_shard  # noqa: E402
from app.data.windows import StepPlan, WindowOrder, count_windows  # noqa: E402

SHARD_TOKENS = 100_000_000


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "prepare": prepare_peak(Path(folder)),
            "batches": batches_growth(Path(folder)),
        }
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def prepare_peak(work: Path) -> dict[str, float]:
    """Peak while `prepare` writes a full shard of 100M tokens and begins a second."""
    source = work / "text.parquet"
    texts = [
        text
        for piece in open_documents("stdlib").pieces(Position(0, 0))
        for text in piece.texts.to_pylist()
        if text
    ]
    pieces = [text[at : at + 3000] for text in texts for at in range(0, len(text), 3000)]
    shuffled = np.random.default_rng(0)
    with pq.ParquetWriter(source, pa.schema({"text": pa.string()})) as writer:
        for _ in range(25):
            shuffled.shuffle(pieces)
            for at in range(0, len(pieces), 1000):
                writer.write_table(pa.table({"text": pieces[at : at + 1000]}))
    wanted = SHARD_TOKENS + 10_000_000
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "prepare", "--dataset", str(source), "--val-tokens", "0",
         "--total-tokens", str(wanted), "--shard-size", str(SHARD_TOKENS), "--out-dir", "out",
         "--data-dir", str(work)],
        cwd=ROOT,
    )  # fmt: skip
    peak = 0
    started = time.perf_counter()
    while process.poll() is None:
        peak = max(peak, sum(rss_anon(one) for one in family(process.pid)))
        time.sleep(0.05)
    assert process.returncode == 0
    seconds = time.perf_counter() - started
    return {"peak_mb": peak / 1e6, "tokens": wanted, "seconds": round(seconds, 1)}


def batches_growth(work: Path) -> dict[str, float]:
    """What drawing 200 batches of 32 x 1024 adds."""
    path = work / "batches.bin"
    with ShardFile(path, SHARD_TOKENS) as shard:
        shard.write(np.random.default_rng(0).integers(0, 50257, SHARD_TOKENS, dtype=np.uint16))
        shard.commit()
    stream = TokenStream([open_shard(path)])
    windows = count_windows(len(stream), 1024)
    loader = BatchLoader(
        stream, WindowOrder(windows, 0, True), StepPlan(512, 1, 32), rank=0, first_position=0,
        context_length=1024, device=torch.device("cpu"),
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
