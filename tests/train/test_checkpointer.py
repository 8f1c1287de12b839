"""Checkpoints that are saved in the background, of a tiny model, on a disk that may be full."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.data.dataset import ShardVerification
from app.distributed.world import World
from app.errors import UserError
from app.runs.checkpoint import Checkpoint, open_checkpoint
from app.runs.checkpoints import checkpoint_steps
from app.runs.folder import RunFolder
from app.runs.metrics import StepRecord
from app.runs.run_logger import RunLogger
from app.train.checkpointer import Checkpointer
from tests.test_files import file_size_limit
from tests.train.conftest import HeldBack
from tests.train.tiny_model import adamw, checkpoint_state, new_model, train_one_step

Lines = list[str]


class Saving:
    """A run of a tiny model and the checkpointer that saves it."""

    def __init__(
        self, folder: Path, keep: int = 9, verification: ShardVerification | None = None
    ) -> None:
        folder.mkdir()
        self.run, self.lines = RunFolder(folder), Lines()
        self.log = RunLogger(self.run, None, {}, self.lines.append)
        self.model = new_model()
        self.optimizers = adamw(self.model)
        train_one_step(self.model, self.optimizers)
        self.checkpointer = Checkpointer(
            self.run, keep, World(), self.log, verification, self.lines.append
        )

    def save(
        self,
        step: int,
        *,
        val_loss: float | None = None,
        replace: bool = False,
        max_verification_seconds: float | None = None,
    ) -> None:
        state = checkpoint_state(step, val_loss=val_loss)
        self.checkpointer.save(
            state,
            self.model,
            self.optimizers,
            replace=replace,
            max_verification_seconds=max_verification_seconds,
        )

    def saved_steps(self) -> list[int]:
        return checkpoint_steps(self.run.checkpoints)

    def checkpoint(self, step: int) -> Checkpoint:
        return open_checkpoint(self.run.checkpoints / f"step-{step:06d}")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Saving]:
    return lambda **options: Saving(tmp_path / "run", **options)


def test_a_save_has_the_weights_of_its_moment_and_waits_for_the_one_before(
    start: Callable[..., Saving],
) -> None:
    saving = start()
    weights = saving.model.transformer.wte.weight
    before = weights.detach().clone()
    with saving.checkpointer:
        saving.save(1)
        with torch.no_grad():
            weights.add_(1.0)
        saving.save(2)
        assert 1 in saving.saved_steps()
        assert saving.lines == [f"after 1 steps: saved {saving.run.checkpoints / 'step-000001'}"]
    for step, expected in ((1, before), (2, before + 1.0)):
        checkpoint = saving.checkpoint(step)
        checkpoint.verify()
        torch.testing.assert_close(
            checkpoint.tensors()["model"]["transformer.wte.weight"], expected, rtol=0, atol=0
        )


def test_a_state_has_the_lengths_of_the_metrics_and_samples_before_it(
    start: Callable[..., Saving],
) -> None:
    saving = start()
    saving.log.add_step(StepRecord(0, 32, 4.0))
    saving.log.add_samples(1, ["text"])
    with saving.checkpointer:
        saving.save(1)
        saving.log.add_step(StepRecord(1, 64, 3.0))
    state = saving.checkpoint(1).state
    assert (state.metrics_lines, state.samples_bytes) == (1, saving.run.samples.stat().st_size)


def test_poll_reports_a_save_that_has_ended(start: Callable[..., Saving]) -> None:
    saving = start()
    saving.checkpointer.poll()
    assert saving.lines == []
    with saving.checkpointer:
        saving.save(1)
        deadline = time.monotonic() + 300
        while not saving.lines and time.monotonic() < deadline:
            saving.checkpointer.poll()
    assert [line.partition(":")[0] for line in saving.lines] == ["after 1 steps"]


def test_a_checkpoint_of_the_same_step_stays_unless_it_is_to_be_replaced(
    start: Callable[..., Saving],
) -> None:
    saving = start()
    with saving.checkpointer:
        for val_loss, replace, expected in ((3.0, False, 3.0), (2.0, False, 3.0), (1.0, True, 1.0)):
            saving.save(1, val_loss=val_loss, replace=replace)
            saving.checkpointer.wait()
            assert saving.checkpoint(1).state.val_loss == expected


def test_a_save_waits_for_the_hashes_of_the_shards(
    start: Callable[..., Saving], held_back: HeldBack
) -> None:
    saving = start(verification=ShardVerification(held_back.dataset))
    with saving.checkpointer:
        assert not saving.checkpointer.may_save
        saving.checkpointer.poll()
        saving.save(1, max_verification_seconds=0.01)
        saving.checkpointer.wait()
        assert saving.lines == ["warning: not saved: the shards are still being verified"]
        assert saving.saved_steps() == []
        held_back.feed()
        saving.save(2)
        assert saving.checkpointer.may_save
    assert saving.saved_steps() == [2]


def test_nothing_is_saved_of_a_run_on_a_damaged_shard(
    start: Callable[..., Saving], held_back: HeldBack
) -> None:
    saving = start(verification=ShardVerification(held_back.dataset))
    held_back.feed(damaged=True)
    with saving.checkpointer:
        with pytest.raises(UserError, match=f"shard {held_back.pipe} is damaged"):
            saving.save(1)
        with pytest.raises(UserError, match=f"shard {held_back.pipe} is damaged"):
            saving.checkpointer.poll()
    assert saving.saved_steps() == []


def test_the_last_checkpoints_and_the_best_are_kept(start: Callable[..., Saving]) -> None:
    saving = start(keep=2)
    with saving.checkpointer:
        for step, val_loss in enumerate((5.0, 3.0, 4.0, None, 6.0, 4.0)):
            saving.save(step, val_loss=val_loss)
    assert saving.saved_steps() == [1, 4, 5]


def test_a_save_that_fails_is_reported_and_the_next_one_succeeds(
    start: Callable[..., Saving],
) -> None:
    saving = start()
    with saving.checkpointer:
        saving.save(1)
        saving.checkpointer.wait()
        with file_size_limit(1000):
            saving.save(2)
            with pytest.raises(OSError, match=r"File too large.*\.safetensors"):
                saving.checkpointer.wait()
        warning = saving.lines[-1]
        assert warning.startswith("warning: checkpoint not saved: this file is too large")
        assert warning.endswith("; training continues, and tries again at the next checkpoint")
        assert [path.name for path in saving.run.checkpoints.iterdir()] == ["step-000001"]
        saving.save(3)
        saving.checkpointer.wait()
    assert saving.saved_steps() == [1, 3]
    saving.checkpoint(3).verify()


def test_metrics_that_the_disk_refuses_prevent_a_save(start: Callable[..., Saving]) -> None:
    saving = start()
    with saving.checkpointer, file_size_limit(10):
        saving.log.add_step(StepRecord(0, 32, 4.0))
        saving.save(1)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            saving.checkpointer.wait()
    assert not saving.run.checkpoints.exists()
