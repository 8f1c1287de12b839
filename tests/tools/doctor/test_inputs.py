"""Datasets and runs in every state that a user can bring them into."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from app.data.manifest import MANIFEST, Manifest
from app.tools.doctor.case import Case
from app.tools.doctor.finding import Finding, examined
from app.tools.doctor.inputs import check_dataset, check_run, check_text
from tests.tools.doctor.conftest import NewCase

Check = Callable[[Case], Iterator[Finding]]


def found(check: Check, case: Case) -> list[Finding]:
    return list(examined("it", lambda: check(case)))


def only(check: Check, case: Case, status: str, said: str, fix: str = "") -> None:
    (row,) = found(check, case)
    assert row.status == status, row
    assert said in row.found
    assert fix in row.fix


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_dataset_is_seen_in_its_states(new_case: NewCase, data_dir: Path) -> None:
    text = data_dir / "text"
    only(check_dataset, new_case(), "pass", "6,000 training tokens")
    # Only a hash shows it.
    shard = text / "stdlib_000001.bin"
    flip(shard)
    only(check_dataset, new_case(), "pass", "headers and sizes are right")
    only(check_dataset, new_case(verify=True), "fail", f"shard {shard} is damaged")
    only(
        check_dataset,
        new_case(MODEL_CONTEXT_LENGTH=7000, TRAIN_TOKENS_PER_STEP=7000),
        "fail",
        "less than one window",
    )
    manifest = Manifest.load(text)
    assert manifest is not None
    replace(manifest, complete=False).save(text)
    only(check_dataset, new_case(), "warn", "is not complete: 7,001 tokens so far", "run prepare")
    shard.unlink()
    only(check_dataset, new_case(), "fail", f"shard {shard} cannot be read")
    (text / MANIFEST).write_text("{")
    only(check_dataset, new_case(), "fail", "is not valid JSON")
    shutil.rmtree(text)
    only(check_dataset, new_case(), "warn", "is not prepared yet", "run prepare")
    only(check_dataset, new_case(TRAIN_DATASET_DIR="other"), "fail", "no dataset in")


def test_a_run_is_seen_in_its_states(new_case: NewCase, data_dir: Path) -> None:
    def looked_at(**changes: object) -> Case:
        case = new_case(**changes)
        assert [row.status for row in found(check_dataset, case)] == ["pass"]
        return case

    case = looked_at()
    only(check_run, case, "pass", "continues at step 4 of 10")
    assert (case.steps_done, case.steps_left) == (4, 6)
    case = looked_at(TRAIN_MAX_STEPS=4)
    only(check_run, case, "pass", "finished after 4 steps")
    assert case.steps_left == 0
    only(check_run, looked_at(TRAIN_RUN_NAME="other"), "pass", "runs/other: new")
    only(check_run, looked_at(TRAIN_RESUME="never"), "fail", "exists, with 4 steps")
    only(check_run, looked_at(MODEL_NUM_HEADS=1), "fail", "is another run: num_heads was 2")
    # Also before there is a dataset to compare.
    only(check_run, new_case(TRAIN_SEED=1), "fail", "is another run: seed was 0")
    checkpoint = data_dir / "runs" / "run" / "checkpoints" / "step-000004"
    flip(checkpoint / "model.safetensors")
    only(check_run, looked_at(), "fail", "has no good checkpoint")
    shutil.rmtree(checkpoint)
    only(check_run, looked_at(), "pass", "no checkpoint yet")


def test_text_is_looked_for(new_case: NewCase, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("a text")
    only(check_text, new_case(PREPARE_DATASET="texts"), "pass", "texts: 1 file, 0.006 KB")
    only(check_text, new_case(PREPARE_DATASET="./missing"), "fail", "there is no ./missing")
