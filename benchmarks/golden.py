"""Two checkouts of the program against each other: the same commands must write the same files.

    python benchmarks/golden.py BEFORE AFTER [--only NAME ...] [--work DIR]

Both run every case below, side by side, with this interpreter, on the CPU with one thread. Exit
codes and files must be equal, byte for byte; of a file that holds times, folders or the revision,
the rest must be. Messages on the console may differ, and are shown. About three minutes on two
cores. `--only` takes names of cases, or `prepare`, `train` and `tools` for all of a kind.
"""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

# All that may differ between two files: values of JSON and of TensorBoard's points that are times,
# speeds or memory, the revision, and a hash over what is masked. A case's folder has one name.
MASKED_KEYS = {
    *("step_ms", "data_ms", "setup_ms", "val_ms", "sample_ms", "save_ms", "time"),
    *("tokens_per_second", "mfu", "memory_bytes", "git_revision", "sha256_of_the_rest"),
    *("source", "source_hashes", "code_hashes"),
}
MASKED_FILES = {"settings.json", "state.json", "metrics.jsonl", "evaluations.jsonl"}
MASKED_ROWS = re.compile(rf"^({'|'.join(MASKED_KEYS)})\|.*\n?", re.MULTILINE)  # TensorBoard's
MASKED_NUMBERS = re.compile(
    r"[\d.,]+(?= ?(ms|s|[KMG]i?B|minutes|tokens/s)\b)|(?<=token/s:)\S+|(?<=tokens/sec: )\S+"
    r"|(?<=continues after )[\d,]+"
)
# Of doctor only the names of checks and of keys are compared.
DOCTOR, CODES, CONSOLE = "doctor.json", "codes.txt", "console.txt"
NOT_COMPARED = {"cache", CONSOLE}

# In float32, since each start measures for itself whether bf16 is faster.
SETTINGS = """
RECIPE=demo OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
PREPARE_TOTAL_TOKENS=60000 PREPARE_VAL_TOKENS=2000 PREPARE_SHARD_SIZE=4000 PREPARE_WORKERS=2
MODEL_CONTEXT_LENGTH=32 MODEL_NUM_LAYERS=2 MODEL_EMBD_SIZE=32 MODEL_NUM_HEADS=2
TRAIN_TOKENS_PER_STEP=256 TRAIN_MICRO_BATCH_SIZE=2 TRAIN_MAX_STEPS=10 TRAIN_WARMUP_STEPS=2
TRAIN_OPTIMIZER=adamw TRAIN_DEVICE=cpu TRAIN_PRECISION=float32 TRAIN_COMPILE=false
TRAIN_VAL_EVERY=4 TRAIN_VAL_TOKENS=640 TRAIN_SAMPLE_EVERY=3 TRAIN_CHECKPOINT_EVERY=2
SAMPLE_MAX_TOKENS=12
"""
COMPILED = "TRAIN_COMPILE=true TRAIN_PRECISION=bf16 TRAIN_OPTIMIZER=muon"
PAIR = "TRAIN_PROCESSES=2"
SHARDED = f"{PAIR} TRAIN_SHARD_OPTIMIZER=true TRAIN_OPTIMIZER=muon"
TOOLS = """
sample
evaluate
evaluate --split train --tokens 1000
export
export --dtype bfloat16 --out-dir rounded
inspect runs/demo --verify
inspect demo --verify
inspect demo/stdlib_000000.bin
report
doctor --json
"""


@dataclass(frozen=True)
class Case:
    """Commands that are run one after the other in a folder of their own, which is DATA_DIR.

    Attributes:
        kind: the command, if there is no other
        changes: of SETTINGS
        stops: where the command gets SIGTERM, to be given again: at a printed line that begins so,
            or before a file that ends so gets its name; CASE.1 is the folder after the first stop
        begins_with: the folder of BEFORE that both begin with a copy of
        same_as: the case whose files, as BEFORE has written them, these must be
        commands: what follows `python -m app`, a line each
    """

    kind: str
    changes: str = ""
    stops: tuple[str, ...] = ()
    begins_with: str = ""
    same_as: str = ""
    commands: str = ""


