"""The micro-batch size: the largest size that fits in memory and still speeds up training."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from app.data.sequences import micro_batch_sizes
from app.errors import UserError
from app.hardware.device import Device
from app.hardware.memory import MemoryEstimate, available_bytes, largest_batch_that_fits
from app.model.architectures import build_model
from app.model.language_model import LanguageModel, ModelConfig
from app.runs.checkpoint_state import CheckpointState
from app.settings.train import TrainSettings

_LIBRARIES_BYTES = {"cuda": 1_500_000_000, "mps": 1_500_000_000, "cpu": 500_000_000}
# Logits and their gradients. Compiled for a GPU they share their memory, and fp8 adds two copies;
# compiled for a CPU, or in fp16, both exist, plus room for a third copy; uncompiled, float32 copies
# of each.
_BYTES_PER_LOGIT = {
    "cuda": {"bf16": 2, "fp16": 6, "fp8": 4, "float32": 4},
    "cpu": {"bf16": 6, "fp16": 6, "float32": 12},
    "uncompiled": {"bf16": 14, "fp16": 14, "fp8": 14, "float32": 16},
}
# A weight and its gradient, in float32; where main memory is the device's, also the checkpoint
# snapshot of the weight and its optimizer state.
_BYTES_PER_PARAMETER = {"cuda": 8, "mps": 20, "cpu": 20}
RECOMPUTE_NOTE = (
    "activations are computed again in the backward pass, to save memory: steps take about a third "
    "longer (TRAIN_RECOMPUTE)"
)
# Two moments in float32.
_STATE_BYTES_PER_PARAMETER = 8


def fit_to_memory(
    cfg: TrainSettings,
    config: ModelConfig,
    before: CheckpointState | None,
    device: Device,
    world_size: int,
    local_size: int,
) -> tuple[TrainSettings, int]:
    """Return the settings with `recompute` decided, and the micro-batch size of each rank.

    `auto` recomputes activations if a micro-batch of 1 does not fit otherwise, or if the run has
    done so before.

    Args:
        before: state of the checkpoint that the run continues from, if any.
        local_size: ranks on this machine, which share its memory.

    Raises:
        UserError: the step cannot be divided among the ranks, or into the requested micro-batches.
    """
    sequences_per_step = cfg.tokens_per_step // config.context_length
    sizes = micro_batch_sizes(sequences_per_step, world_size)
    if not sizes:
        counts = [count for count in range(1, world_size) if sequences_per_step % count == 0]
        raise UserError(
            f"the {sequences_per_step} sequences of a step (TRAIN_TOKENS_PER_STEP / "
            f"MODEL_CONTEXT_LENGTH) cannot be divided evenly among {world_size} processes",
            f"set TRAIN_PROCESSES to one of {', '.join(map(str, counts))} (with torchrun: --nnodes "
            "times --nproc-per-node), or change TRAIN_TOKENS_PER_STEP",
        )
    requested = cfg.micro_batch_size
    if requested not in ("auto", *sizes):
        raise UserError(
            f"TRAIN_MICRO_BATCH_SIZE={requested} does not divide the "
            f"{sequences_per_step // world_size} sequences of a step"
            f"{' that each process has' if world_size > 1 else ''} "
            "(TRAIN_TOKENS_PER_STEP / MODEL_CONTEXT_LENGTH)",
            f"choose one of: {', '.join(map(str, sizes))}",
        )
    available = available_bytes(device.torch_device, local_size)
    estimate = estimate_memory(cfg, config, device, world_size)
    if cfg.recompute == "auto":
        has_recomputed = before and before.settings.get("train", {}).get("recompute") == "true"
        recompute = "false" if estimate.fits(1, available) and not has_recomputed else "true"
        cfg = cfg.model_copy(update={"recompute": recompute})
        if recompute == "true":
            estimate = estimate_memory(cfg, config, device, world_size)
    if requested != "auto":
        return cfg, requested
    # The same micro-batches keep a continued run bit-identical.
    if before and before.micro_batch_size in sizes:
        return cfg, before.micro_batch_size
    device_type, length = device.torch_device.type, config.context_length
    return cfg, largest_batch_that_fits(sizes, length, estimate, device_type, available)


def estimate_memory(
    cfg: TrainSettings, config: ModelConfig, device: Device, world_size: int
) -> MemoryEstimate:
    """Return an upper bound on each rank's training memory, without running the model.

    The blocks are counted as uncompiled code keeps them for the backward pass; compiled code keeps
    less of them.
    """
    precision, device_type = device.precision, device.torch_device.type
    with FakeTensorMode():
        model = build_model(config, bf16_residual=cfg.residual == "bf16")
        model.recompute = cfg.recompute == "true"
        one, two = (_activation_bytes(model, device, batch_size) for batch_size in (1, 2))
    parameters = model.num_parameters()
    # One shard may be larger than another by the largest parameter, the embedding.
    shards = world_size if cfg.shard_optimizer else 1
    largest_shard = parameters // shards + config.vocab_size * config.embd_size
    fixed = _BYTES_PER_PARAMETER[device_type] * parameters + (2 * one - two)
    fixed += _STATE_BYTES_PER_PARAMETER * min(parameters, largest_shard)
    # Code for Apple's GPU is never compiled.
    code = device_type if cfg.compile and device_type != "mps" else "uncompiled"
    logits = config.context_length * config.vocab_size
    head = _BYTES_PER_LOGIT[code][precision] * logits
    return MemoryEstimate(fixed + _LIBRARIES_BYTES[device_type], two - one + head)


def _activation_bytes(model: LanguageModel, device: Device, batch_size: int) -> int:
    """Count the bytes of activations that the embedding and blocks save for backward.

    If they are recomputed, that is the input of every block, and what one of them saves.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, tuple[Tensor, int]] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            # The tensor itself is kept too, so that no later storage gets its address.
            saved[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with (
        saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=device.precision != "float32"),
    ):
        x = model.embed(torch.zeros(batch_size, model.config.context_length, dtype=torch.int64))
        inputs_bytes = len(model.blocks) * x.nbytes if model.recompute else 0
        for block in model.blocks[:1] if model.recompute else model.blocks:
            x = block(x)
    return inputs_bytes + sum(size for _, size in saved.values())
