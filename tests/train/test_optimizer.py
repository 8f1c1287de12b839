from typing import Literal

import pytest
import torch

from app.model.gpt import GPT, GPTConfig
from app.settings.train import TrainSettings
from app.train.muon import Muon
from app.train.optimizer import build_optimizers


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize(("decay_on", "kept"), (("matrices", True), ("all", False)))
def test_biases_and_norms_decay_only_with_decay_on_all(
    optimizer: Literal["adamw", "muon"], decay_on: Literal["matrices", "all"], kept: bool
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    cfg = TrainSettings(optimizer=optimizer, weight_decay=0.5, weight_decay_on=decay_on)
    optimizers = build_optimizers(model, cfg)
    optimizers.set_learning_rate(0.1)
    optimizers.step()
    for name, parameter in model.named_parameters():
        expected = 1.0 if kept and parameter.ndim < 2 else 0.95
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), msg=name)


def test_muon_updates_the_matrices_of_the_blocks_orthogonally() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = build_optimizers(model, TrainSettings(weight_decay=0.0))
    optimizers.set_learning_rate(0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        is_matrix_of_a_block = ".h." in name and parameter.ndim == 2
        assert ("momentum_buffer" in optimizers.state(parameter)) == is_matrix_of_a_block, name
        if is_matrix_of_a_block:
            values = torch.linalg.svdvals(parameter.detach() - before[name])
            # Five Newton-Schulz steps bring all singular values near one common value.
            assert values.max() < 2 * values.min(), name


@pytest.mark.parametrize("shape", ((24, 24), (16, 48), (48, 16)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_muon_equals_torchs_muon_but_for_rounding(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for _ in range(3)]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.clone()) for value in start]
    one = Muon(ours, lr=0.02, weight_decay=0.3, dtype=dtype)
    other = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for mine, their in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(shape)
            their.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, their, first in zip(ours, theirs, start, strict=True):
        moved = (their - first).norm()
        assert (mine - their).norm() < 0.02 * moved
