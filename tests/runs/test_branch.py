"""A new run that begins with a checkpoint of another one: with which, and with what else."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from errno import EPERM
from pathlib import Path
from threading import Thread

import pytest
import torch

from app.errors import UserError
from app.files import read_json
from app.runs.branch import begin_branch, find_branch_point, find_checkpoint, origin_of
from app.runs.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    TENSOR_FILES,
    Checkpoint,
    Snapshot,
    checkpoint_folder,
    open_checkpoint,
    write_checkpoint,
)
from app.runs.checkpoint_state import STATE_FILE
from app.runs.checkpoints import checkpoint_steps
from app.runs.folder import RunFolder, RunIdentity
from app.runs.samples import format_samples
from tests.lacking import lacking
from tests.train.tiny_model import checkpoint_state

Settings = Mapping[str, object]
SETTINGS = {
    "architecture": "gpt2",
    "num_layers": 2,
    "tokens_per_step": 256,
    "optimizer": "muon",
    "shuffle": True,
}
BEST = {"train": {"use_best": True}}
SAMPLES = format_samples(4, ["a text"])

# Begins the run `new` with long@4, again and again, and dies at the first, second, … name that it
# makes, opens or changes.
KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from app.runs.branch import begin_branch, find_branch_point
from app.runs.checkpoints import checkpoint_steps
from app.runs.folder import RunFolder, RunIdentity
new, identity = RunFolder(Path("new")), RunIdentity("other", {settings}, "long@4")
for count in range(10**6):
    child = os.fork()
    if not child:
        point, events = find_branch_point(new, identity, 10), 0
        with new.lock():
            def die(event, _arguments):
                global events
                if event in ("open", "os.mkdir", "os.link", "os.rename", "os.remove"):
                    events += 1
                    if events > count:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(die)
            begin_branch(new, identity, point)
            os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    steps = checkpoint_steps(new.checkpoints)
    print(killed, steps, len(new.metrics.read_bytes()) if steps else 0, flush=True)
    if steps:
        shutil.rmtree(new.path)
    if not killed:
        break
"""


def line(step: int) -> str:
    return f'{{"step": {step}, "tokens": {256 * (step + 1)}, "train_loss": 4.5, "mfu": null}}\n'


def make_source(folder: Path, steps: Sequence[int], cooldown_start: int | None = None) -> RunFolder:
    """A run of 10 steps with checkpoints after some of them, each of two small tensors."""
    run, snapshot = RunFolder(folder), Snapshot()
    for step in steps:
        snapshot.files = {file: {"it": torch.full((64,), float(step))} for file in TENSOR_FILES}
        state = replace(
            checkpoint_state(step, identity={"dataset_fingerprint": "tokens", **SETTINGS}),
            metrics_lines=step,
            samples_bytes=len(SAMPLES) if step < 8 else 2 * len(SAMPLES),
            warmup_steps=3,
            cooldown_start=cooldown_start,
        )
        write_checkpoint(checkpoint_folder(run.checkpoints, step), snapshot, state)
    run.metrics.write_text("".join(map(line, range(10))))
    run.samples.write_bytes(2 * SAMPLES)
    return run


@pytest.fixture
def long(tmp_path: Path) -> RunFolder:
    return make_source(tmp_path / "long", (4, 8, 10))


def find(
    folder: Path, branch_from: str, fingerprint: str = "tokens", changes: Settings | None = None
) -> Checkpoint:
    """Find where the run `new` beside other runs is to begin; it is to have 20 steps."""
    identity = RunIdentity(fingerprint, {**SETTINGS, **(changes or {})}, branch_from)
    point = find_branch_point(RunFolder(folder / "new"), identity, 20)
    assert point is not None
    return point


@pytest.mark.parametrize(
    ("cooldown_start", "branch_from", "origin"),
    (
        (None, "long", "long@10"),
        (9, "long", "long@8"),
        (8, "long", "long@8"),
        (7, "long", "long@4"),
        (10, "long", "long@10"),
        (7, "long@10", "long@10"),
        (None, "long@4", "long@4"),
    ),
)
def test_without_a_step_it_is_the_last_checkpoint_before_the_cooldown(
    tmp_path: Path, cooldown_start: int | None, branch_from: str, origin: str
) -> None:
    make_source(tmp_path / "long", (4, 8, 10), cooldown_start)
    point = find(tmp_path, branch_from)
    assert origin_of(point) == origin
    assert not (tmp_path / "new").exists()


def test_a_time_limit_that_moves_the_cooldown_forward_leaves_its_checkpoint_a_beginning(
    tmp_path: Path,
) -> None:
    long = make_source(tmp_path / "long", (4, 8, 10), 7)
    folder = checkpoint_folder(long.checkpoints, 8)
    replace(open_checkpoint(folder).state, cooldown_start=8).write(folder)
    assert find(tmp_path, "long").step == 8


