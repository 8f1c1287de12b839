"""The trainer: sets up one rank's part of a run, fits the model, and acts after each step."""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import replace

import torch

from app.data.dataset import Dataset, ShardVerification
from app.data.sequences import BatchPlan, SequenceOrder
from app.data.token_stream import TokenStream
from app.data.tokenizer import vocabulary_files
from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import ExitCode, NotFiniteError, Stopped
from app.hardware.device import Device
from app.inference.hellaswag import HellaSwag
from app.inference.loss import HeldOutText
from app.inference.text import Sampling
from app.runs.folder import RunFolder
from app.runs.metrics import PauseTimer, StepRecord, bits_per_byte, perplexity
from app.runs.provenance import run_metadata
from app.runs.run_logger import RunLogger
from app.settings.settings import Settings
from app.train.checkpointer import Checkpointer
from app.train.compile import compile_cache_summary, compiled_loss
from app.train.console import Console, introduction, summary
from app.train.dataloader import BatchLoader
from app.train.diagnosis import out_of_memory, write_diagnosis
from app.train.evaluation import Evaluator
from app.train.loop import train_steps
from app.train.pace import MIN_MEASURED_STEPS, Pace
from app.train.periodic import MAX_VERIFICATION_SECONDS, PeriodicWork
from app.train.start import Start
from app.train.state import TrainingState
from app.train.stopping import StopRequest
from app.train.time_limit import TimeLimit


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
        cfg, length = settings.train, settings.model.context_length
        self.cfg, self.run, self.device, self.world, self.stop = cfg, run, device, world, stop
        self.compile_note = compile_note
        self.plan = BatchPlan(cfg.tokens_per_step // length, world.size, micro_batch_size)
        # Shards are hashed while the model is built and the first steps run.
        verification = ShardVerification(dataset) if world.is_rank_zero else None
        self.order = SequenceOrder(dataset.num_sequences(length), cfg.seed, cfg.shuffle)
        self.state = state = TrainingState(settings, start, self.plan, device, world)
        self.first_step = state.steps_completed
        self.log = None
        if world.is_rank_zero:
            metadata = run_metadata(
                settings.public(),
                device.metadata(),
                dataset,
                processes=world.size,
                parameters=state.model.num_parameters(),
                origin=state.origin,
                planned_steps=state.planned_steps,
                initial_weights=state.initial_weights,
            )
            self.log = RunLogger(run, start.checkpoint, metadata, self.print_line, cfg.tracker)
        self.console = Console(
            self.first_step,
            state.schedule.max_steps,
            quiet=not world.is_rank_zero,
            device_bytes=device.memory_bytes(),
            price_per_hour=cfg.price_per_hour,
            earlier_seconds=self.log.earlier_seconds if self.log else 0.0,
            waiting_for="the compiler" if cfg.compile else "the first step",
        )
        self.loader = BatchLoader(
            TokenStream(dataset.train),
            self.order,
            self.plan,
            rank=world.rank,
            sequences_consumed=self.first_step * self.plan.sequences_per_step,
            context_length=length,
            device=device.torch_device,
        )
        self.checkpointer = Checkpointer(
            run, cfg.keep_checkpoints, world, self.log, verification, self.print_line
        )
        self.pauses = PauseTimer()
        evaluator = Evaluator(
            state.model,
            device,
            world,
            stop,
            self.pauses,
            HeldOutText(TokenStream(dataset.val), length, cfg.val_tokens),
            HellaSwag(start.questions, length, micro_batch_size * length, world.rank, world.size),
        )
        sampling = Sampling(**settings.sample.model_dump(exclude={"prompt_file", "step"}))
        self.periodic = PeriodicWork(
            cfg, sampling, state, evaluator, self.checkpointer, self.console, self.log, self.pauses
        )
        self.held_out, self.pace = evaluator.held_out, Pace(cfg, evaluator.held_out.num_tokens)
        self.time_limit = TimeLimit(cfg, state.planned_steps, self.pace) if cfg.max_hours else None

    def fit(self) -> None:
        """Train to the last step, or to a request to stop, and save everything."""
        started = time.perf_counter()
        self.print_line(
            introduction(
                self.device,
                self.plan,
                self.state.model.config.context_length,
                self.state.model.num_parameters(),
                self.compile_note,
            )
        )
        if self.log:
            earlier = Pace(self.cfg, self.held_out.num_tokens).with_earlier(self.log.records)
            self.expect(earlier, " at the speed of the last start")
        log = closing(self.log) if self.log else nullcontext()
        with closing(self.console), log, self.checkpointer:
            try:
                self.periodic.finish_interrupted_step()
                with self.loader:
                    for record in self.steps():
                        self.after_step(record)
            except NotFiniteError as error:
                raise self.diagnosed(error) from None
            except torch.OutOfMemoryError as error:
                raise out_of_memory(self.device, self.plan) from error
            incomplete = not self.state.is_last or bool(self.state.pending)
            stopped = self.world.any(incomplete)
            if stopped:
                self.periodic.save_checkpoint(max_verification_seconds=MAX_VERIFICATION_SECONDS)
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
            self.print_line(
                self.time_limit.summary(self.state.steps_completed, self.console.elapsed_seconds)
            )
        if self.log and self.log.skipped:
            share = f"{self.log.skipped} of {self.state.steps_completed} updates"
            self.print_line(f"{share} were skipped, because gradients overflowed in fp16")
        self.print_results()
        tokens = (self.state.steps_completed - self.first_step) * self.cfg.tokens_per_step
        self.print_line(summary(time.perf_counter() - started, tokens))

    def print_results(self) -> None:
        """Print the held-out loss, where the checkpoint is, and what all starts have taken."""
        loss, saved = self.state.val_loss, self.run.last_saved()
        if loss is not None:
            line = f"Held-out loss: {loss:.4f}, perplexity {perplexity(loss):,.2f}"
            if self.world.is_rank_zero and vocabulary_files():
                bits = bits_per_byte(loss, self.held_out.num_tokens, self.held_out.num_bytes())
                line += f", {bits:.4f} bits per byte" if bits else ""
            self.print_line(line)
        self.print_line(f"Checkpoint: {saved}")
        self.console.total(self.state.steps_completed * self.cfg.tokens_per_step)

    def steps(self) -> Iterator[StepRecord]:
        """Run the training loop, yielding the record of each step."""
        model = self.state.model
        loss = compiled_loss(model, self.device) if self.cfg.compile else model
        return train_steps(
            model,
            DataParallelLoss(model, loss, self.device.torch_device, self.world),
            self.state.optimizers,
            self.loader,
            lambda: self.state.schedule,
            self.device,
            self.world,
            first_step=self.first_step,
            accumulation_steps=self.plan.accumulation_steps,
            grad_clip=self.cfg.grad_clip,
            loss_scale=self.state.loss_scale,
            should_stop=self.should_stop,
        )

    def should_stop(self, is_last: bool) -> bool:
        """Return True if any rank must stop. The ranks vote at the last micro-batch of a step.

        A rank that must stop votes earlier, and waits there for the others.
        """
        if self.stop.requested or is_last:
            return self.world.any(self.stop.requested)
        return False

    def after_step(self, record: StepRecord) -> None:
        """Print and log a step, then evaluate, sample and save at their intervals."""
        self.state.steps_completed, self.stop.has_progress = record.step + 1, True
        is_first = record.step == self.first_step
        if not is_first:
            # The first step has waited for the compiler, so it tells nothing about the others.
            self.pace.add((record.step_ms or 0.0) / 1000, self.pauses.last)
        is_planned = self.fit_to_time(self.time_limit) if self.time_limit else False
        record = self.with_device(record)
        self.console.step(record, self.seconds_left(self.pace))
        if self.cfg.compile and is_first:
            self.print_line(compile_cache_summary())
        if is_planned or self.pace.measured_steps == MIN_MEASURED_STEPS:
            self.expect(self.pace)
        self.periodic.after_step(record)
        self.checkpointer.poll()

    def fit_to_time(self, limit: TimeLimit) -> bool:
        """Plan the steps that fit the time limit; return True at the first plan. Collective."""
        plan = limit.plan(self.state.steps_completed, self.console.elapsed_seconds)
        if (steps := self.world.broadcast(plan)) is None:
            return False
        is_first_plan = self.state.planned_steps is None
        self.state.replan(steps)
        self.console.plan(steps)
        self.print_line(limit.describe(steps))
        if self.log:
            self.log.note(planned_steps=steps)
        return is_first_plan

    def seconds_left(self, pace: Pace) -> float | None:
        """Return how long the rest of the run takes; None if that is not known yet."""
        is_planned = self.time_limit is None or self.state.planned_steps is not None
        if not is_planned or pace.measured_steps < MIN_MEASURED_STEPS:
            return None
        return pace.seconds_left(self.state.steps_completed, self.state.schedule.max_steps)

    def expect(self, pace: Pace, basis: str = "") -> None:
        """Print what the run will take, if that is known and there are steps left."""
        seconds = self.seconds_left(pace)
        if seconds is not None and not self.state.is_last:
            tokens = self.state.schedule.max_steps * self.cfg.tokens_per_step
            self.console.expect(seconds, tokens, basis)

    def with_device(self, record: StepRecord) -> StepRecord:
        """Return a step's record with what is measured of the device: utilization and memory."""
        flops = self.state.model.flops_per_token() * (record.tokens_per_second or 0.0)
        peak = self.device.peak_flops
        mfu = flops / (peak * self.world.size) if peak else None
        return replace(record, mfu=mfu, memory_bytes=self.device.peak_memory_bytes())

    def diagnosed(self, error: NotFiniteError) -> NotFiniteError:
        """Return the error with the path of its diagnosis, once all ranks have arrived."""
        # A running save ends before any rank exits.
        with suppress(OSError):
            self.checkpointer.wait()
        if self.world.is_rank_zero:
            # Without gradients it was the held-out loss of a step that is completed.
            has_gradients = any(p.grad is not None for p in self.state.model.parameters())
            step = self.state.steps_completed if has_gradients else self.state.steps_completed - 1
            count = self.plan.sequences_per_step
            sequences = self.order.sequences(step * count, count).tolist()
            error = write_diagnosis(self.run, error, step, sequences, self.state.model)
        self.world.barrier()
        return error

    def print_line(self, line: str) -> None:
        """Print a line on rank 0, without breaking the bar."""
        self.console.print_line(line)
