"""The trainer: sets up one rank's part of a run, fits the model, and acts after each step."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import torch

from app.data.dataset import Dataset, ShardVerification
from app.data.sequences import BatchPlan, SequenceOrder
from app.data.token_stream import TokenStream
from app.data.tokenizer import Tokenizer
from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import ExitCode, NotFiniteError, Stopped
from app.hardware.device import Device
from app.hardware.proc import process_seconds
from app.inference.hellaswag import HellaSwag
from app.inference.loss import HeldOutText
from app.inference.text import Sampling, generate_texts
from app.model.architectures import build_config, build_model
from app.runs.checkpoint_state import CheckpointState, PendingWork
from app.runs.folder import RunFolder
from app.runs.metrics import PauseTimer, StepRecord
from app.runs.provenance import run_metadata, versions
from app.runs.run_logger import RunLogger
from app.settings.settings import Settings
from app.train.checkpointer import Checkpointer
from app.train.compile import compile_cache_summary, compiled_loss
from app.train.console import Console, introduction, summary
from app.train.dataloader import BatchLoader
from app.train.diagnosis import out_of_memory, write_diagnosis
from app.train.evaluation import Evaluator
from app.train.loop import StepResult, check_finite, train_steps
from app.train.loss_scale import LossScale
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import build_optimizers
from app.train.start import Start
from app.train.stopping import Interrupted, StopRequest
from app.train.time_limit import TimeLimit, planned_steps

# A stopped run waits this long for the hashes of the shards: a scheduler will soon kill it.
_MAX_VERIFICATION_SECONDS = 60


class Trainer:
    """One rank's part of a run.

    The collectives of a step, in this order on all ranks:

    1. in the loop, at the last micro-batch (or earlier, after a signal), the vote to stop
    2. the all-reduce of the gradients
    3. the sum of the losses
    4. with a time limit, the broadcast of its plan
    5. in each evaluation (held-out loss, HellaSwag), the vote to stop and the sum of its results
    6. the broadcast of whether to save
    7. in a save, the broadcast of whether it begins and the gather of the optimizer state
    """

    def __init__(
        self,
        settings: Settings,
        start: Start,
        micro_batch_size: int,
        dataset: Dataset,
        run: RunFolder,
        device: Device,
        world: World,
        stop: StopRequest,
        compile_note: str = "",
    ) -> None:
        cfg, config = settings.train, build_config(settings.model.shape())
        self.cfg, self.sample_cfg, self.checkpoint = cfg, settings.sample, start.checkpoint
        self.run, self.device, self.world, self.stop = run, device, world, stop
        self.plan = BatchPlan(
            cfg.tokens_per_step // config.context_length, world.size, micro_batch_size
        )
        # Shards are hashed while the model is built and the first steps run.
        verification = ShardVerification(dataset) if world.is_rank_zero else None
        self.order = SequenceOrder(
            dataset.num_sequences(config.context_length), cfg.seed, cfg.shuffle
        )
        torch.manual_seed(cfg.seed)
        self.model = build_model(
            config, bf16_residual=cfg.residual == "bf16", zero_init=cfg.zero_init
        ).to(device.torch_device)
        self.model.recompute = cfg.recompute == "true"
        self.optimizers = build_optimizers(self.model, cfg, device.dtype)
        if cfg.shard_optimizer and world.size > 1:
            from app.train.sharded_optimizer import ShardedOptimizers

            self.optimizers = ShardedOptimizers(self.optimizers)
        if start.checkpoint:
            start.checkpoint.load(self.model, self.optimizers)
        elif start.weights and world.is_rank_zero:
            # Before the first step, DataParallelLoss broadcasts them to the other ranks.
            start.weights.load(self.model)
        before = start.checkpoint.state if start.checkpoint else None
        self.first_step = self.steps_completed = before.step if before else 0
        planned = planned_steps(settings, before)
        self.schedule = LRSchedule.from_settings(
            cfg, before.warmup_steps if before else None, planned
        )
        self.loss_scale = None
        if device.precision == "fp16":
            self.loss_scale = LossScale()
            if before and before.loss_scale:
                self.loss_scale = LossScale(before.loss_scale, before.loss_scale_updates)
        origin = before.origin if before else None
        initial_weights = before.initial_weights if before else None
        if start.weights:
            initial_weights = start.weights.name
        self.log = None
        if world.is_rank_zero:
            metadata = run_metadata(
                settings.public(),
                device.metadata(),
                dataset,
                processes=world.size,
                parameters=self.model.num_parameters(),
                origin=origin,
                planned_steps=planned,
                initial_weights=initial_weights,
            )
            self.log = RunLogger(run, start.checkpoint, metadata, self.print_line)
        earlier_seconds = self.log.earlier_seconds if self.log else 0.0
        self.began = time.perf_counter() - process_seconds() - earlier_seconds
        self.console = Console(
            self.first_step,
            self.schedule.max_steps,
            quiet=not world.is_rank_zero,
            device_bytes=device.memory_bytes(),
            price_per_hour=cfg.price_per_hour,
            earlier_seconds=earlier_seconds,
        )
        self.loader = BatchLoader(
            TokenStream(dataset.train),
            self.order,
            self.plan,
            rank=world.rank,
            sequences_consumed=self.first_step * self.plan.sequences_per_step,
            context_length=config.context_length,
            device=device.torch_device,
        )
        self.checkpointer = Checkpointer(
            run, cfg.keep_checkpoints, world, self.log, verification, self.print_line
        )
        self.state = CheckpointState(
            step=self.first_step,
            micro_batch_size=micro_batch_size,
            model=settings.model.shape(),
            settings=settings.public(),
            identity=start.identity.to_json(),
            versions=versions(),
            sequences_consumed=self.first_step * self.plan.sequences_per_step,
            warmup_steps=self.schedule.warmup_steps,
            cooldown_start=self.schedule.cooldown_start,
            planned_steps=planned,
            origin=origin,
            initial_weights=initial_weights,
        )
        self.compile_note = compile_note
        self.pauses, self.pending, self.checkpoint_due = PauseTimer(), PendingWork(), False
        length = config.context_length
        self.evaluator = Evaluator(
            self.model,
            device,
            world,
            stop,
            self.pauses,
            HeldOutText(TokenStream(dataset.val), length, cfg.val_tokens),
            HellaSwag(start.questions, length, micro_batch_size * length, world.rank, world.size),
        )
        self.val_loss: float | None = None
        held_out_tokens = self.evaluator.held_out.num_sequences * length
        self.time_limit = TimeLimit(cfg, planned, held_out_tokens) if cfg.max_hours else None

    def fit(self) -> None:
        """Train to the last step, or to a request to stop, and save everything."""
        started = time.perf_counter()
        self.print_line(
            introduction(
                self.device,
                self.plan,
                self.model.config.context_length,
                self.model.num_parameters(),
                self.compile_note,
            )
        )
        with closing(self.console), self.checkpointer:
            try:
                self.finish_interrupted_step()
                with self.loader:
                    for result in self.steps():
                        self.after_step(result)
            except NotFiniteError as error:
                raise self.diagnosed(error) from None
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.device, self.plan) from error
            incomplete = not self.is_last or bool(self.pending)
            stopped = self.world.any(incomplete)
            if stopped:
                self.save_checkpoint(max_verification_seconds=_MAX_VERIFICATION_SECONDS)
            self.checkpointer.wait()
            # No rank exits before rank 0 has saved. A signal that comes later changes nothing.
            self.world.barrier()
            self.stop.quiet = True
        if stopped:
            raise Stopped(
                self.stop.exit_code or ExitCode.SIGTERM,
                f"{self.run.last_saved() or 'no checkpoint saved'}; the same command continues",
            )
        if self.time_limit:
            self.print_line(self.time_limit.summary(self.steps_completed, self.elapsed_seconds))
        if self.log and self.log.skipped:
            share = f"{self.log.skipped} of {self.steps_completed} updates"
            self.print_line(f"{share} were skipped, because gradients overflowed in fp16")
        tokens = (self.steps_completed - self.first_step) * self.cfg.tokens_per_step
        self.print_line(summary(time.perf_counter() - started, tokens))

    def steps(self) -> Iterator[StepResult]:
        """Run the training loop, yielding the result of each step."""
        cfg = self.cfg
        loss = compiled_loss(self.model, self.device) if cfg.compile else self.model
        return train_steps(
            self.model,
            DataParallelLoss(self.model, loss, self.device.torch_device, self.world),
            self.optimizers,
            self.loader,
            lambda: self.schedule,
            self.device,
            self.world,
            first_step=self.first_step,
            accumulation_steps=self.plan.accumulation_steps,
            grad_clip=cfg.grad_clip,
            loss_scale=self.loss_scale,
            should_stop=self.should_stop,
        )

    def should_stop(self, is_last: bool) -> bool:
        """Return True if any rank must stop. The ranks vote at the last micro-batch of a step.

        A rank that must stop votes earlier, and waits there for the others.
        """
        if self.stop.requested or is_last:
            return self.world.any(self.stop.requested)
        return False

    def after_step(self, result: StepResult) -> None:
        """Print and log a step, then do whatever is due."""
        self.steps_completed, self.stop.has_progress = result.step + 1, True
        if self.time_limit:
            self.fit_to_time(self.time_limit, result)
        record = self.record(result)
        self.console.step(record)
        if self.cfg.compile and result.step == self.first_step:
            self.print_line(compile_cache_summary())
        self.complete_step(record)
        self.checkpointer.poll()

    def complete_step(self, record: StepRecord | None) -> None:
        """Evaluate, log, sample and save when their intervals are reached. Collective.

        Args:
            record: the step's record; None if its line has already been written.

        Raises:
            NotFiniteError: the held-out loss is not finite; nothing is saved.
        """
        self.pending = PendingWork()
        if record is not None:
            self.val_loss = None
            try:
                measured = self.evaluate()
            except Interrupted:
                self.pending = PendingWork(record=record.plus(self.pauses.take()))
                return
            if self.log:
                self.log.add_step(record.plus(self.pauses.take(), **measured))
        if self.log and self.is_due(self.cfg.sample_every):
            try:
                self.sample(self.log)
            except Interrupted:
                self.pending = PendingWork(samples=True)
        # Later checkpoints could not be extended.
        must_save = self.is_last or self.steps_completed == self.schedule.cooldown_start
        self.checkpoint_due |= must_save or self.is_due(self.cfg.checkpoint_every)
        # Training does not wait for the hashes of the shards, except for these.
        ready = must_save or self.checkpointer.may_save
        if self.checkpoint_due and self.world.broadcast(ready and not self.pending):
            self.save_checkpoint()

    def fit_to_time(self, limit: TimeLimit, result: StepResult) -> None:
        """Plan the steps anew if the time limit demands it. Collective."""
        done = self.steps_completed
        plan = limit.plan(done, result.seconds, self.elapsed_seconds, self.pauses.last)
        steps = self.world.broadcast(plan)
        if steps is None:
            return
        self.schedule = self.schedule.replanned(self.cfg, done, steps)
        self.state = dataclasses.replace(
            self.state,
            planned_steps=steps,
            warmup_steps=self.schedule.warmup_steps,
            cooldown_start=self.schedule.cooldown_start,
        )
        self.console.plan(steps)
        self.print_line(limit.describe(steps))
        if self.log:
            self.log.note(planned_steps=steps)

    @property
    def elapsed_seconds(self) -> float:
        """Return what the run has taken so far on rank 0, over all its starts."""
        return time.perf_counter() - self.began

    @property
    def is_last(self) -> bool:
        """Return True if the run has no step left."""
        return self.steps_completed >= self.schedule.max_steps

    def is_due(self, interval: int) -> bool:
        """Return True at multiples of an interval and after the last step; never for 0."""
        return bool(interval) and (self.is_last or self.steps_completed % interval == 0)

    def finish_interrupted_step(self) -> None:
        """Do the work that a stop left pending in the checkpoint, and save the checkpoint again."""
        state = self.checkpoint.state if self.checkpoint else None
        if state and state.pending:
            self.val_loss = state.val_loss
            self.complete_step(state.pending.record)
            limit = _MAX_VERIFICATION_SECONDS if self.pending else None
            self.save_checkpoint(replace=True, max_verification_seconds=limit)

    def evaluate(self) -> dict[str, float]:
        """Return what is measured after this step, by its field of StepRecord. Collective.

        Raises:
            Interrupted: a signal has come to any rank.
            NotFiniteError: the held-out loss is not finite.
        """
        measured = {}
        if self.is_due(self.cfg.val_every):
            self.val_loss = self.evaluator.val_loss(self.plan.micro_batch_size)
        if self.val_loss is not None:
            num_tokens = self.evaluator.held_out.num_tokens
            self.console.evaluated(self.steps_completed, self.val_loss, num_tokens)
            factor = self.loss_scale.factor if self.loss_scale else None
            check_finite(self.steps_completed - 1, {"held-out loss": self.val_loss}, factor)
            measured["val_loss"] = self.val_loss
        if self.is_due(self.cfg.hellaswag_every):
            measured["hellaswag"], acc = self.evaluator.hellaswag()
            self.print_line(
                f"after {self.steps_completed} steps: hellaswag:{measured['hellaswag']:.4f} "
                f"acc:{acc:.4f}"
            )
        return measured

    def sample(self, log: RunLogger) -> None:
        """Write some texts on rank 0; Interrupted if a signal comes."""
        with self.pauses.measuring("sample_ms"):
            sampling = self.sample_cfg.model_dump(exclude={"prompt_file", "step"})
            texts = generate_texts(self.model, Tokenizer(), Sampling(**sampling), self.stop.check)
        log.add_samples(self.steps_completed, texts)
        self.print_line(f"after {self.steps_completed} steps it writes: {texts[0]!r:.200}")

    def save_checkpoint(
        self, *, replace: bool = False, max_verification_seconds: float | None = None
    ) -> None:
        """Start to save a checkpoint of the steps completed, as Checkpointer.save. Collective."""
        self.checkpoint_due = False
        with self.pauses.measuring("save_ms"):
            state = dataclasses.replace(
                self.state,
                step=self.steps_completed,
                sequences_consumed=self.steps_completed * self.plan.sequences_per_step,
                val_loss=self.val_loss,
                val_tokens=None if self.val_loss is None else self.evaluator.held_out.num_tokens,
                pending=self.pending,
                loss_scale=self.loss_scale.factor if self.loss_scale else None,
                loss_scale_updates=self.loss_scale.updates if self.loss_scale else 0,
            )
            self.checkpointer.save(
                state,
                self.model,
                self.optimizers,
                replace=replace,
                max_verification_seconds=max_verification_seconds,
            )

    def record(self, result: StepResult) -> StepRecord:
        """Return the record of a step, before evaluation and pauses are added."""
        tokens_per_second = self.cfg.tokens_per_step / result.seconds
        flops, peak = self.model.flops_per_token() * tokens_per_second, self.device.peak_flops
        return StepRecord(
            step=result.step,
            tokens=(result.step + 1) * self.cfg.tokens_per_step,
            train_loss=result.train_loss,
            lr=result.lr,
            grad_norm=None if result.skipped else result.grad_norm,
            step_ms=1000 * result.seconds,
            tokens_per_second=tokens_per_second,
            mfu=flops / (peak * self.world.size) if peak else None,
            memory_bytes=self.device.peak_memory_bytes(),
            data_ms=1000 * result.data_seconds,
            loss_scale=result.loss_scale,
            skipped=result.skipped or None,
        )

    def diagnosed(self, error: NotFiniteError) -> NotFiniteError:
        """Return the error with the path of its diagnosis, once all ranks have arrived."""
        # A running save ends before any rank exits.
        with suppress(OSError):
            self.checkpointer.wait()
        if self.world.is_rank_zero:
            # Without gradients it was the held-out loss of a step that is completed.
            has_gradients = any(p.grad is not None for p in self.model.parameters())
            step = self.steps_completed if has_gradients else self.steps_completed - 1
            count = self.plan.sequences_per_step
            sequences = self.order.sequences(step * count, count).tolist()
            error = write_diagnosis(self.run, error, step, sequences, self.model)
        self.world.barrier()
        return error

    def print_line(self, line: str) -> None:
        """Print a line on rank 0, without breaking the bar."""
        self.console.print_line(line)