CASES = {
    "library": Case("prepare"),
    "files": Case("prepare", "PREPARE_DATASET=~/texts PREPARE_TOTAL_TOKENS=all"),
    "stopped": Case("prepare", stops=("lib_000002.bin",), same_as="library"),
    "taken-over": Case("prepare", begins_with="stopped.1", same_as="library"),
    # So little that a run has more than one epoch.
    "data": Case("prepare", "PREPARE_TOTAL_TOKENS=2000 PREPARE_SHARD_SIZE=700"),
    "whole": Case("train", begins_with="data"),
    # The first stop leaves a sample undone, the second one a measurement.
    "cut": Case("train", stops=("step:2/", "step:3/"), begins_with="data", same_as="whole"),
    "handed-over": Case("train", begins_with="cut.2", same_as="whole"),
    "compiled": Case("train", COMPILED, begins_with="data"),
    "pair": Case("train", PAIR, begins_with="data"),
    "pair-cut": Case("train", PAIR, stops=("step:4/",), begins_with="data", same_as="pair"),
    "sharded": Case("train", SHARDED, stops=("step:4/",), begins_with="data"),
    "tools": Case("tools", begins_with="whole", commands=TOOLS),
}

HOOK = """\
# Sends SIGTERM at GOLDEN_STOP_AT, so that both checkouts are stopped at the same place.
import os, signal, sys, time

stop_at, write = os.environ.get("GOLDEN_STOP_AT"), sys.stdout.write

def stop_if(is_there):
    if is_there:
        time.sleep(0.5)  # other threads come as far as they can
        os.kill(os.getppid() if "RANK" in os.environ else os.getpid(), signal.SIGTERM)
        time.sleep(1)  # a launcher passes it on

def write_and_stop(text):
    count = write(text)
    stop_if(text.startswith(stop_at))
    return count

if stop_at:
    sys.stdout.write = write_and_stop
    sys.addaudithook(lambda event, arguments: stop_if(
        event == "os.rename" and str(arguments[1]).endswith(stop_at)))
"""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("before", type=Path)
    arguments.add_argument("after", type=Path)
    known = {*CASES, *(case.kind for case in CASES.values())}
    arguments.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME")
    arguments.add_argument("--work", type=Path, help="a new folder for what they write; it stays")
    chosen = arguments.parse_args()
    names = selected(set(chosen.only))
    with tempfile.TemporaryDirectory() as temporary:
        work = (chosen.work or Path(temporary) / "work").resolve()
        work.mkdir()
        (work / "sitecustomize.py").write_text(HOOK)
        write_texts(work / "texts")
        checkouts = chosen.before.resolve(), chosen.after.resolve()
        for name in names:
            started = time.monotonic()
            folders = work / "before" / name, work / "after" / name
            with ThreadPoolExecutor(2) as sides:
                list(sides.map(run, (name, name), checkouts, folders))
            seconds = time.monotonic() - started
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        are_equal = show_files(names, work)
        show_messages(names, work)
    sys.exit(0 if are_equal else 1)


def selected(only: set[str]) -> list[str]:
    """Return the cases that are asked for, and those that they need, in their order."""
    chosen: set[str] = set()
    for name, case in reversed(CASES.items()):
        if {name, case.kind} & only or name in chosen:
            chosen |= {name, case.begins_with.partition(".")[0], case.same_as}
    return [name for name in CASES if name in chosen]


