"""The start of a run, before torch is imported."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from app.distributed.launch import processes_to_launch
from app.errors import NetworkError, UserError
from app.runs.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Snapshot,
    checkpoint_folder,
    write_checkpoint,
)
from app.runs.checkpoint_state import PendingWork
from app.runs.folder import RunFolder, RunIdentity
from app.settings.settings import Settings
from app.train.command import start_training
from app.train.start import (
    Start,
    find_branch,
    open_same_data,
    open_training_data,
    plan_start,
    run_identity,
)
from tests.inference.hellaswag_questions import FILE
from tests.train.conftest import TinySettings
from tests.train.processes import CHECKOUT
from tests.train.tiny_model import checkpoint_state

# An empty package is torch here: compiling the real one takes seconds.
IMPORT = """
import sys
from pathlib import Path
from app.train.command import keep_bytecode
keep_bytecode(Path("cache"))
import torch, subprocess
subprocess.run([sys.executable, "-c", "import torch.part"], check=True)
"""


def bytecode(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in folder.rglob("*.pyc") if "torch" in path.parts}


@pytest.mark.parametrize("has_bytecode", (False, True))
def test_bytecode_is_kept_for_the_next_start_if_torch_has_none(
    tmp_path: Path, *, has_bytecode: bool
) -> None:
    torch = tmp_path / "packages" / "torch"
    torch.mkdir(parents=True)
    for name in ("__init__.py", "part.py"):
        (torch / name).touch()
    if has_bytecode:
        subprocess.run([sys.executable, "-m", "compileall", "-q", torch], check=True)
    before = bytecode(torch)
    variables = {
        "PYTHONPATH": f"{torch.parent}{os.pathsep}{CHECKOUT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", IMPORT]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, check=True)
    assert bytecode(tmp_path / "cache") == (set() if has_bytecode else {"__init__", "part"})
    assert bytecode(torch) == before


@pytest.mark.parametrize(("requested", "expected"), (("auto", 1), (1, 1), (3, 3)))
def test_a_cpu_trains_in_one_process_unless_more_are_requested(
    requested: int | Literal["auto"], expected: int
) -> None:
    assert processes_to_launch(requested, "cpu") == expected


def test_a_process_of_a_launcher_launches_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert processes_to_launch(3, "auto") == 1


def test_apples_gpu_is_for_one_process() -> None:
    assert processes_to_launch("auto", "mps") == processes_to_launch(1, "mps") == 1
    with pytest.raises(UserError, match="TRAIN_PROCESSES=2, but only one process can train") as it:
        processes_to_launch(2, "mps")
    assert it.value.fix == "set TRAIN_PROCESSES=auto, or TRAIN_DEVICE=cpu"


def save_without_tensors(
    settings: Settings,
    step: int,
    pending: PendingWork,
    cooldown_start: int | None = None,
    planned_steps: int | None = None,
) -> None:
    """Write a checkpoint of this run whose tensor files are empty."""
    identity = run_identity(settings, open_training_data(settings).fingerprint)
    state = replace(
        checkpoint_state(step, identity=identity.to_json(), pending=pending),
        cooldown_start=cooldown_start,
        settings=settings.public(),
        planned_steps=planned_steps,
    )
    snapshot = Snapshot()
    snapshot.files = {MODEL_FILE: {}, OPTIMIZER_FILE: {}}
    folder = checkpoint_folder(settings.run_dir / "checkpoints", step)
    write_checkpoint(folder, snapshot, state)


def plan(settings: Settings, *, restarted: bool = False) -> Start | None:
    run = RunFolder(settings.run_dir)
    dataset = open_training_data(settings)
    branch = find_branch(settings, dataset.fingerprint)
    return plan_start(settings, dataset, run, branch, restarted=restarted)


@pytest.mark.parametrize(
    ("step", "pending", "max_steps", "message"),
    (
        (None, PendingWork(), 10, "run: new"),
        (4, PendingWork(), 10, "run: continues at step 4"),
        (10, PendingWork(), 12, "run: continues at step 10"),
        (10, PendingWork(samples=True), 10, "run: continues at step 10"),
        (10, PendingWork(), 10, "run is finished: all 10 steps are done"),
        (12, PendingWork(), 10, "run is finished: all 12 steps are done"),
    ),
)
def test_a_run_continues_unless_all_its_steps_are_done(
    tiny: TinySettings,
    capsys: pytest.CaptureFixture[str],
    step: int | None,
    pending: PendingWork,
    max_steps: int,
    message: str,
) -> None:
    settings = tiny(TRAIN_MAX_STEPS=max_steps)
    if step is not None:
        save_without_tensors(settings, step, pending)
    start = plan(settings)
    dataset, decision, *then = capsys.readouterr().out.splitlines()
    assert re.search(r"text: \d,\d{3} training tokens \(\d\.\d\d epochs in 1\d steps\), ", dataset)
    assert decision.endswith(message)
    assert (start is None) == ("finished" in message) == bool(then)
    if start is not None:
        assert (start.checkpoint.step if start.checkpoint else None) == step


@pytest.mark.parametrize(
    ("change", "difference"),
    (
        ({"MODEL_EMBD_SIZE": 32}, "embd_size was 16 and is now 32"),
        ({"TRAIN_TOKENS_PER_STEP": 512}, "tokens_per_step was 256 and is now 512"),
        ({"TRAIN_SEED": 1, "TRAIN_SHUFFLE": "false"}, "seed was 0 and is now 1"),
        ({"TRAIN_OPTIMIZER": "adamw"}, "optimizer was 'muon' and is now 'adamw'"),
        ({"MODEL_ACTIVATION": "gelu_new"}, "activation was 'gelu' and is now 'gelu_new'"),
    ),
)
def test_another_model_or_order_of_the_data_is_another_run(
    tiny: TinySettings, change: dict[str, object], difference: str
) -> None:
    save_without_tensors(tiny(), 4, PendingWork())
    with pytest.raises(UserError, match=difference):
        plan(tiny(**change))


def test_a_run_may_continue_with_another_schedule_and_other_intervals(tiny: TinySettings) -> None:
    save_without_tensors(tiny(), 4, PendingWork())
    start = plan(tiny(TRAIN_LEARNING_RATE=1e-4, TRAIN_VAL_EVERY=1, TRAIN_MICRO_BATCH_SIZE=8))
    assert start is not None
    assert start.checkpoint is not None


def test_hellaswag_is_read_if_it_is_to_be_measured(tiny: TinySettings) -> None:
    for every, count in ((0, 0), (3, 8)):
        start = plan(tiny(TRAIN_HELLASWAG_EVERY=every, TRAIN_HELLASWAG_FILE=FILE))
        assert start is not None
        assert len(start.questions) == count


def test_hellaswag_that_cannot_be_downloaded_ends_the_start(
    tiny: TinySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    settings = tiny(TRAIN_HELLASWAG_EVERY=3)
    with pytest.raises(NetworkError, match="questions could not be downloaded") as caught:
        plan(settings)
    assert str(settings.general.data_dir / "cache" / "hellaswag_val.jsonl") in caught.value.fix


def test_restarted_processes_continue_a_run_that_was_to_be_new(tiny: TinySettings) -> None:
    settings = tiny(TRAIN_RESUME="never")
    save_without_tensors(settings, 4, PendingWork())
    with pytest.raises(UserError, match="exists, with 4 steps"):
        plan(settings)
    start = plan(settings, restarted=True)
    assert start is not None
    assert start.checkpoint is not None


def test_a_run_is_warned_about_once_it_matters(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that continues is not told again what it cannot change; nor are restarted processes."""
    changes = {"MODEL_EMBD_SIZE": 128, "TRAIN_MAX_STEPS": 150, "TRAIN_VAL_EVERY": 0}
    plan(tiny(**changes))
    read, memorize = capsys.readouterr().err.splitlines()
    assert read.startswith("warning: 150 steps read the 6,000 tokens of text 6.4 times; ")
    assert memorize.startswith(
        "warning: 393k weights in the model's blocks will memorize the 6,000 "
    )
    save_without_tensors(tiny(**changes), 4, PendingWork())
    plan(tiny(**changes), restarted=True)
    assert capsys.readouterr().err == ""
    plan(tiny(**changes))
    assert capsys.readouterr().err == f"{read}\n"
    # As soon as its steps are few enough, nothing is left to say.
    plan(tiny(**changes | {"TRAIN_MAX_STEPS": 93}))
    assert capsys.readouterr().err == ""


