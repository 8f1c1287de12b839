"""What follows the steps of a small run on real text: intervals, stops, and shards being hashed."""

import signal
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

import pytest

from app.data.dataset import Dataset
from app.distributed.world import World
from app.errors import ExitCode, Stopped, UserError
from app.hardware.device import select_device
from app.runs.checkpoint_state import PendingWork
from app.runs.checkpoints import checkpoint_steps, latest_checkpoint
from app.runs.folder import RunFolder
from app.runs.metrics import read_metrics
from app.runs.samples import read_samples
from app.settings.settings import Settings
from app.settings.sources import load_settings
from app.train.start import find_branch, open_training_data, plan_start
from app.train.stopping import StopRequest, stop_on_signals
from app.train.trainer import Trainer
from tests.inference.hellaswag_questions import FILE
from tests.train.conftest import HeldBack, TinySettings
from tests.train.processes import TINY, assert_same_run

SMALL = {
    "MODEL_CONTEXT_LENGTH": 16,
    "MODEL_NUM_LAYERS": 1,
    "MODEL_EMBD_SIZE": 8,
    "MODEL_NUM_HEADS": 1,
    "TRAIN_TOKENS_PER_STEP": 64,
    "TRAIN_MICRO_BATCH_SIZE": 2,
    "TRAIN_MAX_STEPS": 4,
    "TRAIN_VAL_TOKENS": 96,
    "TRAIN_VAL_EVERY": 2,
    "TRAIN_HELLASWAG_EVERY": 2,
    "TRAIN_HELLASWAG_FILE": FILE,
    "TRAIN_SAMPLE_EVERY": 2,
    "TRAIN_CHECKPOINT_EVERY": 3,
    "TRAIN_KEEP_CHECKPOINTS": 9,
    "SAMPLE_MAX_TOKENS": 4,
}
LAST_STEP = 4


@dataclass
class StopAtPoll(StopRequest):
    """A signal that comes just before the trainer asks for the poll_number-th time.

    Only after the first step: before, a signal ends the process at once.
    """

    poll_number: int = 0
    polls: int = 0

    @property
    def requested(self) -> bool:
        if self.has_progress:
            self.polls += 1
            if self.polls == self.poll_number:
                self.exit_code = ExitCode.SIGTERM
        return self.exit_code is not None


def build_trainer(
    settings: Settings, stop: StopRequest | None = None, dataset: Dataset | None = None
) -> Trainer:
    dataset = dataset or open_training_data(settings)
    run = RunFolder(settings.run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    branch = find_branch(settings, dataset.fingerprint)
    start = plan_start(settings, dataset, run, branch)
    assert start is not None
    assert settings.train.micro_batch_size != "auto"
    return Trainer(
        settings,
        start,
        settings.train.micro_batch_size,
        dataset,
        run,
        select_device("cpu", "float32", "auto"),
        World(),
        stop or StopRequest(),
    )


def wait_for_verification(trainer: Trainer) -> None:
    """Wait until the shards are hashed: otherwise a save may come a step later."""
    verification = trainer.checkpointer._verification
    assert verification is not None
    assert verification.wait()


@pytest.fixture
def small(tiny: TinySettings) -> TinySettings:
    return lambda **changes: tiny(**SMALL | changes)


@pytest.mark.parametrize(
    ("val_every", "hellaswag_every", "sample_every", "checkpoint_every", "done"),
    (
        (0, 0, 0, 0, ([], [], [], [4])),
        (1, 1, 1, 1, ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4])),
        (2, 3, 3, 2, ([2, 4], [3, 4], [3, 4], [2, 4])),
        (3, 0, 2, 3, ([3, 4], [], [2, 4], [3, 4])),
        (0, 2, 9, 9, ([], [2, 4], [4], [4])),
    ),
)
def test_intervals_decide_what_follows_a_step(
    small: TinySettings,
    val_every: int,
    hellaswag_every: int,
    sample_every: int,
    checkpoint_every: int,
    done: tuple[list[int], list[int], list[int], list[int]],
) -> None:
    evaluated, answered, sampled, saved = done
    settings = small(
        TRAIN_VAL_EVERY=val_every,
        TRAIN_HELLASWAG_EVERY=hellaswag_every,
        TRAIN_SAMPLE_EVERY=sample_every,
        TRAIN_CHECKPOINT_EVERY=checkpoint_every,
    )
    trainer = build_trainer(settings)
    wait_for_verification(trainer)
    trainer.fit()
    run = RunFolder(settings.run_dir)
    records = read_metrics(run.metrics)
    assert [record.step for record in records] == [0, 1, 2, 3]
    assert [record.step + 1 for record in records if record.val_loss is not None] == evaluated
    assert [record.step + 1 for record in records if record.hellaswag is not None] == answered
    assert [record.step + 1 for record in records if record.hellaswag_ms] == answered
    assert [step for step, _ in read_samples(run.samples)] == sampled
    assert checkpoint_steps(run.checkpoints) == saved
    last = latest_checkpoint(run.path).state
    assert (last.val_loss is not None) == (4 in evaluated)
    assert last.val_loss == records[-1].val_loss
    assert (last.sequences_consumed, last.metrics_lines) == (16, 4)


