"""Mistakes of a new user, and the error that the program prints for each."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.newcomer import moved_in, run_really, settle, type_in

SETTINGS = """\
PREPARE_DATASET=texts
PREPARE_TOTAL_TOKENS=2000
PREPARE_VAL_TOKENS=200
PREPARE_OUT_DIR=words
MODEL_CONTEXT_LENGTH=16
MODEL_NUM_LAYERS=1
MODEL_EMBD_SIZE=8
MODEL_NUM_HEADS=2
TRAIN_RUN_NAME=tiny
TRAIN_TOKENS_PER_STEP=64
TRAIN_MAX_STEPS=2
TRAIN_WARMUP_STEPS=0
TRAIN_SAMPLE_EVERY=0
TRAIN_CHECKPOINT_EVERY=0
TRAIN_COMPILE=false
TRAIN_DEVICE=cpu
"""
SHARD = "data/words/texts_000000.bin"
MANIFEST = "data/words/manifest.json"
RUN = "data/runs/tiny"
CHECKPOINT = f"{RUN}/checkpoints/step-000002"

Change = Callable[[], object]


def nothing() -> None:
    pass


def file(path: str, content: str | bytes = "") -> Change:
    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def folder(path: str) -> Change:
    return lambda: Path(path).mkdir(parents=True)


def cut(path: str, size: int) -> Change:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size])


def edit(path: str, old: str, new: str) -> Change:
    def write() -> None:
        text = Path(path).read_text(encoding="utf-8")
        assert old in text
        Path(path).write_text(text.replace(old, new), encoding="utf-8")

    return write


def last_bytes(path: str, end: bytes) -> Change:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[: -len(end)] + end)


def removed(path: str) -> Change:
    return lambda: Path(path).unlink()


def dotenv_is_a_folder() -> None:
    Path(".env").unlink()
    Path(".env").mkdir()


def appended(path: str, text: str) -> Change:
    return lambda: Path(path).write_text(Path(path).read_text("utf-8") + text, "utf-8")


def half_prepared() -> None:
    """As if prepare had been killed after its first shard."""
    assert run_really("prepare --out-dir half").returncode == 0
    path = Path("data/half/manifest.json")
    manifest = json.loads(path.read_text("utf-8"))
    held_out, *others = manifest["shards"]
    for shard in others:
        (path.parent / shard["file"]).unlink()
    path.write_text(json.dumps({**manifest, "shards": [held_out], "complete": False}), "utf-8")


def exported_and_used() -> None:
    """A file of the user's lies in an export."""
    assert run_really("export").returncode == 0
    Path(f"{RUN}/export/tuned.safetensors").write_bytes(b"weights")


@dataclass(frozen=True)
class Wrong:
    """A mistake, what was typed, and its error. `texts`, `words` and the run `tiny` exist."""

    did: str
    typed: str
    problem: str
    fix: str
    first: Change = nothing