WSD = {"TRAIN_LR_SCHEDULE": "wsd", "TRAIN_COOLDOWN": 0.5, "TRAIN_LEARNING_RATE": 0.02}


@pytest.mark.parametrize(
    ("step", "changes", "rate"),
    (
        (5, {"TRAIN_MAX_STEPS": 20}, None),
        (6, {"TRAIN_MAX_STEPS": 10}, None),
        (6, {"TRAIN_MAX_STEPS": 20}, "2.00e-02"),
        # The longer schedule cools down already, but from a higher rate.
        (8, {"TRAIN_MAX_STEPS": 14}, "1.49e-02"),
        (8, {"TRAIN_COOLDOWN": 0.1}, "2.00e-02"),
        (8, {"TRAIN_LR_SCHEDULE": "constant"}, "2.00e-02"),
    ),
)
def test_a_learning_rate_that_jumps_back_up_after_a_cooldown_is_told(
    tiny: TinySettings,
    capsys: pytest.CaptureFixture[str],
    step: int,
    changes: dict[str, object],
    rate: str | None,
) -> None:
    save_without_tensors(tiny(**WSD), step, PendingWork(), cooldown_start=5)
    plan(tiny(**WSD | changes))
    warning = (
        "warning: the run has been cooling down since step 5, and its learning rate jumps back up "
        f"to {rate}; TRAIN_BRANCH_FROM begins a new run from before the cool-down "
        "(docs/recipes.md)\n"
    )
    assert capsys.readouterr().err == (warning if rate else "")


