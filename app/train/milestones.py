"""The work between steps: held-out loss, metrics, samples, checkpoints."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from app.data.sequences import BatchPlan
from app.data.token_stream import TokenStream
from app.data.tokenizer import Tokenizer
from app.distributed.world import World
from app.hardware.device import Device
from app.inference.loss import HeldOutText
from app.inference.text import Sampling, generate_texts
from app.model.gpt import GPT
from app.runs.checkpoint import Checkpoint
from app.runs.run import RunLogger
from app.runs.stopwatch import PauseTimer
from app.settings.settings import Settings
from app.train.checkpointer import Saver
from app.train.console import Console
from app.train.loop import check_finite
from app.train.optimizer import Optimizers
from app.train.stopping import Interrupted, StopRequest

# A service manager kills a process that takes much longer to stop.
_LONGEST_CHECK_SECONDS = 60


@dataclass
class Milestones:
    """Measures, logs, samples and saves between steps, on all ranks; only the first writes.

    Attributes:
        log, saver, check: of the first rank; None for the others. The check compares the hashes of
            the dataset's shards; nothing is saved before it is done
        facts: what every checkpoint of the run has in its state
        left: what a request to stop has left undone of the last step, for its checkpoint
        pauses: of what it does
    """

    settings: Settings
    ranks: World
    device: Device
    plan: BatchPlan
    model: GPT
    optimizers: Optimizers
    held_out: TokenStream
    console: Console
    log: RunLogger | None
    saver: Saver | None
    stop: StopRequest
    check: Future[None] | None
    facts: dict[str, Any]
    left: dict[str, Any] = field(default_factory=dict)
    pauses: PauseTimer = field(default_factory=PauseTimer)
    _record: dict[str, Any] = field(default_factory=dict)
    _owes_save: bool = False

    def after_step(self, done: int, record: dict[str, Any] | None) -> None:
        """Measure, log, sample and save what is due after `done` steps.

        Args:
            record: the step's line for metrics.jsonl; None if it is written already.

        Raises:
            NotFiniteError: the held-out loss is not finite; nothing is saved.
        """
        chosen = self.settings.train
        self.left = {}
        if record is not None:
            self._record = record
            is_measured = not self._due(done, chosen.val_every) or self._measure(done, record)
            self.pauses.add_to(record)
            if not is_measured:
                self.left = {"record": record}
                return
            if self.log:
                self._write(self.log.add_metrics, record)
        if self.log and chosen.sample_every and self._due(done, chosen.sample_every):
            try:
                with self.pauses.measuring("sample_ms"):
                    sampling = self.settings.sample.model_dump(exclude={"prompt_file", "step"})
                    texts = generate_texts(
                        self.model, Tokenizer(), Sampling(**sampling), self.stop.interrupt
                    )
            except Interrupted:
                self.left = {"samples": True}
            else:
                self._write(self.log.add_samples, done, texts)
                self.console.say(f"after {done} steps it writes: {texts[0]!r:.200}")
        self._owes_save |= self._due(done, chosen.checkpoint_every)
        # Steps do not wait for a check that takes minutes.
        is_time = not self.left and (done == chosen.max_steps or not self._is_checking())
        if self._owes_save and self.ranks.broadcast(is_time):
            self.save(done)

    def catch_up(self, checkpoint: Checkpoint) -> None:
        """Do what a request to stop has left undone after a checkpoint's last step."""
        if left := checkpoint.state["left"]:
            self._record = {"val_loss": checkpoint.val_loss}
            self.after_step(checkpoint.step, left.get("record"))
            self.save(checkpoint.step, replace=True)

    def save(self, done: int, *, replace: bool = False) -> None:
        """Begin to save the checkpoint after `done` steps.

        Args:
            replace: the one of this step, if there is one.

        Raises:
            UserError: a shard of the dataset is damaged.
        """
        self._owes_save = False
        may_save = self._may_save(done)
        with self.pauses.measuring("save_ms"):
            if self.saver and may_save:
                progress = {
                    "windows_consumed": done * self.plan.sequences_per_step,
                    "val_loss": self._record.get("val_loss"),
                    "left": self.left,
                }
                may_save = self.saver.begin(done, self.facts | progress, replace=replace)
            if not self.ranks.broadcast(may_save):
                return
            if self.saver:
                self.saver.save(self.model, self.optimizers)
            else:
                self.optimizers.join_gather(self.model)

    def poll(self) -> None:
        """Say how a save has ended, if it has; UserError if a shard is found to be damaged."""
        if self.saver:
            self.saver.poll()
        if self.check and not self._is_checking():
            self.check.result()

    def finish(self) -> None:
        """Wait for the save under way; OSError if the last one has failed."""
        if self.saver:
            self.saver.finish()

    def _may_save(self, done: int) -> bool:
        """Return True if the shards are known to be whole; wait a while for it before a stop."""
        if self.check and self.stop.requested and done < self.settings.train.max_steps:
            wait([self.check], _LONGEST_CHECK_SECONDS)
            if self._is_checking():
                self.console.say("warning: not saved: the shards are still being verified")
                return False
        if self.check:
            self.check.result()
        return True

    def _is_checking(self) -> bool:
        return self.check is not None and not self.check.done()

    def _measure(self, done: int, record: dict[str, Any]) -> bool:
        """Add the held-out loss, if there is text for it; False if a request to stop was first."""
        length = self.model.config.context_length
        text = HeldOutText(self.held_out, length, self.settings.train.val_tokens)
        if not text.num_sequences or not self.settings.train.val_every:
            return True
        total = torch.zeros((), dtype=torch.float64, device=self.device.torch_device)
        losses = text.losses(
            self.model,
            self.device,
            self.plan.micro_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            check_stop=self.stop.interrupt,
        )
        with self.pauses.measuring("val_ms"):
            with suppress(Interrupted):
                for of_batch, _ in losses:
                    total += of_batch.double().sum()
            if self.ranks.any(self.stop.requested):
                return False
            record["val_loss"] = self.ranks.sum(total).item() / text.num_sequences
        self.console.say(f"after {done} steps: val_loss:{record['val_loss']:.4f}")
        check_finite(done, held_out_loss=record["val_loss"])
        return True

    def _write(self, write: Callable[..., None], *values: Any) -> None:
        try:
            write(*values)
        except OSError as error:
            self.console.say(f"warning: {error}; it is kept, and written when the disk takes it")

    def _due(self, done: int, every: int) -> bool:
        return done == self.settings.train.max_steps or bool(every and done % every == 0)