WRONG = (
    # Settings
    Wrong(
        "a number that is none",
        "train --max-steps many",
        "TRAIN_MAX_STEPS=many (flag --max-steps): must be a whole number, such as 500, 20M",
        "correct it; `python -m app train --help` and .env.example explain every setting",
    ),
    Wrong(
        "a number out of bounds",
        "TRAIN_LEARNING_RATE=3 train",
        "TRAIN_LEARNING_RATE=3 (environment): must be at most 1",
        "correct it",
    ),
    Wrong(
        "three bad numbers",
        "PREPARE_VAL_TOKENS=-1 TRAIN_SEED=x prepare --shard-size 0",
        "3 settings are wrong:\n"
        "  PREPARE_VAL_TOKENS=-1 (environment): must be at least 0\n"
        "  PREPARE_SHARD_SIZE=0 (flag --shard-size): must be more than 0\n"
        "  TRAIN_SEED=x (environment): must be a whole number",
        "correct them",
    ),
    Wrong(
        "a sweep over settings that are none, and over wrong values",
        "sweep --set train.learnin_rate=1e-3,2e-3 --set train.seed=0,x",
        "2 settings are wrong:\n"
        "  --set train.learnin_rate: there is no such setting of train or model; did you mean "
        "TRAIN_LEARNING_RATE?\n"
        "  TRAIN_SEED=x (--set): must be a whole number",
        "correct them; `python -m app sweep --help` and .env.example explain every setting",
    ),
    Wrong(
        "a sweep without a value",
        "sweep demo",
        "--set is missing: give values, as in --set train.seed=0,1,2",
        "correct it",
    ),
    Wrong(
        "another sweep under the same name",
        "sweep --set train.seed=0,1",
        "data/sweeps/tiny holds a sweep of other values: tiny-seed7 is not among these runs",
        "name a new sweep with --run-name, or add values to those that it had",
        first=file(
            "data/sweeps/tiny/sweep.json",
            '{"runs": [{"run": "tiny-seed7", "values": {}, "status": "complete", '
            '"held_out_loss": 4.0, "seconds": 1.0, "git_revision": null}]}',
        ),
    ),
    Wrong(
        "heads that do not divide the width",
        "train --num-heads 3",
        "MODEL_EMBD_SIZE=8 (.env, line 7) and MODEL_NUM_HEADS=3 (flag --num-heads): "
        "8 is not a multiple of 3; 6 and 9 are",
        "correct it",
    ),
    Wrong(
        "an architecture that is not known",
        "train --architecture llama",
        "MODEL_ARCHITECTURE=llama (flag --architecture): must be 'gpt2' or 'qwen3'",
        "correct it",
    ),
    Wrong(
        "a head size that GPT-2 cannot have, and an output layer of its own",
        "train --head-dim 128 --tie-embeddings false",
        "2 settings are wrong:\n"
        "  MODEL_ARCHITECTURE=gpt2 (default) and MODEL_HEAD_DIM=128 (flag --head-dim): "
        "gpt2 divides its width among its heads, 4 each; leave it on auto\n"
        "  MODEL_ARCHITECTURE=gpt2 (default) and MODEL_TIE_EMBEDDINGS=false (flag "
        "--tie-embeddings): the output layer of gpt2 is its embedding; qwen3 can have its own",
        "correct them",
    ),
    Wrong(
        "a head that cannot be turned",
        "MODEL_ARCHITECTURE=qwen3 train --head-dim 5",
        "MODEL_ARCHITECTURE=qwen3 (environment) and MODEL_HEAD_DIM=5 (flag --head-dim): "
        "qwen3 turns pairs of a head's values: it must be even",
        "correct it",
    ),
    Wrong(
        "a step that is no whole number of windows",
        "train --tokens-per-step 100",
        "TRAIN_TOKENS_PER_STEP=100 (flag --tokens-per-step) and "
        "MODEL_CONTEXT_LENGTH=16 (.env, line 5): 100 is not a multiple of 16; 96 and 112 are",
        "correct it",
    ),
    Wrong(
        "a warm-up as long as the run",
        "train --warmup-steps 2",
        "TRAIN_WARMUP_STEPS=2 (flag --warmup-steps) and TRAIN_MAX_STEPS=2 (.env, line 11): "
        "the warm-up must be shorter than the run",
        "correct it",
    ),
    Wrong(
        "a typo in the recipe's name",
        "RECIPE=dmeo prepare",
        "RECIPE=dmeo (environment): there is no such recipe among demo,",
        "correct it",
    ),
    Wrong(
        "a typo in a recipe",
        "train --recipe ./mine.env",
        "TRAIN_LERNING_RATE (./mine.env, line 2): "
        "there is no such setting; did you mean TRAIN_LEARNING_RATE?",
        "correct it",
        first=file("mine.env", "# mine\nTRAIN_LERNING_RATE=1e-3\n"),
    ),
    Wrong(
        "a typo in .env",
        "train",
        "RECIPIE (.env, line 17): there is no such setting; did you mean RECIPE?",
        "correct it",
        first=appended(".env", "RECIPIE=demo\n"),
    ),
    Wrong(
        "a line of .env without =",
        "train",
        ".env, line 17: not of the form NAME=VALUE",
        "correct it",
        first=appended(".env", "TRAIN_SEED 5\n"),
    ),
    Wrong(
        "a typo in the environment",
        "PREPARE_TOTAL_TOKEN=1M prepare",
        "PREPARE_TOTAL_TOKEN (environment): "
        "there is no such setting; did you mean PREPARE_TOTAL_TOKENS?",
        "correct it",
    ),
    Wrong(
        "a typo in a flag",
        "train --lerning-rate 1e-3",
        "unknown argument: --lerning-rate; did you mean --learning-rate?",
        "see `python -m app train --help`",
    ),
    Wrong(
        "a flag of another command",
        "train --total-tokens 1M",
        "unknown argument: --total-tokens (set PREPARE_TOTAL_TOKENS in the environment or in .env)",
        "see `python -m app train --help`",
    ),
    Wrong(
        "the hub token as a flag",
        "prepare --hf-token hf_secret",
        "unknown argument: --hf-token (set HF_TOKEN in the environment or in .env)",
        "see `python -m app prepare --help`",
    ),
    Wrong(
        "a variable among the arguments",
        "train TRAIN_MAX_STEPS=5",
        "unknown argument: TRAIN_MAX_STEPS=5 (set TRAIN_MAX_STEPS in the environment or in .env)",
        "see `python -m app train --help`",
    ),
    Wrong(
        "a flag twice, of which the last counts",
        "train --max-steps 5 --max_steps=0",
        "TRAIN_MAX_STEPS=0 (flag --max-steps): must be more than 0",
        "correct it",
    ),
    Wrong(
        "a flag from an empty shell variable",
        "train --run-name=",
        "TRAIN_RUN_NAME (flag --run-name): has no value; give it one, or leave the flag out",
        "correct it",
    ),
    Wrong(
        "a flag without a value",
        "train --run-name",
        "--run-name has no value",
        "give it one",
    ),
    Wrong(
        "a prompt that begins with a dash",
        "sample --prompt -x",
        "--prompt has no value",
        "give it one; if it begins with a dash, as in -x, write --prompt=-x",
    ),
    Wrong(
        "initials for a flag",
        "train --lr 1e-3",
        "unknown argument: --lr; did you mean --learning-rate?",
        "see `python -m app train --help`",
    ),
    Wrong(
        "a flag of train, which prepare has no use for",
        "prepare --dataset-dir words",
        "unknown argument: --dataset-dir (a setting of train)",
        "see `python -m app prepare --help`",
    ),
    Wrong(
        "an undefined variable in .env",
        "train",
        "TRAIN_RUN_NAME (.env, line 10): ${EXPERIMENT} is not set: set it in the environment or "
        "above this line, or write ${EXPERIMENT:-DEFAULT}",
        "correct it",
        first=edit(".env", "TRAIN_RUN_NAME=tiny\n", "TRAIN_SEED=1\nTRAIN_RUN_NAME=${EXPERIMENT}\n"),
    ),
    Wrong(
        "a folder named .env",
        "train",
        ".env cannot be read (Is a directory): make it readable, or move it away",
        "correct it",
        first=dotenv_is_a_folder,
    ),
    Wrong(
        "letters in another order in the environment",
        "RECPIE=demo train",
        "RECPIE (environment): there is no such setting; did you mean RECIPE?",
        "correct it",
    ),
    Wrong(
        "any file for a recipe",
        "train --recipe /etc/passwd",
        "/etc/passwd, lines 1, 2, 3 and ",
        "correct it",
    ),
    Wrong(
        "a typo in the command",
        "trian",
        "'trian' is not a command; did you mean train?",
        "see `python -m app --help`",
    ),
    Wrong(
        "flags before the command",
        "--max-steps 5 train",
        "'--max-steps' is not a command",
        "see `python -m app --help`",
    ),
    Wrong(
        "a run name that is a path",
        "train --run-name runs/mine",
        "TRAIN_RUN_NAME=runs/mine (flag --run-name): must start with a letter or digit",
        "correct it",
    ),
    Wrong(
        "weights of a run that is not there",
        "train --run-name other --init-from nobody@2",
        "there is no run data/runs/nobody",
        "set TRAIN_INIT_FROM to one of: tiny",
    ),
    Wrong(
        "weights of a step without a checkpoint",
        "train --run-name other --init-from tiny@1",
        "data/runs/tiny has no checkpoint of step 1",
        "choose one of: 2",
    ),
    Wrong(
        "weights of a run by its path",
        f"train --run-name other --init-from {RUN}",
        f"{RUN} is a folder of a run",
        "set TRAIN_INIT_FROM to the run's name, or RUN@STEP",
    ),
    Wrong(
        "weights for a dataset that is not there",
        "train --run-name other --init-from openai-community/gpt2 --dataset-dir nope",
        "nope: there is no such folder",
        "set TRAIN_DATASET_DIR to one of: ",
    ),
    Wrong(
        "weights of a dataset",
        "train --run-name other --init-from words",
        "words has no config.json: it is not a model of transformers",
        "set TRAIN_INIT_FROM to a GPT-2",
    ),
    Wrong(
        "weights from a folder that is not there",
        "train --run-name other --init-from ./gpt2",
        "there is no folder ./gpt2",
        "correct TRAIN_INIT_FROM: a model of the hub, a folder, or RUN or RUN@STEP",
    ),
    Wrong(
        "weights for a run that has begun without them",
        "train --init-from other --max-steps 3",
        f"{RUN} has begun without TRAIN_INIT_FROM, not with other",
        "set TRAIN_RUN_NAME to a new name, or leave TRAIN_INIT_FROM out to continue this run",
    ),
    Wrong(
        "weights of a smaller model",
        "train --run-name other --init-from tiny --num-layers 2",
        "MODEL_NUM_LAYERS=2, but tiny@2 has 1",
        "leave these out: TRAIN_INIT_FROM sets the model",
    ),
    Wrong(
        "a branch from a path",
        "train --run-name other --branch-from runs/tiny",
        "TRAIN_BRANCH_FROM=runs/tiny (flag --branch-from): must be the name of a run, or NAME@STEP "
        "with the step of a checkpoint",
        "correct it",
    ),
    Wrong(
        "a branch from no run",
        "train --run-name other --branch-from @2",
        "TRAIN_BRANCH_FROM=@2 (flag --branch-from): must be the name of a run, or NAME@STEP",
        "correct it",
    ),
    Wrong(
        "a branch from no step",
        "train --run-name other --branch-from tiny@",
        "TRAIN_BRANCH_FROM=tiny@ (flag --branch-from): must be the name of a run, or NAME@STEP",
        "correct it",
    ),
    Wrong(
        "a branch from a step without a checkpoint",
        "train --run-name other --branch-from tiny@1",
        f"{RUN} has no checkpoint of step 1",
        "choose one of: 2",
    ),
    Wrong(
        "a branch with nothing left to do",
        "train --run-name other --branch-from tiny",
        "nothing is left to do after tiny@2: TRAIN_MAX_STEPS is 2",
        "raise TRAIN_MAX_STEPS, the steps of the whole run, or branch from an earlier step",
    ),
    Wrong(
        "a branch from the run itself",
        "train --branch-from tiny --max-steps 3",
        "TRAIN_BRANCH_FROM=tiny: a run cannot branch from itself",
        "set TRAIN_RUN_NAME to the name of the new run",
    ),
    Wrong(
        "a dataset in DATA_DIR itself",
        "prepare --out-dir .",
        "or in one of its folders runs, cache, reports, sweeps, trackio",
        "set PREPARE_OUT_DIR to another name",
    ),
    Wrong(
        "a dataset among the runs",
        "prepare --out-dir runs/mine",
        "runs/mine is ",
        "set PREPARE_OUT_DIR to another name",
    ),
    Wrong(
        "a vocabulary too small for the tokenizer",
        "train --vocab-size 32000",
        "MODEL_VOCAB_SIZE=32000 (flag --vocab-size): must be at least 50257",
        "correct it",
    ),
    # Text
    Wrong(
        "a text folder that does not exist",
        "prepare --dataset ./missing --out-dir new",
        "missing",
        "correct PREPARE_DATASET",
    ),
    Wrong(
        "an empty folder",
        "prepare --dataset empty --out-dir new",
        "no text in empty: none of 0 files ends in .txt .md .py .jsonl .ndjson .parquet",
        "choose other files; compressed ones may also end in .gz",
        first=folder("empty"),
    ),
    Wrong(
        "a kind of file that holds no text",
        "prepare --dataset paper.pdf --out-dir new",
        "no text in paper.pdf: none of 1 files ends in .txt .md .py .jsonl .ndjson .parquet",
        "choose other files",
        first=file("paper.pdf", "%PDF-1.7"),
    ),
    Wrong(
        "a pattern that matches nothing",
        "prepare --dataset 'texts/*.md' --out-dir new",
        "nothing matches texts/*.md",
        "correct PREPARE_DATASET",
    ),
    Wrong(
        "a text file without text",
        "prepare --dataset none.txt --out-dir new",
        "the dataset has only 0 tokens, 200 were to be held out",
        "lower PREPARE_VAL_TOKENS (0 holds nothing out), or add text",
        first=file("none.txt"),
    ),
    Wrong(
        "more held-out tokens than there are",
        "prepare --val-tokens 1M --out-dir new",
        "tokens, 1,000,000 were to be held out",
        "lower PREPARE_VAL_TOKENS (0 holds nothing out), or add text",
    ),
    Wrong(
        "a line that is not JSON",
        "prepare --dataset rows.jsonl --out-dir new",
        "rows.jsonl, line 2 is not JSON",
        "write one JSON object a line",
        first=file("rows.jsonl", '{"text": "one"}\n{"text": two}\n'),
    ),
    Wrong(
        "a column that is not there",
        "prepare --dataset rows.jsonl --out-dir new",
        "rows.jsonl has no column 'text'",
        "set PREPARE_TEXT_COLUMN to one of: id, content",
        first=file("rows.jsonl", '{"id": 1, "content": "one"}\n'),
    ),
    Wrong(
        "a column that holds no text",
        "prepare --dataset rows.jsonl --text-column id --out-dir new",
        "rows.jsonl, line 1 has int, not text, in the text column: 1",
        "set PREPARE_TEXT_COLUMN to the column that holds the text",
        first=file("rows.jsonl", '{"id": 1, "content": "one"}\n'),
    ),
    Wrong(
        "a parquet file that is none",
        "prepare --dataset rows.parquet --out-dir new",
        "rows.parquet is damaged",
        "replace it, or remove it, or leave out bad lines and files with PREPARE_SKIP_BAD",
        first=file("rows.parquet", "not parquet at all"),
    ),
    Wrong(
        "a compressed file that is none",
        "prepare --dataset text.txt.gz --out-dir new",
        "text.txt.gz is damaged: Not a gzipped file",
        "replace it, or remove it, or leave out bad lines and files with PREPARE_SKIP_BAD",
        first=file("text.txt.gz", "not compressed"),
    ),
    # Shards
    Wrong(
        "prepared before with other settings",
        "prepare --shard-size 500",
        "data/words was prepared differently: shard_size was 100000000 and is now 500",
        "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew",
    ),
    Wrong(
        "prepared before from other text",
        "prepare",
        "the files that data/words was prepared from have changed: new.txt has been added before ",
        "PREPARE_OUT_DIR",
        first=file("texts/new.txt", "One more."),
    ),
    Wrong(
        "prepared before from a folder that is not here any more",
        "prepare --dataset gone --out-dir words",
        "there is no file or folder gone here, and data/words was prepared from files",
        "go to where they are, or set PREPARE_OUT_DIR to another folder",
    ),
    Wrong(
        "a folder with somebody else's shards",
        "prepare --out-dir llmc",
        "data/llmc holds shards that prepare did not write",
        "set PREPARE_OUT_DIR to another folder; train can use these shards as they are",
        first=file("data/llmc/tokens.bin", "x"),
    ),
    Wrong(
        "a file where DATA_DIR should be",
        "prepare --data-dir texts/00.txt",
        "DATA_DIR=texts/00.txt (flag --data-dir): there is a file, or a link to nothing, instead",
        "correct it",
    ),
    Wrong(
        "a manifest that is damaged",
        "prepare",
        f"{MANIFEST} is not valid JSON",
        "prepare the dataset again in an empty folder",
        first=cut(MANIFEST, 100),
    ),
    Wrong(
        "questions that are not there",
        "TRAIN_HELLASWAG_EVERY=1 TRAIN_HELLASWAG_FILE=mine.jsonl train --run-name new",
        "HellaSwag's questions: data/mine.jsonl is not a file",
        "correct TRAIN_HELLASWAG_FILE, or unset it for the 10,042 published questions",
    ),
    Wrong(
        "another file than the published questions",
        "TRAIN_HELLASWAG_EVERY=1 prepare",
        "data/cache/hellaswag_val.jsonl is not HellaSwag's published file: its SHA-256 does not",
        "delete it; to score other questions of this form, set TRAIN_HELLASWAG_FILE",
        file("data/cache/hellaswag_val.jsonl", "{}"),
    ),
    Wrong(
        "a question of another form, before several processes start",
        "TRAIN_HELLASWAG_EVERY=1 TRAIN_HELLASWAG_FILE=m.jsonl TRAIN_PROCESSES=2 "
        "train --run-name new",
        "data/m.jsonl, line 1 is not a question of HellaSwag: activity_label Field required",
        "correct TRAIN_HELLASWAG_FILE",
        file("data/m.jsonl", "{}"),
    ),
    Wrong(
        "a dataset that does not exist",
        "train --dataset-dir missing",
        "no dataset in data/missing: there is no such folder",
        "run `python -m app prepare` with the same settings, or set TRAIN_DATASET_DIR to one of: "
        "words (2,000 tokens)",
    ),
    Wrong(
        "a dataset folder without shards",
        "train --dataset-dir empty",
        "no dataset in data/empty: it holds no shard (*.bin)",
        "run `python -m app prepare` with the same settings, or set TRAIN_DATASET_DIR to one of: "
        "words (2,000 tokens)",
        first=folder("data/empty"),
    ),
    Wrong(
        "a dataset half prepared",
        "train --dataset-dir half",
        "the dataset in data/half is not complete: prepare stopped after 0 training tokens",
        "run `python -m app prepare` with the same settings to complete it",
        first=half_prepared,
    ),
    Wrong(
        "a text file named .bin",
        "train --dataset-dir mine",
        "data/mine/story.bin is not a token shard: it begins with 1701015119, not 20240520",
        "take it out of the folder, or prepare the dataset again",
        first=file("data/mine/story.bin", "Once upon a time there was a file.\n" * 99),
    ),
    Wrong(
        "an empty shard",
        "train --dataset-dir mine",
        "shard data/mine/story.bin is cut off: 0 bytes, its header has 1024",
        "copy the file again, or delete the folder and prepare the dataset again",
        first=file("data/mine/story.bin"),
    ),
    Wrong(
        "a truncated shard",
        "train",
        f"shard {SHARD} has 3000 bytes; its header says 2000 tokens, which take 5024",
        "copy the file again, or delete the folder and prepare the dataset again",
        first=cut(SHARD, 3000),
    ),
    Wrong(
        "a shard that is missing",
        "train",
        f"shard {SHARD} cannot be read: No such file or directory",
        "copy the file again, or delete the folder and prepare the dataset again",
        first=removed(SHARD),
    ),
    Wrong(
        "a shard with changed tokens",
        "inspect words --verify",
        f"shard {SHARD} is damaged: its SHA-256 is",
        "prepare the dataset again",
        first=last_bytes(SHARD, b"\x00\x00"),
    ),
    Wrong(
        "a shard with tokens that are none",
        f"inspect {SHARD}",
        f"{SHARD} has token 65535, but GPT-2's vocabulary ends at 50256",
        "prepare the dataset again",
        first=last_bytes(SHARD, b"\xff\xff"),
    ),
    Wrong(
        "windows longer than the dataset",
        "train --context-length 4000 --tokens-per-step 4000 --run-name new",
        "data/words has too few training tokens for one sequence: 4001 are needed",
        "prepare more text, or lower MODEL_CONTEXT_LENGTH",
    ),
    # Runs
    Wrong(
        "a micro-batch that does not divide the step",
        "train --micro-batch-size 3 --run-name new",
        "TRAIN_MICRO_BATCH_SIZE=3 does not divide the 4 sequences of a step",
        "choose one of: 1, 2, 4",
    ),
    Wrong(
        "the name of a run with another model",
        "train --embd-size 12",
        "data/runs/tiny holds a different run: embd_size was 8 and is now 12",
        "set TRAIN_RUN_NAME to a new name, or set these back to continue",
    ),
    Wrong(
        "the name of a run with another architecture",
        "train --architecture qwen3 --tie-embeddings true",
        "data/runs/tiny holds a different run: architecture was 'gpt2' and is now 'qwen3'",
        "set TRAIN_RUN_NAME to a new name, or set these back to continue",
    ),
    Wrong(
        "a run that exists, and TRAIN_RESUME=never",
        "train --resume never",
        "data/runs/tiny exists, with 2 steps",
        "set TRAIN_RUN_NAME to a new name, or TRAIN_RESUME=auto to continue it",
    ),
    Wrong(
        "a file where the run should be",
        "train --run-name notes",
        "File exists: data/runs/notes",
        "use another path, or move that away",
        first=file("data/runs/notes", "my notes"),
    ),
    Wrong(
        "metrics that are damaged",
        "train --max-steps 3",
        f"{RUN}/metrics.jsonl, line 1 is not the JSON object of a step",
        "delete that line",
        first=edit(f"{RUN}/metrics.jsonl", '{"step": 0,', '{"step: 0,'),
    ),
    Wrong(
        "weights cut off",
        "train --max-steps 3",
        f"{RUN} has no intact checkpoint: {CHECKPOINT}/model.safetensors is damaged",
        "restore the files from a backup, or set TRAIN_RUN_NAME to a new name to start again",
        first=cut(f"{CHECKPOINT}/model.safetensors", 10_000),
    ),
    Wrong(
        "a checkpoint's state that is damaged",
        "train --max-steps 3",
        f"{RUN} has no intact checkpoint: {CHECKPOINT}/state.json is not valid JSON",
        "restore the files from a backup, or set TRAIN_RUN_NAME to a new name to start again",
        first=cut(f"{CHECKPOINT}/state.json", 100),
    ),
    Wrong(
        "a run that does not exist",
        "sample --run-name missing",
        "there is no run data/runs/missing",
        "set TRAIN_RUN_NAME to one of: tiny",
    ),
    Wrong(
        "a checkpoint that does not exist",
        "evaluate --step 1",
        "data/runs/tiny has no checkpoint of step 1",
        "choose one of: 2",
    ),
    Wrong(
        "weights cut off, to write with",
        "sample",
        f"{RUN} has no intact checkpoint: {CHECKPOINT}/model.safetensors is damaged",
        "restore the files from a backup, or set TRAIN_RUN_NAME to a new name to start again",
        first=cut(f"{CHECKPOINT}/model.safetensors", 10_000),
    ),
    Wrong(
        "a dataset without held-out text",
        "evaluate --dataset-dir unheld",
        "data/unheld has 0 held-out tokens, and a sequence needs 17 (MODEL_CONTEXT_LENGTH",
        "prepare it again, into another folder, with PREPARE_VAL_TOKENS=16 or more",
        first=lambda: run_really("prepare --val-tokens 0 --out-dir unheld"),
    ),
    Wrong(
        "less held-out text than published figures take",
        "evaluate --tokens published",
        "data/words has 201 held-out tokens; published results take 10,485,760, and one more",
        "prepare it with PREPARE_VAL_TOKENS=10485760 and train on that, or set EVALUATE_TOKENS=all",
    ),
    Wrong(
        "published figures of training text",
        "evaluate --tokens published --split train",
        "EVALUATE_TOKENS=published (flag --tokens) and EVALUATE_SPLIT=train (flag --split): "
        "published results are on held-out text",
        "correct it",
    ),
    Wrong(
        "a number of tokens to evaluate that is none",
        "evaluate --tokens publishd",
        "EVALUATE_TOKENS=publishd (flag --tokens): must be a whole number, such as 500, 20M, "
        "1.5B or 1e7, or auto or all or published",
        "correct it",
    ),
    Wrong(
        "an export to a folder with something else",
        "export --out-dir words",
        "data/words exists and is not an export",
        "set EXPORT_OUT_DIR to another folder, or move that away",
    ),
    Wrong(
        "an export to a file",
        "export --out-dir notes",
        "data/notes is a file",
        "set EXPORT_OUT_DIR to another folder, or move that away",
        first=file("data/notes", "my notes"),
    ),
    Wrong(
        "an export to an earlier one with files of one's own",
        "export",
        f"{RUN}/export has files that export did not write: tuned.safetensors",
        "set EXPORT_OUT_DIR to another folder, or move that away",
        first=exported_and_used,
    ),
    Wrong(
        "an export of a run that does not exist",
        "export --run-name missing",
        "there is no run data/runs/missing",
        "set TRAIN_RUN_NAME to one of: tiny",
    ),
    Wrong(
        "a report of no run",
        "report --run-name missing",
        "there is no run data/runs/missing",
        "set TRAIN_RUN_NAME to one of: tiny",
    ),
    Wrong(
        "a report of a run that exists and of one that does not",
        "report tiny missing",
        "there is no run data/runs/missing",
        "name one of: tiny",
    ),
    Wrong(
        "a folder for a report that is served",
        "report --serve --out page",
        "--out has no effect beside --serve",
        "leave one of them out",
    ),
    Wrong(
        "a port for a report that is not served",
        "report --port 8002",
        "--port has no effect without --serve",
        "add --serve, or leave --port out",
    ),
    Wrong(
        "a run to report on, named twice",
        "report tiny --run-name tiny",
        "--run-name has no effect beside RUN",
        "leave one of them out",
    ),
    Wrong(
        "a path and a run to inspect",
        "inspect words --run-name tiny",
        "--run-name has no effect beside PATH",
        "leave one of them out",
    ),
    Wrong(
        "two recipes for a sweep",
        "sweep demo --recipe original --set train.seed=0,1",
        "--recipe has no effect beside RECIPE",
        "leave one of them out",
    ),
    Wrong(
        "a report of metrics that are damaged",
        "report",
        f"{RUN}/metrics.jsonl, line 3 is not the JSON object of a step",
        "delete that line",
        first=appended(f"{RUN}/metrics.jsonl", "oops\n"),
    ),
    Wrong(
        "a path to inspect that does not exist",
        "inspect runs/missing",
        "there is no runs/missing, neither here nor in data",
        "give the path of a .bin file, or of a folder that prepare or train wrote: "
        "data/runs/tiny, data/words",
    ),
    Wrong(
        "a folder to inspect that is nothing of ours",
        "inspect texts",
        "texts is not a shard, dataset folder, checkpoint or run",
        "give the path of a .bin file, or of a folder that prepare or train wrote",
    ),
    Wrong(
        "a text to inspect",
        "inspect story.txt",
        "story.txt is not a token shard: it begins with b'Once upon'",
        "give the path of a .bin file, or of a folder that prepare or train wrote",
        first=file("story.txt", "Once upon"),
    ),
    Wrong(
        "an empty file to inspect",
        "inspect empty",
        "empty is not a token shard: it is empty",
        "give the path of a .bin file, or of a folder that prepare or train wrote",
        first=file("empty"),
    ),
    Wrong(
        "a picture to inspect, named like a shard",
        "inspect picture.bin",
        r"picture.bin is not a token shard: it begins with b'\x89PNG",
        "give the path of a .bin file, or of a folder that prepare or train wrote",
        first=file("picture.bin", b"\x89PNG\r\n\x1a\n0000"),
    ),
    Wrong(
        "a file of a checkpoint to inspect",
        f"inspect {CHECKPOINT}/model.safetensors",
        f"{CHECKPOINT}/model.safetensors is not a token shard: it is a part of {CHECKPOINT}",
        f"give that folder: inspect {CHECKPOINT}",
    ),
    Wrong(
        "the folder of all runs to inspect",
        "inspect runs",
        "data/runs is not a shard, dataset folder, checkpoint or run",
        "give one of the folders in it: tiny",
    ),
    Wrong(
        "a model of another program to inspect",
        "inspect theirs",
        "theirs is a model for transformers; only its checkpoint can be inspected",
        "give the path of a .bin file, or of a folder that prepare or train wrote",
        first=file("theirs/config.json", "{}"),
    ),
    Wrong(
        "a run to inspect that does not exist",
        "inspect --run-name missing",
        "there is no run data/runs/missing",
        "set TRAIN_RUN_NAME to one of: tiny",
    ),
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which text was prepared and a model trained, with the settings in .env."""
    place = tmp_path_factory.mktemp("workshop")
    (place / "texts").mkdir()
    for number in range(20):
        words = " ".join(f"word{number * i % 97}" for i in range(80))
        (place / "texts" / f"{number:02}.txt").write_text(words, encoding="utf-8")
    (place / ".env").write_text(SETTINGS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        settle(place, patch)
        assert type_in("prepare", patch) == ExitCode.DONE
        assert type_in("train", patch) == ExitCode.DONE
    return place


@pytest.fixture(autouse=True)
def newcomer(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their own copy of the workshop."""
    with moved_in(workshop, tmp_path, monkeypatch):
        yield


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def folders() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_dir()}


