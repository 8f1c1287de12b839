"""From settings to a finished run: everything the loop needs is put together here, once."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import torch

from app.data.dataset import Dataset, open_dataset, verify_shards
from app.data.sequences import BatchPlan, SequenceOrder
from app.distributed.world import World, init_world, local_rank
from app.errors import ExitWithCode, NotFiniteError, Stopped, UserError
from app.hardware.device import Device, select_device
from app.model.gpt import GPT, GPTConfig
from app.runs.provenance import dataset_facts, write_run_settings
from app.runs.run import Identity, RunLogger
from app.settings.settings import Settings
from app.train.compile import is_compiled, set_compile_cache_dir
from app.train.micro_batch import choose_micro_batch_size
from app.train.optimizer import build_optimizers
from app.train.session import Session
from app.train.start import Start, open_training_data, plan_start, training_windows
from app.train.stopping import StopRequest, stop_on_signals


def train(settings: Settings, start: Start | None = None) -> None:
    """Train a run from where it is to its last step, as one of the processes that do.

    Args:
        start: where the run begins, if that is decided already.

    Raises:
        UserError: data, run folder or settings do not fit.
        NotFiniteError: the loss or the gradient norm is not a number.
        ExhaustedError: the GPU's memory is too small for the micro-batch.
        OSError: the last checkpoint could not be saved; those before are as they were.
        RankLostError: another process has died or hangs.
        Stopped: by SIGINT or SIGTERM, after a checkpoint.
        ExitWithCode: one of these, and the first rank says which.
    """
    chosen = settings.train
    set_compile_cache_dir(settings.general.data_dir / "cache")
    device = select_device(chosen.device, chosen.precision, chosen.deterministic, local_rank())
    with (
        init_world(device.torch_device, chosen.rank_timeout_seconds) as ranks,
        stop_on_signals() as stop,
        ExitStack() as owned,
    ):
        decided = None
        # On CPUs each rank has measured for itself what is faster.
        device = replace(device, precision=ranks.broadcast(device.precision))
        if ranks.is_rank_zero:
            # The first rank finds what is wrong with data, settings or run before the others look.
            if start is None:
                dataset = open_training_data(settings)
                start = plan_start(settings, dataset, owned, restarted=ranks.restarted)
            if start is not None:
                before = start.checkpoint.state["micro_batch_size"] if start.checkpoint else None
                config = GPTConfig(**settings.model.model_dump())
                sizes = ranks.size, ranks.local_size
                decided = start, choose_micro_batch_size(chosen, config, before, device, *sizes)
        decided = ranks.broadcast(decided)
        if decided is None:
            return
        check = _check_of_shards(settings, owned) if ranks.is_rank_zero else None
        try:
            _put_together(settings, device, ranks, stop, *decided, check).work()
        except (NotFiniteError, Stopped) as ending:
            if ranks.is_rank_zero:
                raise
            raise ExitWithCode(ending.exit_code) from None


def _check_of_shards(settings: Settings, owned: ExitStack) -> Future[None]:
    """Compare all hashes beside the first steps: of a large dataset it takes a while."""

    def check() -> None:
        threads = min(4, os.cpu_count() or 1)
        for _ in verify_shards(settings.train_dataset_dir, threads):
            pass

    thread = ThreadPoolExecutor(1, thread_name_prefix="check")
    owned.callback(thread.shutdown, wait=False)
    return thread.submit(check)


def refuse_another_data_dir(settings: Settings, dataset: Dataset, of_first: Identity) -> None:
    """Raise UserError if this machine's DATA_DIR is not that of the first rank's machine."""
    if dataset.fingerprint != of_first.dataset_fingerprint:
        problem = f"{dataset.folder} has other tokens here than on the first machine"
    elif not settings.run_dir.is_dir():
        problem = f"{settings.run_dir} is not here, but on the first machine"
    else:
        return
    raise UserError(problem, "mount one folder as DATA_DIR on all machines")


def _put_together(
    settings: Settings,
    device: Device,
    ranks: World,
    stop: StopRequest,
    start: Start,
    micro_batch_size: int,
    check: Future[None] | None,
) -> Session:
    chosen = settings.train
    dataset = open_dataset(settings.train_dataset_dir)
    refuse_another_data_dir(settings, dataset, start.identity)
    config = GPTConfig(**settings.model.model_dump())
    plan = BatchPlan(chosen.tokens_per_step // config.context_length, ranks.size, micro_batch_size)
    torch.manual_seed(chosen.seed)
    model = GPT(config, bf16_residual=chosen.residual == "bf16").to(device.torch_device)
    optimizers = build_optimizers(model, chosen, device.dtype)
    if chosen.shard_optimizer and ranks.size > 1:
        from app.train.sharded_optimizer import ShardedOptimizers

        optimizers = ShardedOptimizers(optimizers)
    if start.checkpoint:
        start.checkpoint.load_model(model)
        start.checkpoint.load_optimizers(model, optimizers)
    # Before settings.json: a damaged log changes nothing.
    log = RunLogger(settings.run_dir, start.checkpoint) if ranks.is_rank_zero else None
    if ranks.is_rank_zero:
        facts = {
            "device": device.facts(),
            "dataset": dataset_facts(dataset),
            "processes": ranks.size,
            "parameters": model.num_parameters(),
        }
        write_run_settings(settings.run_dir, settings.public(), facts)
    windows = training_windows(dataset, config.context_length)
    return Session(
        settings=settings,
        ranks=ranks,
        device=device,
        dataset=dataset,
        order=SequenceOrder(windows, chosen.seed, chosen.shuffle),
        plan=plan,
        model=model,
        optimizers=optimizers,
        compiled=is_compiled(chosen.compile, device),
        stop=stop,
        start=start,
        check=check,
        log=log,
    )