def test_only_pending_work_after_the_last_step_has_no_learning_rate(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    save_without_tensors(tiny(**WSD), 10, PendingWork(samples=True), cooldown_start=5)
    assert plan(tiny(**WSD | {"TRAIN_COOLDOWN": 0})) is not None
    assert capsys.readouterr().err == ""


def test_a_run_that_keeps_its_time_limits_plan_goes_on_cooling_down(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = tiny(**WSD, TRAIN_MAX_STEPS=1000, TRAIN_MAX_HOURS=1)
    save_without_tensors(limited, 6, PendingWork(), cooldown_start=5, planned_steps=10)
    plan(limited)
    assert capsys.readouterr().err == ""
    # More time is a new plan, of at most so many steps.
    plan(tiny(**WSD, TRAIN_MAX_STEPS=1000, TRAIN_MAX_HOURS=2))
    assert "its learning rate jumps back up to 2.00e-02" in capsys.readouterr().err


def test_a_branch_begins_once_and_says_what_changes(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    save_without_tensors(tiny(), 4, PendingWork())
    settings = tiny(TRAIN_RUN_NAME="new", TRAIN_BRANCH_FROM="run", TRAIN_SEED=1)
    first, new = plan(settings), settings.run_dir
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{new}: a branch of run@4; seed was 0 and is now 1",
        f"{new}: continues at step 4",
    ]
    # The same command again, after a kill.
    assert plan(settings) == first
    assert capsys.readouterr().out.splitlines()[1:] == [f"{new}: continues at step 4"]


def test_a_branch_is_a_new_run(tiny: TinySettings) -> None:
    save_without_tensors(tiny(), 4, PendingWork())
    settings = tiny(TRAIN_RUN_NAME="new", TRAIN_BRANCH_FROM="run", TRAIN_RESUME="never")
    start = plan(settings)
    assert start is not None
    assert start.checkpoint is not None
    with pytest.raises(UserError, match="exists, with 4 steps"):
        plan(settings)


def test_a_rank_refuses_another_data_dir_than_that_of_rank_zero(tiny: TinySettings) -> None:
    settings = tiny()
    identity = run_identity(settings, open_training_data(settings).fingerprint)
    with pytest.raises(UserError, match="run exists on the first machine but not on this one"):
        open_same_data(settings, identity)
    settings.run_dir.mkdir(parents=True)
    assert open_same_data(settings, identity).fingerprint == identity.dataset_fingerprint
    with pytest.raises(UserError, match="differs from the first machine's"):
        open_same_data(settings, RunIdentity("other tokens", {}))


@pytest.mark.parametrize(
    ("changes", "warns"),
    (
        ({"TRAIN_VAL_EVERY": 1}, False),
        ({"TRAIN_VAL_EVERY": 1, "MODEL_CONTEXT_LENGTH": 2048, "TRAIN_TOKENS_PER_STEP": 2048}, True),
        (
            {"TRAIN_VAL_EVERY": 0, "MODEL_CONTEXT_LENGTH": 2048, "TRAIN_TOKENS_PER_STEP": 2048},
            False,
        ),
    ),
)
def test_a_run_that_will_have_no_held_out_loss_is_told(
    tiny: TinySettings,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    *,
    warns: bool,
) -> None:
    plan(tiny(**changes))
    error = capsys.readouterr().err
    assert error.count("\n") == warns
    if warns:
        assert error.startswith("warning: no held-out loss will be measured: ")
        assert error.endswith("with PREPARE_VAL_TOKENS=2048 or more\n")


def test_several_processes_are_not_started_for_a_finished_run(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny(TRAIN_MAX_STEPS=10, TRAIN_PROCESSES=3)
    save_without_tensors(settings, 10, PendingWork())
    # Processes would end with ExitWithCode.
    start_training(settings)
    *_, finished, then = capsys.readouterr().out.splitlines()
    assert finished.endswith("run is finished: all 10 steps are done")
    assert then.startswith("next: ")
