"""`prepare` on lines of JSON, and on the same text as parquet: whole processes, and its parts.

    python benchmarks/prepare_jsonl.py --jsonl FILE --original DIR [--out FILE.json] [--work DIR]

FILE has a `text` in each line; about 100 MB of prose are enough.

Speed: whole processes from fork to exit, the original `prepare.py` and ours with each number of
workers, in turns; every shard is compared. The original finds the text as the local repository
`HuggingFaceFW/fineweb`. Python keeps its bytecode in a folder of the benchmark, which a first turn
fills; in other turns it finds none and keeps none, as where PYTHONDONTWRITEBYTECODE is set.

Parts: CPU milliseconds a megabyte of the file, one stage after the other in one thread. Reading,
and hashing with writing, have one thread each, whatever the number of cores; the rest is done by
all. `under_lock` is the most of everything during which no other thread can run Python: all but the
calls that are known to release its lock (parsing, encoding, hashing, reading and writing files).
The projection for more cores is arithmetic: the least of what each of these limits and the sum of
all CPU time over the cores allow. It knows nothing of memory bandwidth and clock rates.

Of a busy machine the CPU seconds count only: two workers cannot have two cores there.
"""

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.parity import digest, seed_tiktoken_cache
from benchmarks.prepare import GROUP_DOCUMENTS, in_fresh_process, summary, timed

KINDS = ("jsonl", "parquet")
DATA = "HuggingFaceFW/fineweb/data"
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
COMPRESSED_BYTES = 20_000_000
CORES = (2, 4, 8, 16)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--jsonl", type=Path, required=True)
    arguments.add_argument("--original", type=Path, required=True)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as temporary:
        work = Path(temporary)
        corpora = {kind: corpus(chosen.jsonl, work, kind) for kind in KINDS}
        seed_tiktoken_cache(work / "tiktoken")
        results: dict[str, Any] = {"bytes": chosen.jsonl.stat().st_size}
        original = chosen.original.resolve() / "prepare.py"
        for kind, folder in corpora.items():
            results[kind] = speed(folder, original, work, chosen.repeats, chosen.workers)
        for kind, folder in corpora.items():
            found = [
                in_fresh_process(parts, folder / DATA, **python(work))
                for _ in range(chosen.repeats)
            ]
            results[f"parts_of_{kind}"] = projected(found, results["bytes"])
        results["decompressing_ms_per_mb"] = decompressing(chosen.jsonl, work)
        results["load_average_at_the_end"] = [round(load, 1) for load in os.getloadavg()]
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def corpus(lines: Path, work: Path, kind: str) -> Path:
    """Write the lines as a hub-like folder of one file."""
    folder = work / kind
    data = folder / DATA
    data.mkdir(parents=True)
    data.with_name("README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: data/*\n---\n"
    )
    if kind == "jsonl":
        (data / "text.jsonl").write_bytes(lines.read_bytes())
        return folder
    with lines.open("rb") as file:
        texts = pa.table({"text": [json.loads(line)["text"] for line in file]})
    pq.write_table(texts, data / "text.parquet", GROUP_DOCUMENTS, compression="snappy")
    return folder