@pytest.mark.parametrize(("cooldown_start", "step"), ((None, 10), (9, 8)))
def test_a_branch_goes_on_from_the_end_and_initial_weights_are_the_best(
    tmp_path: Path, cooldown_start: int | None, step: int
) -> None:
    long, snapshot = make_source(tmp_path / "long", (4, 8, 10), cooldown_start), Snapshot()
    snapshot.files = {file: {} for file in TENSOR_FILES}
    for saved, loss in ((4, 3.0), (8, 3.5), (10, 4.0)):
        folder = checkpoint_folder(long.checkpoints, saved)
        state = replace(open_checkpoint(folder).state, val_loss=loss, settings=BEST)
        write_checkpoint(folder, snapshot, state)
    assert find(tmp_path, "long").step == step
    assert find_checkpoint(long, None, "TRAIN_INIT_FROM", (MODEL_FILE,)).step == 4


def test_a_branch_gets_the_checkpoint_and_all_that_was_written_until_then(
    long: RunFolder, tmp_path: Path
) -> None:
    new, identity = RunFolder(tmp_path / "new"), RunIdentity("others", SETTINGS | {"seed": 1})
    begin_branch(new, identity, find(tmp_path, "long@8"))
    checkpoint = open_checkpoint(checkpoint_folder(new.checkpoints, 8))
    checkpoint.verify()
    source = open_checkpoint(checkpoint_folder(long.checkpoints, 8))
    for file in TENSOR_FILES:
        assert (checkpoint.folder / file).samefile(source.folder / file)
    expected = replace(source.state, identity=identity.to_json(), origin="long@8")
    assert checkpoint.state == expected
    assert new.metrics.read_text() == "".join(map(line, range(8)))
    assert new.samples.read_bytes() == 2 * SAMPLES
    assert checkpoint_steps(new.checkpoints) == [8]
    # The other run may delete its own.
    shutil.rmtree(long.path)
    checkpoint.verify()


def test_data_and_their_order_may_change(long: RunFolder, tmp_path: Path) -> None:
    assert find(tmp_path, "long", "others", {"seed": 1, "shuffle": False}).step == 10


@pytest.mark.parametrize(
    ("branch_from", "changes", "problem", "fix"),
    (
        ("other", {}, "there is no run {}/other", "set TRAIN_BRANCH_FROM to one of: long"),
        ("long@5", {}, "{}/long has no checkpoint of step 5", "choose one of: 4, 8, 10"),
        (
            "new@4",
            {},
            "TRAIN_BRANCH_FROM=new@4: a run cannot branch from itself",
            "set TRAIN_RUN_NAME to the name of the new run",
        ),
        (
            "long",
            {"num_layers": 3, "tokens_per_step": 512, "optimizer": "adamw", "shuffle": False},
            "long@10 cannot be continued with these settings: num_layers was 2 and is now 3; "
            "tokens_per_step was 256 and is now 512; optimizer was 'muon' and is now 'adamw'",
            "set these back, or leave TRAIN_BRANCH_FROM out",
        ),
    ),
)
def test_what_cannot_be_a_beginning_is_refused_and_nothing_is_made(
    long: RunFolder,
    tmp_path: Path,
    branch_from: str,
    changes: Settings,
    problem: str,
    fix: str,
) -> None:
    with pytest.raises(UserError) as refused:
        find(tmp_path, branch_from, changes=changes)
    assert (refused.value.problem, refused.value.fix) == (problem.format(tmp_path), fix)
    assert list(tmp_path.iterdir()) == [long.path]


def test_a_step_after_which_nothing_is_left_to_do_is_refused(
    long: RunFolder, tmp_path: Path
) -> None:
    identity = RunIdentity("tokens", SETTINGS, "long@8")
    with pytest.raises(UserError, match="nothing is left to do after long@8: TRAIN_MAX_STEPS is 8"):
        find_branch_point(RunFolder(tmp_path / "new"), identity, 8)
    assert find_branch_point(RunFolder(tmp_path / "new"), identity, 9) is not None


@pytest.mark.parametrize(
    ("file", "problem"),
    (
        (f"checkpoints/step-000008/{MODEL_FILE}", "is damaged: its SHA-256 does not match"),
        (f"checkpoints/step-000008/{OPTIMIZER_FILE}", "is damaged: its SHA-256 does not match"),
        (f"checkpoints/step-000008/{STATE_FILE}", "is not valid JSON"),
        ("metrics.jsonl", "does not have a line for each of the 8 steps"),
    ),
)
def test_a_damaged_beginning_is_refused(
    long: RunFolder, tmp_path: Path, file: str, problem: str
) -> None:
    os.truncate(long.path / file, 100)
    with pytest.raises(UserError, match=problem) as refused:
        find(tmp_path, "long@8")
    assert refused.value.fix == (
        "restore that file from a backup, or set TRAIN_BRANCH_FROM to another RUN@STEP"
    )