def assert_reported(error: str, problem: str, fix: str) -> None:
    """One message and one fix, readable, and nothing else."""
    assert error.startswith("error: ")
    message, separator, advice = error.removeprefix("error: ").partition("\n  fix: ")
    assert problem in message
    assert separator
    assert fix in advice
    assert advice.endswith("\n")
    assert advice.count("\n") == 1
    assert "Traceback" not in message


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.did)
def test_a_wrong_input_is_reported_with_its_fix(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong.first()
    before, folders_before = files(), folders()
    capsys.readouterr()
    code = type_in(wrong.typed, monkeypatch)
    assert_reported(capsys.readouterr().err, wrong.problem, wrong.fix)
    assert code == ExitCode.USER
    after = files()
    assert {path: after.get(path) for path in before} == before, "something was lost"
    if wrong.typed.startswith("prepare"):
        assert folders() == folders_before, "an empty folder looks like a dataset"


@pytest.mark.parametrize(
    "did", ("three bad numbers", "a typo in .env", "more held-out tokens than there are")
)
def test_a_real_process_reports_the_same(did: str) -> None:
    wrong = next(wrong for wrong in WRONG if wrong.did == did)
    wrong.first()
    ended = run_really(wrong.typed)
    assert_reported(ended.stderr, wrong.problem, wrong.fix)
    assert (ended.returncode, ended.stdout) == (ExitCode.USER, "")


def test_a_missing_gpu_is_reported() -> None:
    ended = run_really("CUDA_VISIBLE_DEVICES= train --device cuda --run-name new")
    assert_reported(
        ended.stderr,
        "TRAIN_DEVICE=cuda, but no GPU can be used here",
        "check `nvidia-smi`, or set TRAIN_DEVICE=auto to use the CPU",
    )
    assert ended.returncode == ExitCode.USER


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("command", "place"), (("train --max-steps 3", RUN), ("prepare", "data/words"))
)
def test_a_folder_in_use_by_another_process_is_refused(
    command: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{place}/.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        code = type_in(command, monkeypatch)
        other.communicate()
    assert_reported(
        capsys.readouterr().err,
        f"another process is working on {place}",
        f"wait for that {command.split()[0]} to end, or stop it",
    )
    assert code == ExitCode.USER
    assert type_in(command, monkeypatch) == ExitCode.DONE


def test_at_least_fifty_different_mistakes_are_tried() -> None:
    assert len({wrong.did for wrong in WRONG}) == len(WRONG) >= 50
