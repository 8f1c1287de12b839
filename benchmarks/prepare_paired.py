"""`prepare` of two checkouts in turns: is it as fast as it was?

    python benchmarks/prepare_paired.py BEFORE AFTER [--jsonl FILE] [--repeats N] [--out FILE]

Whole processes on the same text: lines of JSON, compressed lines, parquet, one large text, and
100,000 small files. Both checkouts run with this interpreter and must write the same shards. A
ratio is BEFORE's time over AFTER's in one turn: above 1, AFTER is faster. FILE has a `text` in each
line; without it the text is Python's own library.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.parity import digest
from benchmarks.prepare import timed

MAX_TEXT_BYTES = 100_000_000
SMALL_FILES = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count(), "repeats": chosen.repeats}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for source in sources(work / "sources", texts(chosen.jsonl)):
            turns = []
            for _ in range(chosen.repeats):
                turns.append([run(place, source, work) for place in (chosen.before, chosen.after)])
                print(source.name, *(one["seconds"] for one in turns[-1]), file=sys.stderr)
            results[source.name] = {
                f"ratio_of_{unit}": round(
                    statistics.median(before[unit] / after[unit] for before, after in turns), 3
                )
                for unit in ("seconds", "cpu_seconds")
            } | {"seconds": [[round(one["seconds"], 2) for one in turn] for turn in turns]}
            assert len({one["shards"] for turn in turns for one in turn}) == 1, "shards differ"
    text = json.dumps(results, indent=2) + "\n"
    if chosen.out:
        chosen.out.write_text(text)
    print(text, end="")


def texts(lines: Path | None) -> list[str]:
    if lines is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [path.read_text("utf-8") for path in sorted(root.glob("[a-z]*/*.py"))]
        return (found * 20)[:20_000]
    with lines.open() as file:
        return [json.loads(line)["text"] for line in file.readlines(MAX_TEXT_BYTES)]


def sources(folder: Path, texts: list[str]) -> list[Path]:
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet", row_group_size=1000)
    (folder / "one.txt").write_text("\n\n".join(texts), "utf-8")
    for number in range(SMALL_FILES):
        path = folder / "small" / str(number % 100) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[number % len(texts)][:1000], "utf-8")
    return sorted(folder.iterdir())


def run(checkout: Path, source: Path, work: Path) -> dict[str, Any]:
    shutil.rmtree(work / "data", ignore_errors=True)
    settings = {
        "DATA_DIR": str(work / "data"),
        "PREPARE_DATASET": str(source),
        "PREPARE_TOTAL_TOKENS": "all",
        "PREPARE_VAL_TOKENS": "0",
        "PREPARE_OUT_DIR": "out",
    }
    used = timed(["-m", "app", "prepare"], checkout, **settings)
    return used | {"shards": tuple(map(digest, sorted((work / "data" / "out").glob("*.bin"))))}


if __name__ == "__main__":
    main()
