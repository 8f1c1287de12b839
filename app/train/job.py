"""From settings to a finished run: everything the loop needs is put together here, once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from app.data.loader import BatchLoader, TokenStream
from app.data.shards import Dataset, open_dataset
from app.data.tokenizer import Tokenizer
from app.data.windows import StepPlan, WindowOrder, count_windows, micro_batch_sizes
from app.errors import ExhaustedError, Stopped, UserError
from app.files import locked
from app.model.gpt import GPT, GPTConfig
from app.settings import Settings
from app.train.attention import choose_attention
from app.train.compilation import (
    Extent,
    cache_report,
    can_compile,
    compiled_loss,
    keep_compiled_code,
    suitable_extent,
)
from app.train.console import Console, summary
from app.train.device import Device, choose_device
from app.train.evaluate import held_out_loss
from app.train.loop import StepResult, refuse_not_finite, train_steps
from app.train.micro_batch import largest_micro_batch, memory_need
from app.train.optimizer import Optimizers, Schedule, build_optimizers
from app.train.run import Identity, Run, StopRequest, stop_on_signals, write_run_settings
from app.train.writing import write_texts


def train(settings: Settings) -> None:
    """Train a run from where it is to its last step.

    Raises:
        UserError: data, run folder or settings do not fit.
        NotFiniteError: the loss or the gradient norm is not a number.
        ExhaustedError: the GPU's memory is too small for the micro-batch.
        Stopped: by SIGINT or SIGTERM, after a checkpoint.
    """
    chosen = settings.train
    keep_compiled_code(settings.general.data_dir / "cache")
    device = choose_device(chosen.device, chosen.precision, chosen.deterministic)
    dataset = open_dataset(settings.train_dataset_dir)
    length = settings.model.context_length
    windows = count_windows(sum(shard.size for shard in dataset.train), length)
    if windows == 0:
        raise UserError(
            f"{dataset.folder} holds less than one window of training tokens: "
            f"{length + 1} are needed (MODEL_CONTEXT_LENGTH and one more)",
            "prepare more text, or lower MODEL_CONTEXT_LENGTH",
        )
    identity = Identity(
        dataset.fingerprint,
        settings.model.model_dump()
        | chosen.model_dump(include={"tokens_per_step", "seed", "shuffle", "optimizer"}),
    )
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with locked(settings.run_dir, "train"), stop_on_signals() as stop:
        run = Run(settings.run_dir, identity, chosen.keep_checkpoints, chosen.resume)
        if run.first_step >= chosen.max_steps:
            print(f"{run.folder} is finished: {run.first_step} steps are done")
            return
        config = GPTConfig(**settings.model.model_dump())
        plan = StepPlan(
            windows_per_step=chosen.tokens_per_step // length,
            ranks=1,
            micro_batch_size=_micro_batch_size(settings, run, device, config),
        )
        device, attention = choose_attention(device, config)
        torch.manual_seed(chosen.seed)
        model = GPT(config).to(device.torch_device)
        optimizers = build_optimizers(
            model,
            chosen.optimizer,
            betas=chosen.betas,
            weight_decay=chosen.weight_decay,
            decay_on=chosen.weight_decay_on,
            muon_iterated_in=device.dtype,
        )
        if run.resumed_from:
            run.resumed_from.load_model(model)
            run.resumed_from.load_optimizers(model, optimizers)
        facts = {"device": {"name": device.name}, "parameters": model.num_parameters()}
        write_run_settings(run.folder, settings.public(), facts)
        order = WindowOrder(windows, chosen.seed, chosen.shuffle)
        extent = _compile_extent(settings, device, model)
        _Job(
            settings, run, device, dataset, order, plan, model, optimizers, extent, attention, stop
        ).work()


@dataclass(frozen=True)
class _Job:
    settings: Settings
    run: Run
    device: Device
    dataset: Dataset
    order: WindowOrder
    plan: StepPlan
    model: GPT
    optimizers: Optimizers
    extent: Extent | None
    attention: str
    stop: StopRequest

    def work(self) -> None:
        """Train to the last step, and measure, sample and save when it is due."""
        chosen, run = self.settings.train, self.run
        print("\n".join(self._introduction()), flush=True)
        held_out = TokenStream(self.dataset.val)
        can_measure = count_windows(len(held_out), self.model.config.context_length) > 0
        tokenizer = Tokenizer()
        console = Console(run.first_step, chosen.max_steps)
        started, done = time.perf_counter(), run.first_step
        try:
            with self._loader() as loader:
                for result in self._steps(loader):
                    done = result.step + 1
                    record = self._record(result)
                    console.step(record)
                    if self.extent and result.step == run.first_step:
                        console.say(cache_report())

                    if chosen.val_every and can_measure and self._due(done, chosen.val_every):
                        record["val_loss"], _ = held_out_loss(
                            self.model,
                            held_out,
                            max_tokens=chosen.val_tokens,
                            batch_size=self.plan.micro_batch_size,
                            device=self.device,
                        )
                        console.say(f"after {done} steps: val_loss:{record['val_loss']:.4f}")
                        refuse_not_finite(done, held_out_loss=record["val_loss"])
                    run.add_metrics(record)

                    if chosen.sample_every and self._due(done, chosen.sample_every):
                        texts = write_texts(self.model, tokenizer, self.settings.sample)
                        run.add_samples(done, texts)
                        console.say(f"after {done} steps it writes: {texts[0]!r:.200}")

                    if self._due(done, chosen.checkpoint_every):
                        console.say(f"after {done} steps: saved {self._save(done)}")
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        finally:
            console.close()
        if self.stop.exit_code is not None and done < chosen.max_steps:
            kept = self._save(done) if done > run.first_step else "no new step to save"
            raise Stopped(self.stop.exit_code, f"{kept}; the same command continues")
        steps = done - run.first_step
        print(summary(time.perf_counter() - started, steps * chosen.tokens_per_step))

    def _loader(self) -> BatchLoader:
        return BatchLoader(
            TokenStream(self.dataset.train),
            self.order,
            self.plan,
            rank=0,
            first_position=self.run.windows_consumed,
            context_length=self.model.config.context_length,
            device=self.device.torch_device,
        )

    def _steps(self, loader: BatchLoader) -> Iterator[StepResult]:
        chosen = self.settings.train
        return train_steps(
            self.model,
            compiled_loss(self.model, self.extent) if self.extent else self.model,
            self.optimizers,
            loader,
            self.device,
            Schedule(
                chosen.learning_rate,
                chosen.lr_schedule,
                round(0.01 * chosen.max_steps)
                if chosen.warmup_steps == "auto"
                else chosen.warmup_steps,
                chosen.max_steps,
                chosen.min_lr_ratio,
            ),
            first_step=self.run.first_step,
            accumulation_steps=self.plan.accumulation_steps,
            grad_clip=chosen.grad_clip,
            should_stop=lambda: self.stop.exit_code is not None,
        )

    def _due(self, done: int, every: int) -> bool:
        return done == self.settings.train.max_steps or bool(every and done % every == 0)

    def _save(self, done: int) -> str:
        state = {
            "windows_consumed": self.run.windows_consumed
            + (done - self.run.first_step) * self.plan.windows_per_step,
            "micro_batch_size": self.plan.micro_batch_size,
            "model": self.settings.model.model_dump(),
            "settings": self.settings.public(),
        }
        return str(self.run.save(done, self.model, self.optimizers, state))

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
            "mfu": flops / peak if peak else None,
            "memory_bytes": self.device.peak_memory_bytes(),
        }

    def _introduction(self) -> list[str]:
        chosen, run, plan = self.settings.train, self.run, self.plan
        per_epoch = self.order.num_windows * self.model.config.context_length
        epochs = chosen.max_steps * chosen.tokens_per_step / per_epoch
        return [
            f"Using device: {self.device.torch_device.type}",
            f"Total batch size: {chosen.tokens_per_step}",
            f"Tokens per micro-batch: {plan.micro_batch_size * self.model.config.context_length}",
            f"Gradient accumulation steps: {plan.accumulation_steps}",
            f"{self.device.name}, {self.device.precision}, "
            f"{'deterministic' if self.device.deterministic else 'not deterministic'}",
            self.attention,
            f"{self.model.num_parameters():,} parameters; {self.dataset.folder}: "
            f"{sum(shard.size for shard in self.dataset.train):,} training tokens "
            f"({epochs:.2f} epochs in {chosen.max_steps} steps), "
            f"{sum(shard.size for shard in self.dataset.val):,} held out",
            f"{run.folder}: "
            + (f"continues at step {run.first_step}" if run.first_step else "new"),
            "the first step waits for the compiler"
            if self.extent
            else "not compiled: TRAIN_COMPILE=false"
            if chosen.compile == "false"
            else "not compiled, and slower: a C++ compiler or Python's headers are missing "
            "(apt-get install g++ python3-dev)",
        ]

    def _out_of_memory(self) -> ExhaustedError:
        sizes = micro_batch_sizes(self.plan.windows_per_step, self.plan.ranks)
        smaller = [size for size in sizes if size < self.plan.micro_batch_size]
        advice = f"set TRAIN_MICRO_BATCH_SIZE={smaller[-1]}" if smaller else "use a smaller model"
        return ExhaustedError(
            f"{self.device.name} has too little memory for micro-batches of "
            f"{self.plan.micro_batch_size} windows",
            f"{advice}; the run stays the same run",
        )


def _compile_extent(settings: Settings, device: Device, model: GPT) -> Extent | None:
    chosen = settings.train
    if chosen.compile == "false" or not can_compile(device):
        return None
    if chosen.compile != "auto":
        return chosen.compile
    if device.torch_device.type == "cpu":
        return suitable_extent(None)
    # Of the whole run, so that a continued one is compiled alike.
    tokens = chosen.max_steps * chosen.tokens_per_step
    at_half_the_peak = 2 * model.flops_per_token() / (device.peak_flops or 100e12)
    return suitable_extent(tokens * at_half_the_peak)


def _micro_batch_size(settings: Settings, run: Run, device: Device, config: GPTConfig) -> int:
    length, asked = settings.model.context_length, settings.train.micro_batch_size
    windows_per_step = settings.train.tokens_per_step // length
    sizes = micro_batch_sizes(windows_per_step, ranks=1)
    if asked == "auto":
        # The same split of the batch keeps a continued run bit-identical.
        before = run.resumed_from.state["micro_batch_size"] if run.resumed_from else None
        here = device.torch_device
        compiled = settings.train.compile != "false" and can_compile(device)
        need = memory_need(config, device.precision, here.type, compiled=compiled)
        return before if before in sizes else largest_micro_batch(sizes, length, need, here)
    if asked not in sizes:
        raise UserError(
            f"TRAIN_MICRO_BATCH_SIZE={asked} does not divide the {windows_per_step} windows "
            "of a step (TRAIN_TOKENS_PER_STEP / MODEL_CONTEXT_LENGTH)",
            f"choose one of: {', '.join(map(str, sizes))}",
        )
    return asked