def speed(
    folder: Path, original: Path, work: Path, repeats: int, workers: list[int]
) -> dict[str, Any]:
    """Whole processes in turns."""
    runs: dict[str, list[dict[str, float]]] = {}
    digests: set[tuple[str, ...]] = set()
    tokens = 0

    def turn(after: str = "") -> None:
        nonlocal tokens
        start = python(work, keeps=not after)
        hub = {
            "TIKTOKEN_CACHE_DIR": str(work / "tiktoken"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        with tempfile.TemporaryDirectory(dir=work) as out:
            theirs = [str(original), "--out_dir", f"{out}/original"]
            used = {f"original{after}": timed(theirs, folder, **hub, **start)}
            for count in workers:
                ours = settings(folder / DATA, Path(out), count)
                name = f"workers_{count}{after}"
                used[name] = timed(["-m", "app", "prepare"], ROOT, **ours, **start)
            for name, one in used.items():
                runs.setdefault(name, []).append(one)
            for shards in Path(out).iterdir():
                found = sorted(shards.glob("*.bin"))
                digests.add(tuple(map(digest, found)))
                tokens = sum(path.stat().st_size // 2 - 512 for path in found)

    turn()
    runs.clear()
    for after in [""] * repeats + ["_without_bytecode"] * repeats:
        turn(after)
    ratios = {
        name: round(
            statistics.median(
                theirs["seconds"] / ours["seconds"]
                for theirs, ours in zip(runs[f"original{without}"], runs[name], strict=True)
            ),
            2,
        )
        for without in ("", "_without_bytecode")
        for name in (f"workers_{count}{without}" for count in workers)
    }
    return {
        "tokens": tokens,
        "identical": len(digests) == 1,
        **{name: summary(found, tokens) for name, found in runs.items()},
        "times_the_originals_rate": ratios,
    }


def python(work: Path, *, keeps: bool = True) -> dict[str, str]:
    """With bytecode that it keeps below `work`, or without any."""
    return {
        "PYTHONPYCACHEPREFIX": str(work / ("bytecode" if keeps else "no-bytecode")),
        "PYTHONDONTWRITEBYTECODE": "" if keeps else "1",
    }


def settings(source: Path, out: Path, workers: int) -> dict[str, str]:
    return {
        "PREPARE_DATASET": str(source),
        "PREPARE_TOTAL_TOKENS": "all",
        "PREPARE_VAL_TOKENS": "0",
        "PREPARE_OUT_DIR": f"workers_{workers}",
        "PREPARE_WORKERS": str(workers),
        "DATA_DIR": str(out),
    }


def parts(result: str, source: str) -> None:
    """Do what `prepare` does, one stage after the other, and write each one's CPU seconds."""
    spent: Counter[str] = Counter()
    inner = 0.0

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*positional: Any, **named: Any) -> Any:
            nonlocal inner
            outer, inner, started = inner, 0.0, time.process_time()
            try:
                return function(*positional, **named)
            finally:
                whole = time.process_time() - started
                spent[stage] += whole - inner
                inner = outer + whole

        return measured

    import pyarrow.json

    import app.prepare.encoder as encoder
    import app.prepare.local_files as text_files
    from app.prepare.documents import Position, batches
    from app.prepare.sources import open_documents
    from app.prepare.spec import TextSource

    class ClockedEncoder:
        def __init__(self, inner: Any) -> None:
            self.encode_batch = clocked("encoder", inner.encode_batch)

    # One stage after the other, so that a stage has all of the process's CPU time.
    text_files.prefetch = lambda work, items, **_: map(clocked("unpack", work), items)
    load = clocked("load an encoder", encoder.load_hf_json)
    encoder.load_hf_json = lambda vocabulary: ClockedEncoder(load(vocabulary))
    pyarrow.json.read_json = clocked("parser", pyarrow.json.read_json)
    documents = open_documents(TextSource(source))
    encode = clocked("around the encoder", encoder.DocumentEncoder().encode)
    found = iter(batches(documents.chunks(Position(0, 0))))
    read = clocked("read and cut", lambda: next(found, None))
    sha256 = hashlib.sha256()
    hash_ = clocked("hash and write", sha256.update)
    with tempfile.TemporaryFile(dir=Path(result).parent, buffering=0) as shard:
        write = clocked("hash and write", shard.write)
        while batch := read():
            tokens, _lengths = encode(clocked("check and join texts", batch.texts)().rows)
            hash_(tokens)
            write(tokens)
    Path(result).write_text(json.dumps(spent))


def projected(found: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """Milliseconds a megabyte, what once, and by arithmetic MB/s with more cores."""
    stages = [stage for stage in found[0] if stage != "process"]
    seconds = {stage: statistics.median(one[stage] for one in found) for stage in stages}
    once = seconds.pop("load an encoder")
    each = {stage: one * 1e9 / size for stage, one in seconds.items()}
    lock_free = ("encoder", "parser", "unpack", "hash and write")
    limits = {
        "read and cut": each["read and cut"],
        "hash and write": each["hash and write"],
        "under_lock": sum(each.values()) - sum(each.get(stage, 0.0) for stage in lock_free),
    }
    if "unpack" in each:
        from app.prepare.local_files import FileDocuments

        limits["unpack"] = each["unpack"] / FileDocuments.row_groups_ahead
    total = sum(each.values())
    return {
        "ms_per_mb": {stage: round(one, 3) for stage, one in each.items()},
        "load_an_encoder_seconds": round(once, 3),
        "serial_share": round((each["read and cut"] + each["hash and write"]) / total, 3),
        "limits_ms_per_mb": {stage: round(one, 3) for stage, one in limits.items()},
        "mb_per_second_by_arithmetic": {
            cores: round(1000 / max(total / cores, *limits.values())) for cores in CORES
        },
    }


def decompressing(lines: Path, work: Path) -> dict[str, float]:
    """Milliseconds of CPU that a megabyte of lines takes to be read, and cut, by compression."""
    from app.prepare.documents import Position
    from app.prepare.sources import open_documents
    from app.prepare.spec import TextSource

    with lines.open("rb") as file:
        content = file.read(COMPRESSED_BYTES) + file.readline()

    def chunks(path: Path) -> Iterator[Any]:
        return open_documents(TextSource(str(path))).chunks(Position(0, 0))

    each = {}
    for suffix, compress in {"": bytes, **COMPRESS}.items():
        path = work / f"text.jsonl{suffix}"
        path.write_bytes(compress(content))
        started = time.thread_time()
        for _chunk in chunks(path):
            pass
        each[suffix or "none"] = round((time.thread_time() - started) * 1e9 / len(content), 2)
        path.unlink()
    return each


if __name__ == "__main__":
    main()
