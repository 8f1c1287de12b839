"""Datasets, runs and texts in every state that a user can leave them in."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from app.data.manifest import MANIFEST, Manifest
from app.tools.doctor.checks import Context, Finding, run_check
from app.tools.doctor.inputs import (
    check_dataset,
    check_hellaswag,
    check_plan,
    check_run,
    check_text,
)
from tests.inference.hellaswag_questions import FILE
from tests.tools.doctor.conftest import NewContext, copy_tree

Check = Callable[[Context], Iterator[Finding]]


def findings(check: Check, context: Context) -> list[Finding]:
    return list(run_check("it", lambda: check(context)))


def only(check: Check, context: Context, status: str, found: str, fix: str = "") -> None:
    (row,) = findings(check, context)
    assert row.status == status, row
    assert found in row.found
    assert fix in row.fix


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_states_of_a_dataset(new_context: NewContext, data_dir: Path) -> None:
    text = data_dir / "text"
    only(check_dataset, new_context(), "pass", "6,000 training tokens")
    # Only a hash can detect this.
    shard = text / "stdlib_000001.bin"
    flip(shard)
    only(check_dataset, new_context(), "pass", "headers and sizes are right")
    only(check_dataset, new_context(verify=True), "fail", f"shard {shard} is damaged")
    context = new_context(MODEL_CONTEXT_LENGTH=7000, TRAIN_TOKENS_PER_STEP=7000)
    only(check_dataset, context, "fail", "too few training tokens for one sequence")
    assert context.fingerprint is None, "prepare will still need its text"
    manifest = Manifest.load(text)
    assert manifest is not None
    replace(manifest, complete=False).save(text)
    only(
        check_dataset, new_context(), "warn", "is not complete: 7,001 tokens so far", "run prepare"
    )
    shard.unlink()
    only(check_dataset, new_context(), "fail", f"shard {shard} cannot be read")
    (text / MANIFEST).write_text("{")
    only(check_dataset, new_context(), "fail", "is not valid JSON")
    shutil.rmtree(text)
    only(check_dataset, new_context(), "warn", "is not prepared yet", "prepare` with the same")
    only(check_dataset, new_context(TRAIN_DATASET_DIR="other"), "fail", "no dataset in")


def test_held_out_text_shorter_than_a_sequence_has_a_row(new_context: NewContext) -> None:
    lengths = {"MODEL_CONTEXT_LENGTH": 2048, "TRAIN_TOKENS_PER_STEP": 2048}
    dataset, held_out = findings(check_dataset, new_context(TRAIN_VAL_EVERY=1, **lengths))
    assert (dataset.status, held_out.status) == ("pass", "warn")
    assert "has 1,001 held-out tokens, and a sequence needs 2,049" in held_out.found
    assert held_out.fix.endswith("with PREPARE_VAL_TOKENS=2048 or more")
    only(check_dataset, new_context(TRAIN_VAL_EVERY=0, **lengths), "pass", "1,001 held out")


def test_what_speaks_against_the_run_is_what_train_says(new_context: NewContext) -> None:
    """With the dataset's tokens, or before there is one with those that prepare would write."""
    changes = {"TRAIN_MAX_STEPS": 150, "TRAIN_VAL_EVERY": 0}
    assert not findings(check_plan, new_context(**changes, PREPARE_TOTAL_TOKENS="1M"))
    expected = Finding(
        "plan",
        "warn",
        "150 steps read the 6,000 tokens of text 6.4 times; beyond about 4, repeated text adds "
        "little",
        "set TRAIN_MAX_STEPS=93, or prepare more text",
    )
    context = new_context(**changes, PREPARE_TOTAL_TOKENS="1M")
    list(check_dataset(context))
    assert findings(check_plan, context) == [expected]
    assert findings(check_plan, new_context(**changes, PREPARE_TOTAL_TOKENS="6000")) == [expected]


def test_states_of_a_run(new_context: NewContext, data_dir: Path) -> None:
    def with_dataset(**changes: object) -> Context:
        context = new_context(**changes)
        assert [row.status for row in findings(check_dataset, context)] == ["pass"]
        return context

    context = with_dataset()
    only(check_run, context, "pass", "continues at step 4 of 10")
    assert (context.steps_completed, context.remaining_steps) == (4, 6)
    context = with_dataset(TRAIN_MAX_STEPS=4)
    only(check_run, context, "pass", "finished after 4 steps")
    assert context.remaining_steps == 0
    only(check_run, with_dataset(TRAIN_RUN_NAME="other"), "pass", "runs/other: new")
    only(check_run, with_dataset(TRAIN_RESUME="never"), "fail", "exists, with 4 steps")
    only(
        check_run, with_dataset(MODEL_NUM_HEADS=1), "fail", "holds a different run: num_heads was 2"
    )
    # Also before there is a dataset to compare.
    only(check_run, new_context(TRAIN_SEED=1), "fail", "holds a different run: seed was 0")
    checkpoint = data_dir / "runs" / "run" / "checkpoints" / "step-000004"
    flip(checkpoint / "model.safetensors")
    only(check_run, with_dataset(), "fail", "has no intact checkpoint")
    shutil.rmtree(checkpoint)
    only(check_run, with_dataset(), "pass", "no checkpoint yet")


def test_states_of_hellaswag(new_context: NewContext, data_dir: Path, tmp_path: Path) -> None:
    assert findings(check_hellaswag, new_context()) == []
    every = {"TRAIN_HELLASWAG_EVERY": 5}
    only(check_hellaswag, new_context(**every), "warn", "hellaswag_val.jsonl is not downloaded yet")
    own = new_context(**every, TRAIN_HELLASWAG_FILE=FILE)
    only(check_hellaswag, own, "pass", f"{FILE}: 8 questions")
    assert own.questions == 8
    (tmp_path / "other.jsonl").write_text("{}\n")
    other = new_context(**every, TRAIN_HELLASWAG_FILE=tmp_path / "other.jsonl")
    only(check_hellaswag, other, "fail", "line 1 is not a question of HellaSwag")
    (data_dir / "cache").mkdir(exist_ok=True)
    (data_dir / "cache" / "hellaswag_val.jsonl").write_bytes(FILE.read_bytes())
    only(check_hellaswag, new_context(**every), "fail", "is not HellaSwag's published file")


def test_a_branch_continues_from_its_beginning(new_context: NewContext, data_dir: Path) -> None:
    def branch(of: str, **changes: object) -> Context:
        return new_context(TRAIN_RUN_NAME="new", TRAIN_BRANCH_FROM=of, **changes)

    context = branch("run")
    only(check_run, context, "pass", "runs/new: new, a branch of run@4")
    assert (context.steps_completed, context.remaining_steps) == (4, 6)
    only(check_run, branch("run@3"), "fail", "has no checkpoint of step 3", "choose one of: 4")
    only(check_run, branch("run", TRAIN_MAX_STEPS=4), "fail", "nothing is left to do after run@4")
    only(check_run, branch("run", MODEL_NUM_HEADS=1), "fail", "num_heads was 2 and is now 1", "set")
    assert not (data_dir / "runs" / "new").exists()
    copy_tree(data_dir / "runs" / "run", data_dir / "runs" / "new")
    only(check_run, branch("run"), "fail", "new has begun without TRAIN_BRANCH_FROM, not with run")


def test_states_of_a_text(new_context: NewContext, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("a text")
    only(check_text, new_context(PREPARE_DATASET="texts"), "pass", "texts: 1 file, 0.006 KB")
    only(
        check_text,
        new_context(PREPARE_DATASET="./missing"),
        "fail",
        "there is no file or folder ./missing",
    )