def write_texts(folder: Path) -> None:
    """Write text of every kind; some is empty, and one file is not UTF-8."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "3", "mats", "in", "Spain:", "é", "😀", "\n"]
    texts = ["", "\n"] + [" ".join(draw.choices(words, k=draw.randrange(900))) for _ in range(80)]
    for number in range(3):
        rows = pa.table({"text": [*texts[number::7], None]})
        pq.write_table(rows, folder / f"{number}.parquet", row_group_size=4)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[3::7])
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines[:-1].encode(), mtime=0))
    (folder / "long.txt").write_text("\n".join(texts[4:20]))
    (folder / "wide.txt").write_text(texts[5], encoding="utf-16")


def run(name: str, checkout: Path, folder: Path) -> None:
    """Run a case's commands, and keep the folder after each stop beside it."""
    case, work = CASES[name], folder.parents[1]
    unlike = shutil.ignore_patterns(*NOT_COMPARED, CODES)
    if case.begins_with:
        shutil.copytree(work / "before" / case.begins_with, folder, ignore=unlike)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(one.split("=") for one in f"{SETTINGS} {case.changes}".split())
    settings |= {
        "DATA_DIR": str(folder),
        "PATH": os.environ["PATH"],
        "HOME": str(work),
        "PYTHONPATH": str(work),
        "PYTHONPYCACHEPREFIX": str(work / "bytecode"),  # nothing is written to a checkout
    }
    commands = case.commands.split("\n")[1:-1] or [case.kind] * (len(case.stops) + 1)
    if find_spec("vl_convert") is None and "report" in commands:
        commands.remove("report")
    for number, command in enumerate(commands):
        stop_at = case.stops[number] if number < len(case.stops) else ""
        done = subprocess.run(
            [sys.executable, "-m", "app", *command.split()],
            cwd=checkout, env={**settings, "GOLDEN_STOP_AT": stop_at},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        if folder.parent.name == "before" and done.returncode != (143 if stop_at else 0):
            sys.exit(f"{name}: {command} of BEFORE ended with {done.returncode}:\n{done.stderr}")
        printed = done.stdout + done.stderr
        if command == "sample":
            (folder / "sample.txt").write_text(done.stdout.partition("\n")[2])
        elif command == "doctor --json":
            (folder / DOCTOR).write_text(done.stdout or "{}")
            printed = done.stderr
        with (folder / CODES).open("a") as codes, (folder / CONSOLE).open("a") as console:
            codes.write(f"{command}: {done.returncode}\n")
            console.write(printed.replace(str(checkout), "CHECKOUT"))
        if stop_at:
            shutil.copytree(folder, folder.with_name(f"{name}.{number + 1}"), ignore=unlike)


def show_files(names: list[str], work: Path) -> bool:
    """Print whether both have written the same; return True if they have."""
    pairs = []
    for name in names:
        case = CASES[name]
        # How far prepare comes until it hears the signal is a matter of time.
        stops = range(1, len(case.stops) + 1) if case.kind == "train" else ()
        pairs += [(f"{name}.{stop}", f"{name}.{stop}") for stop in stops]
        pairs += [(one, name) for one in (name, case.same_as) if one]
    are_equal = True
    for one, other in pairs:
        count, found = differences(work / "before" / one, work / "after" / other, work)
        wrong = sum(map(len, found.values()))
        title = one if one == other else f"{other} of AFTER, {one} of BEFORE"
        print(f"{title:38} {f'differs in {wrong} of' if wrong else 'equal,'} {count} files")
        for first, *others in found.values():
            print(f"    {first}{f'; {len(others)} more' if others else ''}")
        are_equal &= not found
    return are_equal


def differences(before: Path, after: Path, work: Path) -> tuple[int, dict[str, list[str]]]:
    """Compare two folders; return how many files there are, and by kind of file what differs.

    If they are not of the same case, exit codes and masked keys may also be missing.
    """
    are_same = before.name == after.name
    mine, theirs = files(before), files(after)
    if not are_same:
        del mine[CODES], theirs[CODES]
    found = defaultdict(list)
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            told = f"only {'BEFORE' if name in mine else 'AFTER'} has it"
        else:
            told = difference(mine[name], theirs[name], work, keep_masked=are_same)
        if told:
            found[re.sub(r"\d{6}", "*", name)].append(f"{name}: {told}")
    return len(mine.keys() | theirs.keys()), found


def files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder; the names of TensorBoard's hold the time."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        re.sub(r"(tfevents\.)\d+", r"\1TIME", name.as_posix()): path
        for name, path in found.items()
        if name.parts[0] not in NOT_COMPARED
    }