def test_a_run_without_a_checkpoint_from_before_its_cooldown_is_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "long", (8, 10), 7)
    with pytest.raises(UserError, match=r"before its cool-down, after 7 steps\n.*one of: 8, 10"):
        find(tmp_path, "long")


def test_a_branch_is_made_once(long: RunFolder, tmp_path: Path) -> None:
    new, identity = RunFolder(tmp_path / "new"), RunIdentity("tokens", SETTINGS, "long@8")
    begin_branch(new, identity, find(tmp_path, "long@8"))
    shutil.rmtree(long.path)
    assert find_branch_point(new, identity, 20) is None
    checkpoint = new.resume_from(identity, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 8
    assert new.resume_from(RunIdentity("tokens", SETTINGS, "long"), "auto") is not None
    assert new.resume_from(RunIdentity("tokens", SETTINGS), "auto") is not None
    for other in ("long@4", "other", "other@8"):
        with pytest.raises(UserError, match=f"as a branch of long@8, not with {other}\n"):
            new.resume_from(RunIdentity("tokens", SETTINGS, other), "auto")


def test_a_run_that_has_begun_otherwise_is_no_branch(long: RunFolder, tmp_path: Path) -> None:
    other = make_source(tmp_path / "other", (4,))
    identity = RunIdentity("tokens", SETTINGS, "long")
    with pytest.raises(UserError, match="other has begun without TRAIN_BRANCH_FROM, not with long"):
        other.resume_from(identity, "auto")
    # Nor is one that was killed before its first checkpoint: its metrics are kept.
    shutil.rmtree(other.checkpoints)
    other.settings.write_text("{}")
    with pytest.raises(UserError, match="other has begun without TRAIN_BRANCH_FROM, not with long"):
        find_branch_point(other, identity, 20)


def test_a_checkpoint_that_the_other_run_deletes_meanwhile_is_not_taken(
    long: RunFolder, tmp_path: Path
) -> None:
    point = find(tmp_path, "long@8")
    shutil.rmtree(point.folder)
    new = RunFolder(tmp_path / "new")
    with pytest.raises(UserError, match=f"{MODEL_FILE} has been deleted by the run that it be"):
        begin_branch(new, RunIdentity("tokens", SETTINGS), point)
    assert list(new.checkpoints.iterdir()) == []


def test_the_next_checkpoint_is_taken_if_the_other_run_deletes_one_while_it_is_read(
    tmp_path: Path,
) -> None:
    long = make_source(tmp_path / "long", (4,))
    later = make_source(tmp_path / "later", (8,))
    model = checkpoint_folder(long.checkpoints, 4) / MODEL_FILE
    model.unlink()
    os.mkfifo(model)

    def save_and_prune() -> None:
        # Opening waits until the other side reads.
        with model.open("wb"):
            (later.checkpoints / "step-000008").rename(long.checkpoints / "step-000008")
            shutil.rmtree(long.checkpoints / "step-000004")

    training = Thread(target=save_and_prune)
    training.start()
    assert origin_of(find(tmp_path, "long")) == "long@8"
    training.join()


def test_files_are_copied_where_there_are_no_hard_links(long: RunFolder, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from app.runs.branch import begin_branch, find_branch_point\n"
        "from app.runs.folder import RunFolder, RunIdentity\n"
        f"new, identity = RunFolder(Path('new')), RunIdentity('tokens', {SETTINGS}, 'long@8')\n"
        "begin_branch(new, identity, find_branch_point(new, identity, 20))"
    )
    environment = os.environ | lacking(tmp_path, link=EPERM)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    copied = open_checkpoint(tmp_path / "new/checkpoints/step-000008")
    copied.verify()
    assert not (copied.folder / MODEL_FILE).samefile(long.checkpoints / "step-000008" / MODEL_FILE)


@pytest.mark.processes
def test_a_kill_at_any_moment_leaves_a_whole_beginning_or_none(
    long: RunFolder, tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLS.replace("{settings}", str(SETTINGS))]
    printed = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    lines = len("".join(map(line, range(4))))
    assert set(printed) == {"True [] 0", f"True [4] {lines}", f"False [4] {lines}"}
    assert printed[-1] == f"False [4] {lines}"
    assert len(printed) > 15
    # What the kills have left behind was no obstacle.
    assert read_json(long.checkpoints / "step-000004" / STATE_FILE, "")["step"] == 4
