"""`prepare` against the original `prepare.py`: tokens/s, where the time goes, private memory.

    python benchmarks/prepare.py --original DIR [--out FILE.json] [--work DIR]

Text: documents of about 3 kB from this machine's code, manuals and packages, a seventh of it prose.
A paragraph that was seen before is left out, and so are tables of numbers and minified code.

Speed: whole processes on the same local parquet, in turns, all of its tokens. The original runs
unchanged: it finds the parquet as the local repository `HuggingFaceFW/fineweb`. A run counts from
fork to exit, with what the kernel says of its CPU time; every shard is compared byte for byte.

Share outside the encoder, in three ways. By CPU: a run of the program in which each thread's CPU
time goes to the stage that it is in; what overlaps counts in full. By wall, without encoder: the
part of that run in which no thread was in the encoder; what overlaps does not count. By wall, more
than the encoder alone: a fresh process has the same batches in memory and times the encoder only,
one in each of as many threads, from empty caches; what the whole process takes longer is outside.

Memory: RssAnon of all processes, every 50 ms, by how much text has been read (from the bytes the
kernel has seen them read), over rounds of the same documents. Each round swaps other letters and
digits, so that most of its words have never been seen: an encoder's cache keeps growing if nothing
bounds it.
"""

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import awkward as ak
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FOLDERS = (
    "/usr/share", "/usr/lib", "/usr/include", "/usr/src", "~/.pyenv", "~/.rustup",
    "/opt/pypi/files", "/opt/pypi-more/files", sys.prefix,
)  # fmt: skip
PROSE = frozenset({".md", ".rst", ".txt", ".tex", ".html", ".gz"})
CODE = frozenset({
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".js",
    ".ts", ".pl", ".pm", ".rb", ".sh", ".f90",
})  # fmt: skip
ARCHIVES = frozenset({".whl", ".zip"})
PROSE_PART = 7
LARGEST_FILE = 3_000_000
MOST_OF_AN_ARCHIVE = 8_000_000
GROUP_DOCUMENTS = 1000
FILES = 4
NOT_TEXT = re.compile(r"<(script|style|head|nav)\b.*?</\1>", re.DOTALL)
BLOCK = re.compile(r"</?(?:p|div|li|ul|h[1-6]|pre|section|tr|summary|details|br)\b[^>]*>")
TAG = re.compile(r"<[^>]*>")
BLANKS = re.compile(r"[ \t]+")
PARAGRAPH = re.compile(r"\n\s*\n")
SWAPPED = b"bfgjkpqvwxyz", b"BFGJKPQVWXYZ", b"0123456789"
TABLE_STEP = 500_000_000


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--original", type=Path, required=True)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--work", type=Path, help="keeps the text for another time")
    arguments.add_argument("--megabytes", type=int, default=1000, help="of text, for the speed")
    arguments.add_argument("--memory-megabytes", type=int, default=5500)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--only", choices=("text", "speed", "memory"))
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = chosen.work or Path(temporary)
        corpus = work / f"text-{chosen.megabytes}"
        results: dict[str, Any] = {"text": text_of_this_machine(corpus, chosen.megabytes)}
        if chosen.only in (None, "speed"):
            results["speed"] = speed(
                corpus, chosen.original.resolve(), work, chosen.repeats, chosen.workers
            )
        if chosen.only in (None, "memory"):
            results["memory"] = memory(corpus, work, chosen.memory_megabytes, chosen.workers)
    print(json.dumps(results, indent=2))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n")