@pytest.fixture(scope="module")
def unbroken_small(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that was never stopped."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "text").symlink_to(text_shards)
    flags = TINY | {name: str(value) for name, value in SMALL.items()}
    settings = load_settings(flags | {"DATA_DIR": str(data_dir)}, "train")
    build_trainer(settings).fit()
    return settings.run_dir


@pytest.mark.parametrize(
    ("poll_number", "steps", "pending"),
    (
        pytest.param(1, 1, None, id="before the first micro-batch of a step"),
        pytest.param(3, 1, None, id="at the vote before the last micro-batch"),
        pytest.param(4, 2, "record", id="before the first batch of the held-out text"),
        pytest.param(6, 2, "record", id="before its last batch"),
        pytest.param(7, 2, "record", id="at the vote after its last batch"),
        pytest.param(8, 2, "record", id="before the first questions of HellaSwag"),
        pytest.param(15, 2, "record", id="before the last ones"),
        pytest.param(16, 2, "record", id="at the vote after them"),
        pytest.param(17, 2, "samples", id="before the prompt of a sample"),
        pytest.param(21, 2, "samples", id="after the last token of a sample"),
        pytest.param(25, 3, None, id="before a save"),
        pytest.param(30, 4, "record", id="in the evaluation after the last step"),
        pytest.param(35, 4, "record", id="in HellaSwag after the last step"),
        pytest.param(44, 4, "samples", id="in the sample after the last step"),
    ),
)
def test_a_stopped_run_that_continues_equals_one_that_was_never_stopped(
    small: TinySettings,
    unbroken_small: Path,
    poll_number: int,
    steps: int,
    pending: str | None,
) -> None:
    settings = small()
    with pytest.raises(Stopped, match=f"step-{steps:06d}; the same command continues") as stopped:
        build_trainer(settings, StopAtPoll(poll_number=poll_number)).fit()
    assert stopped.value.exit_code == ExitCode.SIGTERM
    state = latest_checkpoint(settings.run_dir).state
    assert state.step == steps
    assert state.pending.samples == (pending == "samples")
    assert (state.pending.record is not None) == (pending == "record")
    assert state.metrics_lines == steps - (pending == "record")

    build_trainer(settings).fit()
    assert_same_run(settings.run_dir, unbroken_small, LAST_STEP)
    states = [latest_checkpoint(run).state for run in (settings.run_dir, unbroken_small)]
    assert states[0].pending == states[1].pending == PendingWork()
    assert states[0].val_loss == states[1].val_loss is not None


@pytest.mark.parametrize("poll_number", (4, 8, 16))
def test_a_branch_of_a_stopped_run_does_what_the_stop_left(
    small: TinySettings, unbroken_small: Path, poll_number: int
) -> None:
    with pytest.raises(Stopped):
        build_trainer(small(), StopAtPoll(poll_number=poll_number)).fit()
    branch = small(TRAIN_RUN_NAME="branch", TRAIN_BRANCH_FROM="run")
    build_trainer(branch).fit()
    assert_same_run(branch.run_dir, unbroken_small, LAST_STEP)


def test_training_goes_on_while_shards_are_hashed_and_saves_once_they_are(
    small: TinySettings, held_back: HeldBack
) -> None:
    settings = small(TRAIN_CHECKPOINT_EVERY=1)
    trainer = build_trainer(settings, dataset=held_back.dataset)
    saved = trainer.run.checkpoints
    with closing(trainer.console), trainer.checkpointer, trainer.loader:
        for result in trainer.steps():
            trainer.after_step(result)
            trainer.checkpointer.wait()
            assert checkpoint_steps(saved) == ([] if result.step < 2 else [3, 4][: result.step - 1])
            if result.step == 1:
                held_back.feed()
                wait_for_verification(trainer)


def test_the_checkpoint_before_a_cooldown_is_saved_at_its_step_and_kept(
    small: TinySettings, held_back: HeldBack
) -> None:
    wsd = {"TRAIN_LR_SCHEDULE": "wsd", "TRAIN_COOLDOWN": 0.75, "TRAIN_WARMUP_STEPS": "auto"}
    settings = small(**wsd, TRAIN_CHECKPOINT_EVERY=0, TRAIN_KEEP_CHECKPOINTS=1)
    trainer = build_trainer(settings, dataset=held_back.dataset)
    # It waits for the hashes of the shards.
    feeding = Timer(0.5, held_back.feed)
    feeding.start()
    trainer.fit()
    feeding.join()
    assert checkpoint_steps(trainer.run.checkpoints) == [1, 4]
    state = latest_checkpoint(settings.run_dir, 1).state
    assert (state.cooldown_start, state.warmup_steps) == (1, 0)
    # A longer run would begin with a warm-up of 2 steps.
    longer = build_trainer(small(**wsd, TRAIN_MAX_STEPS=200))
    assert longer.state.for_checkpoint().warmup_steps == longer.state.schedule.warmup_steps == 0


def test_a_damaged_shard_ends_the_run_before_anything_is_saved(
    small: TinySettings, held_back: HeldBack
) -> None:
    settings = small(TRAIN_CHECKPOINT_EVERY=0)
    trainer = build_trainer(settings, dataset=held_back.dataset)
    held_back.feed(damaged=True)
    wait_for_verification(trainer)
    with pytest.raises(UserError, match=f"shard {held_back.pipe} is damaged"):
        trainer.fit()
    assert trainer.state.steps_completed == 1
    assert checkpoint_steps(trainer.run.checkpoints) == []


def test_a_signal_after_the_last_save_announces_no_other(
    small: TinySettings, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals() as stop:
        build_trainer(small(), stop).fit()
        signal.raise_signal(signal.SIGTERM)
    out, err = capfd.readouterr()
    assert "Average tokens/sec" in out
    assert "stopping" not in out + err
