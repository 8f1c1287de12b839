"""The trainer: sets up one rank's part of a run, fits the model, and acts after each step."""

import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress

import torch

from app.data.dataset import Dataset, ShardVerification
from app.data.sequences import BatchPlan, SequenceOrder
from app.data.token_stream import TokenStream
from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.errors import ExitCode, NotFiniteError, Stopped
from app.hardware.device import Device
from app.hardware.proc import process_seconds
from app.inference.hellaswag import HellaSwag
from app.inference.loss import HeldOutText
from app.inference.text import Sampling
from app.runs.folder import RunFolder
from app.runs.metrics import PauseTimer, StepRecord
from app.runs.provenance import run_metadata
from app.runs.run_logger import RunLogger
from app.settings.settings import Settings
from app.train.checkpointer import Checkpointer
from app.train.compile import compile_cache_summary, compiled_loss
from app.train.console import Console, introduction, summary
from app.train.dataloader import BatchLoader
from app.train.diagnosis import out_of_memory, write_diagnosis
from app.train.evaluation import Evaluator
from app.train.loop import StepResult, train_steps
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
        earlier_seconds = self.log.earlier_seconds if self.log else 0.0
        self.began = time.perf_counter() - process_seconds() - earlier_seconds
        self.console = Console(
            self.first_step,
            state.schedule.max_steps,
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
        tokens = evaluator.held_out.num_tokens
        self.time_limit = TimeLimit(cfg, state.planned_steps, tokens) if cfg.max_hours else None

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
        log = closing(self.log) if self.log else nullcontext()
        with closing(self.console), log, self.checkpointer:
            try:
                self.periodic.finish_interrupted_step()
                with self.loader:
                    for result in self.steps():
                        self.after_step(result)
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
                self.time_limit.summary(self.state.steps_completed, self.elapsed_seconds)
            )
        if self.log and self.log.skipped:
            share = f"{self.log.skipped} of {self.state.steps_completed} updates"
            self.print_line(f"{share} were skipped, because gradients overflowed in fp16")
        tokens = (self.state.steps_completed - self.first_step) * self.cfg.tokens_per_step
        self.print_line(summary(time.perf_counter() - started, tokens))

    def steps(self) -> Iterator[StepResult]:
        """Run the training loop, yielding the result of each step."""
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

    def after_step(self, result: StepResult) -> None:
        """Print and log a step, then do whatever is due."""
        self.state.steps_completed, self.stop.has_progress = result.step + 1, True
        if self.time_limit:
            self.fit_to_time(self.time_limit, result)
        record = self.record(result)
        self.console.step(record)
        if self.cfg.compile and result.step == self.first_step:
            self.print_line(compile_cache_summary())
        self.periodic.after_step(record)
        self.checkpointer.poll()

    def fit_to_time(self, limit: TimeLimit, result: StepResult) -> None:
        """Plan the steps anew if the time limit demands it. Collective."""
        done = self.state.steps_completed
        plan = limit.plan(done, result.seconds, self.elapsed_seconds, self.pauses.last)
        steps = self.world.broadcast(plan)
        if steps is None:
            return
        self.state.replan(steps)
        self.console.plan(steps)
        self.print_line(limit.describe(steps))
        if self.log:
            self.log.note(planned_steps=steps)

    @property
    def elapsed_seconds(self) -> float:
        """Return what the run has taken so far on rank 0, over all its starts."""
        return time.perf_counter() - self.began

    def record(self, result: StepResult) -> StepRecord:
        """Return the record of a step, before evaluation and pauses are added."""
        tokens_per_second = self.cfg.tokens_per_step / result.seconds
        flops, peak = self.state.model.flops_per_token() * tokens_per_second, self.device.peak_flops
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
