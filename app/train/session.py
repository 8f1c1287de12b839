"""One process's part of a run: its steps, and what is due between them."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from app.data.dataset import Dataset
from app.data.sequences import BatchPlan, SequenceOrder, micro_batch_sizes
from app.data.token_stream import TokenStream
from app.distributed.world import World, data_parallel
from app.errors import ExhaustedError, ExitCode, NotFiniteError, Stopped
from app.hardware.device import Device
from app.model.gpt import GPT
from app.runs.checkpoint import checkpoint_folder
from app.runs.checkpoints import checkpoint_steps
from app.runs.metrics import read_metrics
from app.runs.provenance import versions
from app.runs.run import RunLogger
from app.runs.stopwatch import total_seconds
from app.settings.settings import Settings
from app.train.checkpointer import Saver
from app.train.compile import compile_cache_summary, compiled_loss, missing_build_tools
from app.train.console import Console, summary
from app.train.dataloader import BatchLoader
from app.train.diagnosis import write_diagnosis
from app.train.loop import StepResult, train_steps
from app.train.milestones import Milestones
from app.train.optimizer import LRSchedule, Optimizers
from app.train.start import Start
from app.train.stopping import StopRequest


@dataclass(frozen=True)
class Session:
    """One process's part of a run, from where the run is to its end or a request to stop."""

    settings: Settings
    ranks: World
    device: Device
    dataset: Dataset
    order: SequenceOrder
    plan: BatchPlan
    model: GPT
    optimizers: Optimizers
    compiled: bool
    stop: StopRequest
    start: Start
    check: Future[None] | None
    log: RunLogger | None

    @property
    def first_step(self) -> int:
        """The step it begins with: how many are completed."""
        return self.start.checkpoint.step if self.start.checkpoint else 0

    def work(self) -> None:
        """Train to the last step, or to a request to stop, and let all of it be saved."""
        chosen = self.settings.train
        console = self._console()
        console.say("\n".join(self._introduction()))
        started, done = time.perf_counter(), self.first_step
        with ExitStack() as open_files:
            open_files.callback(console.close)
            milestones = self._milestones(console, open_files)
            try:
                if self.start.checkpoint:
                    milestones.catch_up(self.start.checkpoint)
                with self._loader() as loader:
                    for result in self._steps(loader):
                        done = result.step + 1
                        self.stop.has_progress = True
                        record = self._record(result)
                        record["data_ms"] = 1000 * loader.take_waited_seconds()
                        console.step(record)
                        if self.compiled and result.step == self.first_step:
                            console.say(compile_cache_summary())
                        milestones.after_step(done, record)
                        milestones.poll()
            except NotFiniteError as error:
                # A save under way ends before anybody leaves.
                with suppress(OSError):
                    milestones.finish()
                error = self._diagnosed(error, done)
                self.ranks.any(False)
                raise error from None
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory() from error
            is_whole = not self.ranks.any(done < chosen.max_steps or bool(milestones.left))
            if not is_whole:
                milestones.save(done)
            milestones.finish()
            # Nobody leaves before the first rank has saved.
            self.ranks.any(False)
        if not is_whole:
            raise Stopped(
                self.stop.exit_code or ExitCode.SIGTERM,
                f"{self._last_saved()}; the same command continues",
            )
        steps = done - self.first_step
        console.say(summary(time.perf_counter() - started, steps * chosen.tokens_per_step))

    def _console(self) -> Console:
        path = self.settings.run_dir / "metrics.jsonl"
        return Console(
            self.first_step,
            self.settings.train.max_steps,
            quiet=not self.ranks.is_rank_zero,
            device_bytes=self.device.memory_bytes(),
            price_per_hour=self.settings.train.price_per_hour,
            earlier_seconds=total_seconds(read_metrics(path)) if self.first_step else 0.0,
        )

    def _milestones(self, console: Console, open_files: ExitStack) -> Milestones:
        saver = None
        if self.log:
            folder = self.settings.run_dir / "checkpoints"
            keep = self.settings.train.keep_checkpoints
            saver = open_files.enter_context(Saver(folder, keep, self.log.fsync, console.say))
        facts = {
            "micro_batch_size": self.plan.micro_batch_size,
            "model": self.settings.model.model_dump(),
            "settings": self.settings.public(),
            "identity": self.start.identity.as_state(),
            "versions": versions(),
        }
        return Milestones(
            settings=self.settings,
            ranks=self.ranks,
            device=self.device,
            plan=self.plan,
            model=self.model,
            optimizers=self.optimizers,
            held_out=TokenStream(self.dataset.val),
            console=console,
            log=self.log,
            saver=saver,
            stop=self.stop,
            check=self.check,
            facts=facts,
        )

    def _loader(self) -> BatchLoader:
        return BatchLoader(
            TokenStream(self.dataset.train),
            self.order,
            self.plan,
            rank=self.ranks.rank,
            sequences_consumed=self.first_step * self.plan.sequences_per_step,
            context_length=self.model.config.context_length,
            device=self.device.torch_device,
        )

    def _steps(self, loader: BatchLoader) -> Iterator[StepResult]:
        chosen = self.settings.train
        one_percent = round(0.01 * chosen.max_steps)
        warmup_steps = one_percent if chosen.warmup_steps == "auto" else chosen.warmup_steps
        loss_of = compiled_loss(self.model, self.device) if self.compiled else self.model
        device = self.device.torch_device
        compute_loss, no_sync = data_parallel(self.model, loss_of, device, self.ranks)
        return train_steps(
            self.model,
            compute_loss,
            no_sync,
            self.ranks,
            self.optimizers,
            loader,
            self.device,
            LRSchedule(
                chosen.learning_rate,
                chosen.lr_schedule,
                warmup_steps,
                chosen.max_steps,
                chosen.min_lr_ratio,
            ),
            first_step=self.first_step,
            accumulation_steps=self.plan.accumulation_steps,
            grad_clip=chosen.grad_clip,
            should_stop=self._should_stop,
        )

    def _should_stop(self, is_last: bool) -> bool:
        """Return True if any rank is to stop; ask once a step, and when this one is to stop."""
        if self.stop.requested or is_last:
            return self.ranks.any(self.stop.requested)
        return False

    def _record(self, result: StepResult) -> dict[str, Any]:
        tokens_per_step = self.settings.train.tokens_per_step
        tokens_per_second = tokens_per_step / result.seconds
        flops = self.model.flops_per_token() * tokens_per_second
        peak = self.device.peak_flops
        return {
            "step": result.step,
            "tokens": (result.step + 1) * tokens_per_step,
            "train_loss": result.train_loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_ms": result.seconds * 1000,
            "tokens_per_second": tokens_per_second,
            "mfu": flops / (peak * self.ranks.size) if peak else None,
            "memory_bytes": self.device.peak_memory_bytes(),
        }

    def _introduction(self) -> list[str]:
        chosen, plan = self.settings.train, self.plan
        return [
            f"Using device: {self.device.torch_device.type}",
            f"Total batch size: {chosen.tokens_per_step}",
            f"Tokens per micro-batch: {plan.micro_batch_size * self.model.config.context_length}",
            f"Gradient accumulation steps: {plan.accumulation_steps}",
            f"{f'{self.ranks.size} x ' if self.ranks.size > 1 else ''}"
            f"{self.device.name}, {self.device.precision}, "
            f"{'deterministic' if self.device.deterministic else 'not deterministic'}; "
            f"{self.model.num_parameters():,} parameters",
            "the first step waits for the compiler"
            if self.compiled
            else "not compiled: TRAIN_COMPILE=false"
            if not chosen.compile
            else "not compiled, and slower: torch.compile does not find "
            + " and ".join(missing_build_tools(self.device.torch_device.type)),
        ]

    def _diagnosed(self, error: NotFiniteError, done: int) -> NotFiniteError:
        """The error with the place of what helps to understand it, and where the run continues."""
        if self.ranks.is_rank_zero:
            error = NotFiniteError(
                error.problem, f"{error.fix}; the run continues from {self._last_saved()}"
            )
            # Without gradients it was the held-out loss, after the step.
            has_gradients = any(one.grad is not None for one in self.model.parameters())
            step = done if has_gradients else done - 1
            count = self.plan.sequences_per_step
            windows = self.order.sequences(step * count, count).tolist()
            # A full disk does not hide what has happened.
            with suppress(OSError):
                path = write_diagnosis(
                    self.settings.run_dir, step, error.problem, windows, self.model
                )
                told = f"{error.problem}; {path} has the batch and all norms"
                error = NotFiniteError(told, error.fix)
        return error

    def _last_saved(self) -> str:
        folder = self.settings.run_dir / "checkpoints"
        saved = checkpoint_steps(folder)
        return str(checkpoint_folder(folder, saved[-1])) if saved else "its beginning"

    def _out_of_memory(self) -> ExhaustedError:
        sizes = micro_batch_sizes(self.plan.sequences_per_step, self.plan.ranks)
        smaller = [size for size in sizes if size < self.plan.micro_batch_size]
        advice = f"set TRAIN_MICRO_BATCH_SIZE={smaller[-1]}" if smaller else "use a smaller model"
        return ExhaustedError(
            f"{self.device.name} has too little memory for micro-batches of "
            f"{self.plan.micro_batch_size} windows",
            f"{advice}; the run stays the same run",
        )