def difference(one: Path, other: Path, work: Path, *, keep_masked: bool) -> str:
    """Return the first difference that counts between two files; an empty text if none does."""
    if one.read_bytes() == other.read_bytes():
        return ""
    if one.suffix == ".safetensors":
        a, b = load_file(one), load_file(other)
        return next((name for name in a if name not in b or not a[name].equal(b[name])), "header")
    if one.name in {*MASKED_FILES, DOCTOR} or ".tfevents." in one.name:
        a, b = (values(path, work, keep_masked=keep_masked) for path in (one, other))
        # 1 and 1.0 are equal, but not what stands there.
        told = {key: (repr(a.get(key, ...)), repr(b.get(key, ...))) for key in (*a, *b)}
        key = next((key for key, (mine, theirs) in told.items() if mine != theirs), None)
        return "" if key is None else f"{key}, {parting(*told[key])}"
    return parting(one.read_bytes(), other.read_bytes())


def parting(mine: Any, theirs: Any) -> str:
    """Tell from where on two texts, or bytes, are not the same."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
    at = sum(1 for _ in alike)
    begin = max(0, at - 10)
    return f"at {at}: {mine[begin : at + 20]!r} and {theirs[begin : at + 20]!r}"


def values(path: Path, work: Path, *, keep_masked: bool) -> dict[str, Any]:
    """Return what a file holds, by its place in it; what is masked has no value, or is left out."""
    if ".tfevents." in path.name:
        found = dict(events(path.read_bytes()))
    elif path.suffix == ".jsonl":
        found = dict(flat([json.loads(line) for line in path.read_text().splitlines()]))
    else:
        found = dict(flat(json.loads(path.read_text())))
    for place, value in list(found.items()):
        key = place.rpartition(".")[2]
        if key in MASKED_KEYS or (path.name == DOCTOR and key != "check"):
            found[place] = None
            if not keep_masked:
                del found[place]
        elif isinstance(value, str):
            found[place] = MASKED_ROWS.sub("", without_folder(value, work))
    return found


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of all that is in nested objects and lists."""
    if value and isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{place}.{name}")
    else:
        yield place, value


def events(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield (step and tag, value) of TensorBoard's points, in whatever order they are written."""
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        event, content = Event.FromString(content[12:end]), content[end + 4 :]
        for value in event.summary.value:
            hparams = HParamsPluginData()
            if value.metadata.plugin_data.plugin_name == "hparams":
                hparams.ParseFromString(value.metadata.plugin_data.content)
                hparams.session_start_info.start_time_secs = 0
            texts = [text.decode() for text in value.tensor.string_val]
            found = "\n".join([str(value.simple_value), *texts, str(hparams)])
            yield f"step {event.step}.{value.tag}", found


def show_messages(names: list[str], work: Path) -> None:
    """Print the lines of the console that only one has, but for times, memory and folders."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        # Threads change the order of lines.
        before, after = (
            Counter(
                MASKED_NUMBERS.sub("#", without_folder(line, work))
                for line in (work / side / name / CONSOLE).read_text().splitlines()
            )
            for side in ("before", "after")
        )
        for sign, lines in (("-", before - after), ("+", after - before)):
            for line in lines:
                found.setdefault((line, sign), []).append(name)
    print("\nmessages, which may differ:" if found else "\nall messages are equal")
    for (line, sign), places in sorted(found.items()):
        print(f"{sign} {line}   [{', '.join(places)}]")


def without_folder(text: str, work: Path) -> str:
    """Put one name in the place of a case's folder."""
    return re.sub(rf"{re.escape(str(work))}/(before|after)/[\w.-]+", "DATA_DIR", text)


if __name__ == "__main__":
    main()
