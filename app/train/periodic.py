"""The work between steps, at intervals: evaluations, samples and checkpoints."""

from app.data.tokenizer import Tokenizer
from app.inference.text import Sampling, generate_texts
from app.runs.checkpoint_state import PendingWork
from app.runs.metrics import PauseTimer, StepRecord
from app.runs.run_logger import RunLogger
from app.settings.train import TrainSettings
from app.train.checkpointer import Checkpointer
from app.train.console import Console
from app.train.evaluation import Evaluator
from app.train.loop import check_finite
from app.train.state import TrainingState
from app.train.stopping import Interrupted

# A stopped run waits this long for the hashes of the shards: a scheduler will soon kill it.
MAX_VERIFICATION_SECONDS = 60


class PeriodicWork:
    """Evaluates, samples and saves when the intervals are reached. All methods are collective.

    Args:
        sampling: how the samples are generated.
        state: val_loss and pending are written here.
        log: rank 0's logger; None on the other ranks.
    """

    def __init__(
        self,
        cfg: TrainSettings,
        sampling: Sampling,
        state: TrainingState,
        evaluator: Evaluator,
        checkpointer: Checkpointer,
        console: Console,
        log: RunLogger | None,
        pauses: PauseTimer,
    ) -> None:
        self._cfg, self._sampling, self._state, self._evaluator = cfg, sampling, state, evaluator
        self._checkpointer, self._console, self._log = checkpointer, console, log
        self._pauses, self._checkpoint_due = pauses, False

    def after_step(self, record: StepRecord | None) -> None:
        """Evaluate, log, sample and save.

        Args:
            record: the step's record; None if its line has already been written.

        Raises:
            NotFiniteError: the held-out loss is not finite; nothing is saved.
        """
        cfg, state = self._cfg, self._state
        state.pending = PendingWork()
        if record is not None:
            state.val_loss = None
            try:
                measured = self._evaluate()
            except Interrupted:
                state.pending = PendingWork(record=record.plus(self._pauses.take()))
                return
            if self._log:
                self._log.add_step(record.plus(self._pauses.take(), **measured))
        if self._log and state.is_due(cfg.sample_every):
            try:
                self._sample(self._log)
            except Interrupted:
                state.pending = PendingWork(samples=True)
        # Later checkpoints could not be extended.
        must_save = state.is_last or state.steps_completed == state.schedule.cooldown_start
        self._checkpoint_due |= must_save or state.is_due(cfg.checkpoint_every)
        # Training does not wait for the hashes of the shards, except for these.
        ready = must_save or self._checkpointer.may_save
        world = self._evaluator.world
        if self._checkpoint_due and world.broadcast(ready and not state.pending):
            self.save_checkpoint()

    def finish_interrupted_step(self) -> None:
        """Do the work that a stop left pending in the checkpoint, and save the checkpoint again."""
        if self._state.pending:
            self.after_step(self._state.pending.record)
            limit = MAX_VERIFICATION_SECONDS if self._state.pending else None
            self.save_checkpoint(replace=True, max_verification_seconds=limit)

    def save_checkpoint(
        self, *, replace: bool = False, max_verification_seconds: float | None = None
    ) -> None:
        """Start to save a checkpoint of the steps completed, as Checkpointer.save."""
        self._checkpoint_due = False
        with self._pauses.measuring("save_ms"):
            self._checkpointer.save(
                self._state.for_checkpoint(),
                self._state.model,
                self._state.optimizers,
                replace=replace,
                max_verification_seconds=max_verification_seconds,
            )

    def _evaluate(self) -> dict[str, float]:
        """Return what is measured after this step, by its field of StepRecord.

        Raises:
            Interrupted: a signal has come to any rank.
            NotFiniteError: the held-out loss is not finite.
        """
        state, measured = self._state, {}
        if state.is_due(self._cfg.val_every):
            state.val_loss = self._evaluator.val_loss(state.plan.micro_batch_size)
        if state.val_loss is not None:
            state.val_tokens = self._evaluator.held_out.num_tokens
            self._console.evaluated(state.steps_completed, state.val_loss, state.val_tokens)
            factor = state.loss_scale.factor if state.loss_scale else None
            check_finite(state.steps_completed - 1, {"held-out loss": state.val_loss}, factor)
            measured["val_loss"] = state.val_loss
        if state.is_due(self._cfg.hellaswag_every):
            measured["hellaswag"], acc = self._evaluator.hellaswag()
            self._console.print_line(
                f"after {state.steps_completed} steps: hellaswag:{measured['hellaswag']:.4f} "
                f"acc:{acc:.4f}"
            )
        return measured

    def _sample(self, log: RunLogger) -> None:
        """Write some texts on rank 0; Interrupted if a signal comes."""
        steps = self._state.steps_completed
        with self._pauses.measuring("sample_ms"):
            check_stop = self._evaluator.stop.check
            texts = generate_texts(self._state.model, Tokenizer(), self._sampling, check_stop)
        log.add_samples(steps, texts)
        self._console.print_line(f"after {steps} steps it writes: {texts[0]!r:.200}")
