"""Reports of a loss that is not finite and of exhausted memory."""

import math
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from app.data.sequences import BatchPlan, micro_batch_sizes
from app.errors import ExhaustedError, NotFiniteError
from app.files import write_json
from app.hardware.device import Device
from app.runs.folder import RunFolder


def write_diagnosis(
    run: RunFolder, error: NotFiniteError, step: int, sequences: Sequence[int], model: nn.Module
) -> NotFiniteError:
    """Write not-finite-STEP.json: the batch, and the norms of each tensor.

    Args:
        error: what is not finite.
        step: the step, whose update was skipped; its gradients are still there.
        sequences: the step's sequences in the token stream of the training split.

    Returns:
        the error, with the file's path and the point from which the run restarts.
    """
    tensors = {
        name: {
            "weight_norm": _json(parameter.detach().norm().item()),
            "gradient_norm": None
            if parameter.grad is None
            else _json(parameter.grad.norm().item()),
        }
        for name, parameter in model.named_parameters()
    }
    path = run.path / f"not-finite-{step:06d}.json"
    problem = error.problem
    # A full disk does not hide what has happened.
    with suppress(OSError):
        write_json(
            path,
            {"step": step, "problem": problem, "tensors": tensors, "windows": list(sequences)},
        )
        problem = f"{problem}; {path} has the batch and all norms"
    last = run.last_saved()
    if last is None:
        return NotFiniteError(problem, f"{error.fix}; the run restarts from the beginning")
    return NotFiniteError(problem, f"{error.fix}; the run continues from {last}")


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def out_of_memory(device: Device, plan: BatchPlan) -> ExhaustedError:
    """Return the error that names the next smaller micro-batch."""
    sizes = micro_batch_sizes(plan.sequences_per_step, plan.world_size)
    smaller = [size for size in sizes if size < plan.micro_batch_size]
    advice = f"set TRAIN_MICRO_BATCH_SIZE={smaller[-1]}" if smaller else "use a smaller model"
    return ExhaustedError(
        f"{device.name} ran out of memory with a micro-batch of {plan.micro_batch_size} sequences",
        f"{advice}; the run continues with it",
    )
