"""The file that helps to find out why a loss is no longer finite."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from app.files import write_json


def write_diagnosis(
    run_dir: Path, step: int, problem: str, windows: Sequence[int], model: nn.Module
) -> Path:
    """Write not-finite-STEP.json: the batch's windows, and norms tensor by tensor.

    Args:
        step: whose update was not made; its gradients are still there.
        problem: what is not finite.
        windows: of the step, in the token stream of the training split.

    Returns:
        the file.
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
    path = run_dir / f"not-finite-{step:06d}.json"
    found = {"step": step, "problem": problem, "tensors": tensors, "windows": list(windows)}
    write_json(path, found)
    return path


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
