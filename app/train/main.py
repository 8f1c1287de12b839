"""One rank of a run, from its settings to its exit."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from app.data.dataset import Dataset
from app.distributed.world import init_world, local_rank
from app.errors import ExitWithCode, NotFiniteError, Stopped
from app.files import json_value
from app.hardware.device import Device, matmul_flops, select_device
from app.model.architectures import build_config, build_model
from app.runs.folder import RunFolder
from app.settings.settings import Settings
from app.settings.train import TrainSettings
from app.train.advice import MAX_MFU, advise_on_duration
from app.train.compile import compile_note, compile_problem, set_compile_cache_dir
from app.train.init_from import with_initial_weights
from app.train.micro_batch import RECOMPUTE_NOTE, fit_to_memory
from app.train.start import (
    Start,
    find_branch,
    open_same_data,
    open_training_data,
    plan_start,
    print_next_step,
    warn,
)
from app.train.stopping import stop_on_signals
from app.train.trainer import Trainer


def train(settings: Settings, dataset: Dataset | None = None, start: Start | None = None) -> None:
    """Train a run from its last checkpoint to its last step, as one of its ranks.

    Args:
        dataset, start: pass both if the caller has already opened the dataset, planned the start
            and locked the run.

    Raises:
        UserError: data, run folder or settings do not fit.
        NotFiniteError: the loss or the gradient norm is not finite.
        ExhaustedError: the micro-batch does not fit into the GPU's memory.
        OSError: the last checkpoint could not be saved; those before are unchanged.
        RankLostError: another rank has died or hangs.
        Stopped: SIGINT, SIGTERM or SIGHUP stopped the run, after a checkpoint.
        ExitWithCode: on other ranks, in place of an error that rank 0 reports.
    """
    cfg, run = settings.train, RunFolder(settings.run_dir)
    set_compile_cache_dir(settings.general.data_dir / "cache")
    device = select_device(cfg.device, cfg.precision, cfg.deterministic, local_rank())
    with (
        init_world(device.torch_device, cfg.rank_timeout_seconds) as world,
        stop_on_signals(quiet=local_rank() > 0) as stop,
        ExitStack() as stack,
    ):
        problem = world.first(compile_problem(device)) if cfg.compile else None
        if problem:
            cfg = cfg.model_copy(update={"compile": False})
            settings = settings.model_copy(update={"train": cfg})
        decision = None
        if world.is_rank_zero:
            # A wrong setting is reported once: the other ranks have not opened anything yet.
            if start is None:
                settings, weights = with_initial_weights(settings)
                dataset = open_training_data(settings)
                branch = find_branch(settings, dataset.fingerprint)
                # The other ranks wait at the broadcast below, with a limit of their own.
                wait_seconds = cfg.rank_timeout_seconds / 2 if world.restarted else 0
                stack.enter_context(run.lock(wait_seconds))
                start = plan_start(
                    settings, dataset, run, branch, weights, restarted=world.restarted
                )
            if start is not None:
                before = start.checkpoint.state if start.checkpoint else None
                was_compiled = before.settings.get("train", {}).get("compile") if before else None
                device = with_earlier_precision(device, cfg, run)
                note = compile_note(device, cfg.compile, problem, was_compiled)
                config = build_config(settings.model.shape())
                ranks = device, world.size, world.local_size
                cfg, micro_batch_size = fit_to_memory(cfg, config, before, *ranks)
                chosen = settings.model, device.precision, cfg.recompute, micro_batch_size
                decision = start, note, *chosen
        if (decision := world.broadcast(decision)) is None:
            return
        start, note, model, precision, recompute, micro_batch_size = decision
        device = replace(device, precision=precision)
        cfg = cfg.model_copy(update={"recompute": recompute})
        settings = settings.model_copy(update={"model": model, "train": cfg})
        if recompute == "true":
            note += f"\n{RECOMPUTE_NOTE}"
        dataset = dataset or open_same_data(settings, start.identity)
        rate = device.peak_flops or matmul_flops(device) if world.is_rank_zero else None
        steps = cfg.max_steps - (start.checkpoint.step if start.checkpoint else 0)
        if rate and steps > 0 and not world.restarted:
            with torch.device("meta"):
                flops = build_model(build_config(settings.model.shape())).flops_per_token()
            seconds = steps * cfg.tokens_per_step * flops / (MAX_MFU * rate * world.size)
            on_cpu = device.torch_device.type == "cpu"
            warn(advise_on_duration(cfg, seconds, steps, on_cpu=on_cpu))
        try:
            Trainer(
                settings, start, micro_batch_size, dataset, run, device, world, stop, note
            ).fit()
            if world.is_rank_zero:
                print_next_step(settings)
        except (NotFiniteError, Stopped) as error:
            if world.is_rank_zero:
                raise
            raise ExitWithCode(error.exit_code) from None


def with_earlier_precision(device: Device, cfg: TrainSettings, run: RunFolder) -> Device:
    """Return the device with the precision that `auto` chose for it when the run last started.

    On a CPU it measures, and may come to another result now.
    """
    last = partial(json_value, run.settings)
    is_same = last("settings", "train", "precision") == cfg.precision == "auto"
    if not is_same or last("device", "name") != device.name:
        return device
    return replace(device, precision=last("device", "precision"))