def text_of_this_machine(corpus: Path, megabytes: int) -> dict[str, Any]:
    """Write a hub-like folder of parquet files, or find it; says what it was made from."""
    record = corpus / "made-from.json"
    if record.exists():
        return json.loads(record.read_text())
    shutil.rmtree(corpus, ignore_errors=True)
    texts, made_from = gathered(megabytes * 1_000_000)
    # By hash: every file of the result has every topic.
    texts.sort(key=lambda text: hashlib.sha256(text).digest())
    folder = parquet_folder(corpus)
    folder.mkdir(parents=True)
    (corpus / "HuggingFaceFW" / "fineweb" / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n"
        "  - split: train\n    path: sample/10BT/*\n---\n"
    )
    share = -(-len(texts) // FILES)
    for number in range(FILES):
        write_parquet(
            folder / f"{number:03d}_00000.parquet", texts[number * share : (number + 1) * share]
        )
    size = sum(map(len, texts))
    words, distinct = count_words(texts)
    made = {
        "bytes": size,
        "documents": len(texts),
        "mean_document_bytes": round(size / len(texts)),
        "bytes_by_kind": dict(made_from.most_common()),
        "words": words,
        "distinct_words": distinct,
        "parquet_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
    record.write_text(json.dumps(made, indent=2) + "\n")
    return made


def parquet_folder(corpus: Path) -> Path:
    return corpus / "HuggingFaceFW" / "fineweb" / "sample" / "10BT"


def write_parquet(path: Path, texts: list[bytes]) -> None:
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="snappy") as writer:
        for at in range(0, len(texts), GROUP_DOCUMENTS):
            rows = pa.array(texts[at : at + GROUP_DOCUMENTS], pa.binary()).cast(pa.string())
            writer.write_table(pa.table({"text": rows}))


def gathered(wanted: int) -> tuple[list[bytes], Counter[str]]:
    """Documents in which no paragraph comes twice."""
    lengths = np.random.default_rng(0).lognormal(np.log(3000), 0.7, 1 << 20).astype(int).tolist()
    texts: list[bytes] = []
    prose = wanted // PROSE_PART
    room = {"code": wanted - prose, "prose": prose}
    made_from: Counter[str] = Counter()
    seen: set[int] = set()
    for file in files():
        from_here = 0
        for suffix, content in contents(file, room):
            kind = "code" if suffix in CODE else "prose"
            parts, length = [], 0
            paragraphs = new_paragraphs(content, seen)
            for paragraph in (*paragraphs, None):
                limit = lengths[len(texts) % len(lengths)]
                if parts and (paragraph is None or length + len(paragraph) > limit):
                    text = "\n\n".join(parts).encode("utf-8", "replace")[:LARGEST_FILE]
                    parts, length = [], 0
                    if len(text) >= 300:
                        texts.append(text)
                        made_from[f"{'archived ' if file.suffix in ARCHIVES else ''}{suffix}"] += (
                            len(text)
                        )
                        room[kind] -= len(text)
                        from_here += len(text)
                if paragraph is not None:
                    parts.append(paragraph)
                    length += len(paragraph) + 2
            if from_here > MOST_OF_AN_ARCHIVE:
                break
        if max(room.values()) <= 0:
            return texts, made_from
    sys.exit(
        f"this machine has only {sum(map(len, texts)):,} bytes of such text: {room} are missing"
    )


def files() -> Iterator[Path]:
    """All text files and archives, in an order that mixes topics."""
    found = {
        os.path.join(parent, name)  # noqa: PTH118 (there are hundreds of thousands)
        for folder in FOLDERS
        for parent, _, names in os.walk(Path(folder).expanduser())
        for name in names
        if os.path.splitext(name)[1].lower() in PROSE | CODE | ARCHIVES  # noqa: PTH122
    }
    for name in sorted(found, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        path = Path(name)
        if path.is_file() and not path.is_symlink():
            yield path


def contents(file: Path, room: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Suffix and text of a file, or of each text in an archive, of the kinds that have room."""

    def useful(suffix: str) -> bool:
        return room["code" if suffix in CODE else "prose"] > 0

    suffix = file.suffix.lower()
    try:
        if suffix in ARCHIVES:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    inside = Path(member.filename).suffix.lower()
                    is_text = inside in (PROSE | CODE) - {".gz"}
                    if is_text and useful(inside) and member.file_size < LARGEST_FILE:
                        yield inside, as_text(inside, archive.read(member))
        elif useful(suffix) and file.stat().st_size < LARGEST_FILE:
            content = file.read_bytes()
            if suffix == ".gz":
                content = gzip.decompress(content)
            yield suffix, as_text(suffix, content)
    except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return


def as_text(suffix: str, content: bytes) -> str:
    if b"\0" in content:
        return ""
    text = content.decode("utf-8", "replace")
    if suffix == ".html":
        text = html.unescape(TAG.sub("", BLOCK.sub("\n\n", NOT_TEXT.sub("", text))))
    return text


def new_paragraphs(text: str, seen: set[int]) -> Iterator[str]:
    for paragraph in PARAGRAPH.split(text):
        words = paragraph.split()
        letters = sum(map(len, words))
        if letters < 60 or letters > 14 * len(words) or letters > 20_000:
            continue
        if 4 * sum(map(paragraph.count, "0123456789")) > letters:
            continue
        key = hash(" ".join(words))
        if key not in seen:
            seen.add(key)
            yield BLANKS.sub(" ", paragraph)


def count_words(texts: Iterable[bytes]) -> tuple[int, int]:
    """Words, and distinct words as estimated from a sixteenth of them."""
    total, sample = 0, set()
    for text in texts:
        words = re.findall(rb"\w+", text)
        total += len(words)
        sample.update(word for word in set(words) if zlib.crc32(word) % 16 == 0)
    return total, 16 * len(sample)


def speed(corpus: Path, original: Path, work: Path, repeats: int, workers: int) -> dict[str, Any]:
    """Whole processes in turns, and the encoder alone."""
    from benchmarks.parity import digest, seed_tiktoken_cache

    theirs: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    alone: list[dict[str, float]] = []
    tiktoken_cache = work / "tiktoken"
    if not tiktoken_cache.exists():
        seed_tiktoken_cache(tiktoken_cache)
    stages: list[dict[str, float]] = []
    tokens, identical = 0, True
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            out = Path(temporary)
            theirs.append(
                timed(
                    [str(original / "prepare.py"), "--out_dir", str(out / "theirs")],
                    corpus,
                    TIKTOKEN_CACHE_DIR=str(tiktoken_cache),
                    HF_HUB_OFFLINE="1",
                    HF_DATASETS_OFFLINE="1",
                )
            )
            ours.append(timed(["-m", "app", "prepare"], ROOT, **settings(corpus, out, workers)))
            shards = [sorted((out / name).glob("*.bin")) for name in ("theirs", "ours")]
            identical &= len({tuple(map(digest, found)) for found in shards}) == 1
            tokens = sum(path.stat().st_size // 2 - 512 for path in shards[1])
            stages.append(
                in_fresh_process(prepare_with_clocks, **settings(corpus, out / "clocks", workers))
            )
        alone.append(in_fresh_process(encode_from_memory, parquet_folder(corpus), workers))
    return {
        "tokens": tokens,
        "identical": identical,
        "original": summary(theirs, tokens),
        "ours": summary(ours, tokens),
        "ratio": round(median(theirs, "seconds") / median(ours, "seconds"), 2),
        "encoder_alone": summary(alone, tokens),
        "share_outside_encoder": {
            "wall_more_than_encoder_alone": round(
                1 - median(alone, "seconds") / median(ours, "seconds"), 3
            ),
            **by_stage(stages),
        },
    }


def by_stage(runs: list[Any]) -> dict[str, Any]:
    """The run with the median sum of CPU seconds, stage by stage."""
    run = sorted(runs, key=lambda run: run["process"]["cpu_seconds"])[len(runs) // 2]
    total = run["process"]["cpu_seconds"]
    stages = run["cpu"] | {"Arrow's threads, interpreter, exit": 0.0}
    stages["Arrow's threads, interpreter, exit"] = total - sum(stages.values())
    return {
        "cpu_seconds": {stage: round(seconds, 2) for stage, seconds in stages.items()},
        "cpu_share_outside_encoder": round(1 - stages["encoder"] / total, 3),
        "wall_share_without_encoder": round(
            1 - run["in_encoder_seconds"] / run["process"]["seconds"], 3
        ),
    }


def settings(corpus: Path, out: Path, workers: int) -> dict[str, str]:
    return {
        "PREPARE_DATASET": str(parquet_folder(corpus)),
        "PREPARE_SHUFFLE_FILES": "false",
        "PREPARE_TOTAL_TOKENS": "all",
        "PREPARE_VAL_TOKENS": "0",
        "PREPARE_OUT_DIR": "ours",
        "PREPARE_WORKERS": str(workers),
        "DATA_DIR": str(out),
    }


def timed(arguments: list[str], folder: Path, **environment: str) -> dict[str, float]:
    """Seconds, and CPU seconds of a process and of what it waited for."""
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=os.environ | environment,
            stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            sys.exit(f"{arguments} failed ({process.returncode}):\n{printed.read()[-2000:]!r}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def in_fresh_process(job: Callable[..., None], *arguments: Any, **environment: str) -> Any:
    """What a function of a benchmark writes as JSON, with the CPU seconds of its process."""
    module = Path(job.__code__.co_filename).stem
    code = f"import sys, benchmarks.{module} as it; it.{job.__name__}(*sys.argv[1:])"
    with tempfile.NamedTemporaryFile() as result:
        used = timed(["-c", code, result.name, *map(str, arguments)], ROOT, **environment)
        return json.loads(Path(result.name).read_text()) | {"process": used}


def encode_from_memory(result: str, folder: str, workers: str) -> None:
    """Time the encoder, one for each thread, on batches that are in memory."""
    from gigatoken.gigatoken_rs import load_hf_json

    from app.data.tokenizer import tokenizer_json, vocabulary_files
    from app.prepare.documents import Position, batches
    from app.prepare.sources import open_documents
    from app.prepare.spec import TextSource
    from app.prepare.texts import text_bytes

    vocabulary = tokenizer_json(vocabulary_files() or ())
    encoders = [load_hf_json(vocabulary) for _ in range(int(workers))]
    strings = []
    for batch in batches(
        open_documents(TextSource(folder, shuffle_files=False)).chunks(Position(0, 0))
    ):
        ends, data = text_bytes(batch.texts().rows)
        characters = ak.contents.NumpyArray(data, parameters={"__array__": "char"})
        offsets = ak.index.Index64(ends)
        layout = ak.contents.ListOffsetArray(
            offsets, characters, parameters={"__array__": "string"}
        )
        strings.append(ak.Array(layout))
    waiting = iter(strings)

    def work(encoder: Any) -> None:
        for texts in waiting:
            encoder.encode_batch(texts, parallel=False)

    started, cpu_started = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(encoders)) as pool:
        list(pool.map(work, encoders))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    Path(result).write_text(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


def prepare_with_clocks(result: str) -> None:
    """Run `prepare`; each thread's CPU time goes to the innermost stage that it is in."""
    import app.data.shards as shards
    import app.prepare.encoder as encoder
    import app.prepare.local_files as text_files
    import app.prepare.pipeline as prepare
    import app.prepare.shard_writer as shard_writer
    from app.cli.process import run
    from app.prepare.documents import Batch

    spent: Counter[str] = Counter()
    lock, local = threading.Lock(), threading.local()

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*positional: Any, **named: Any) -> Any:
            outer = getattr(local, "inner", 0.0)
            local.inner, started = 0.0, time.thread_time()
            try:
                return function(*positional, **named)
            finally:
                whole = time.thread_time() - started
                with lock:
                    spent[stage] += whole - local.inner
                local.inner = outer + whole

        return measured

    encoding, since = 0, 0.0
    with_encoder = [0.0] * 64

    def count(change: int) -> None:
        """Wall time goes to the number of threads that were in the encoder until now."""
        nonlocal encoding, since
        with lock:
            now = time.perf_counter()
            with_encoder[encoding] += now - since
            encoding, since = encoding + change, now

    class ClockedEncoder:
        def __init__(self, inner: Any) -> None:
            self._encode = clocked("encoder", inner.encode_batch)

        def encode_batch(self, *positional: Any, **named: Any) -> Any:
            count(1)
            try:
                return self._encode(*positional, **named)
            finally:
                count(-1)

    def clock(owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, clocked(stage, getattr(owner, name)))

    def opened(*positional: Any, **named: Any) -> Any:
        spent["start"] = time.process_time()
        return open_documents(*positional, **named)

    load, open_documents = encoder.load_hf_json, prepare.open_documents
    encoder.load_hf_json = lambda vocabulary: ClockedEncoder(load(vocabulary))
    prepare.open_documents = opened
    clock(text_files.FileDocuments, "read_row_group", "read parquet")
    clock(text_files, "arrow_texts", "check and cast texts")
    clock(Batch, "texts", "join texts")
    clock(encoder.DocumentEncoder, "encode", "around the encoder")
    clock(shard_writer.ShardWriter, "run", "cut into shards")
    clock(shards.ShardFile, "write", "hash and write shards")
    clock(shards.ShardFile, "commit", "hash and write shards")
    since = time.perf_counter()
    try:
        sys.exit(run(["prepare"]))
    finally:
        in_encoder = sum(with_encoder[1:])
        Path(result).write_text(json.dumps({"cpu": spent, "in_encoder_seconds": in_encoder}))


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def summary(runs: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_second": round(tokens / median(runs, "seconds")),
        "median_seconds": round(median(runs, "seconds"), 2),
        "median_cpu_seconds": round(median(runs, "cpu_seconds"), 2),
        "seconds": [round(run["seconds"], 2) for run in runs],
    }


def memory(corpus: Path, work: Path, megabytes: int, workers: int) -> dict[str, Any]:
    """RssAnon over gigabytes whose words keep changing."""
    from benchmarks.memory import family, rss_anon

    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        made = rounds(corpus, folder / "rounds", megabytes * 1_000_000)
        source = parquet_folder(folder / "rounds")
        parquet_bytes = sum(path.stat().st_size for path in source.iterdir())
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "prepare"], cwd=ROOT, stdout=subprocess.DEVNULL,
            env=os.environ | settings(folder / "rounds", folder, workers),
        )  # fmt: skip
        started = time.perf_counter()
        samples: list[tuple[int, int]] = []
        before_text = None
        while process.poll() is None:
            processes = family(process.pid)
            anonymous, read = sum(map(rss_anon, processes)), sum(map(bytes_read, processes))
            if before_text is None and (folder / "ours").exists():
                before_text = read
            samples.append((max(0, read - (before_text or read)), anonymous))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        assert process.returncode == 0
        shards = list((folder / "ours").glob("*.bin"))
        tokens = sum(path.stat().st_size // 2 - 512 for path in shards)
    table: dict[int, int] = {}
    for read, anonymous in samples:
        text = min(read / parquet_bytes, 1) * made["bytes"]
        step = max(1, -int(-text // TABLE_STEP))
        table[step] = max(table.get(step, 0), anonymous)
    return {
        **made,
        "tokens": tokens,
        "shards": len(shards),
        "seconds": round(seconds, 1),
        "peak_mb": round(max(table.values()) / 1e6),
        "peak_mb_up_to_gb_of_text": {
            f"{step * TABLE_STEP / 1e9:.1f}": round(peak / 1e6)
            for step, peak in sorted(table.items())
        },
    }


def rounds(corpus: Path, target: Path, wanted: int) -> dict[str, Any]:
    """Write the corpus again and again, each time with other letters and digits swapped."""
    folder = parquet_folder(target)
    folder.mkdir(parents=True)
    size, number, words = 0, 0, set()
    first_round_words = 0
    generator = np.random.default_rng(0)
    while size < wanted:
        table = np.arange(256, dtype=np.uint8)
        if number:
            for letters in SWAPPED:
                table[list(letters)] = generator.permutation(list(letters))
        for path in sorted(parquet_folder(corpus).iterdir()):
            parquet = pq.ParquetFile(path)
            name = f"{number:03d}_{path.name}"
            with pq.ParquetWriter(folder / name, parquet.schema_arrow, compression="snappy") as out:
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group).column(0).combine_chunks()
                    _, offsets, data = rows.buffers()
                    swapped = data.to_pybytes().translate(table.tobytes())
                    size += len(swapped)
                    buffers = [None, offsets, pa.py_buffer(swapped)]
                    rows = pa.Array.from_buffers(pa.string(), len(rows), buffers)
                    out.write_table(pa.table({"text": rows}))
                    if group % 16 == 0:
                        words.update(re.findall(rb"\w+", swapped))
        number += 1
        first_round_words = first_round_words or len(words)
    return {
        "bytes": size,
        "rounds": number,
        "new_words_a_later_round": round(
            (len(words) / first_round_words - 1) / max(1, number - 1), 2
        ),
    }


def bytes_read(pid: int) -> int:
    """Bytes that a process has asked the kernel for; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except OSError:
        return 0


if __name__ == "__main__":
    main()
