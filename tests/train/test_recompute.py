"""Activations that are computed again in the backward pass: the same bits in less memory."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from app.distributed.data_parallel import DataParallelLoss
from app.distributed.world import World
from app.hardware.device import Device, Precision
from app.model.architectures import build_model
from app.model.gpt import GPTConfig
from app.model.language_model import LanguageModel, ModelConfig
from app.model.qwen3 import Qwen3Config
from app.settings.train import TrainSettings
from app.train.compile import compiled_loss
from app.train.loop import train_steps
from app.train.lr_schedule import LRSchedule
from app.train.main import train
from app.train.micro_batch import RECOMPUTE_NOTE, estimate_memory, fit_to_memory
from tests.distributed.ranks import Ranks
from tests.train.conftest import TinySettings
from tests.train.processes import assert_same_run
from tests.train.tiny_model import (
    SEQUENCES_PER_STEP,
    adamw,
    checkpoint_state,
    new_loader,
    new_model,
)

CONFIGS = {
    "gpt2": GPTConfig(32, 515, 4, 32, 2),
    "qwen3": Qwen3Config(32, 515, 4, 32, 2, head_dim=16),
}
CPU = torch.device("cpu")


def cpu(precision: Precision = "float32") -> Device:
    return Device(CPU, "CPU", precision, True, None)


def loss_and_gradients(
    config: ModelConfig, device: Device, *, recompute: bool, compiled: bool = False
) -> tuple[LanguageModel, dict[str, Tensor], int]:
    """Return a batch's loss with all gradients, and the bytes saved for the backward pass."""
    torch.manual_seed(0)
    model = build_model(config, bf16_residual=True)
    model.recompute = recompute
    loss_of = compiled_loss(model, device) if compiled else model
    tokens = torch.randint(515, (4, 33))
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor), device.forward_pass():
        loss = loss_of(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    loss.backward()
    gradients = {name: it.grad for name, it in model.named_parameters() if it.grad is not None}
    return model, gradients | {"loss": loss.detach()}, sum(saved.values())


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("precision", ("float32", "bf16", "fp16"))
def test_recomputing_gives_the_same_bits(architecture: str, precision: Precision) -> None:
    config, device = CONFIGS[architecture], cpu(precision)
    _, plain, whole = loss_and_gradients(config, device, recompute=False)
    model, recomputed, saved = loss_and_gradients(config, device, recompute=True)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert len(plain) == 1 + len(list(model.parameters()))
    assert saved < 0.6 * whole


@pytest.mark.slow
def test_recomputing_compiled_code_gives_the_same_bits() -> None:
    config, device = CONFIGS["gpt2"], cpu("bf16")
    _, plain, _ = loss_and_gradients(config, device, recompute=False, compiled=True)
    _, recomputed, _ = loss_and_gradients(config, device, recompute=True, compiled=True)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def weights_of_two_steps(rank: int, size: int, *, recompute: bool) -> Tensor:
    """Train on this rank, and return all weights."""
    world, model = World(rank, size, size), new_model()
    model.recompute = recompute
    schedule = LRSchedule(1e-2, "constant", 0, 2, 0.0)
    with new_loader(SEQUENCES_PER_STEP // 2) as loader:
        steps = train_steps(
            model,
            DataParallelLoss(model, model, CPU, world),
            adamw(model),
            loader,
            lambda: schedule,
            cpu(),
            world,
            first_step=0,
            accumulation_steps=2,
            grad_clip=1.0,
            should_stop=lambda _: False,
        )
        assert len(list(steps)) == 2
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def same_with_and_without(rank: int, size: int) -> bool:
    plain, recomputed = (
        weights_of_two_steps(rank, size, recompute=recompute) for recompute in (False, True)
    )
    return torch.equal(plain, recomputed)


@pytest.mark.processes
def test_several_ranks_recompute_too(ranks: Ranks) -> None:
    assert ranks.run(same_with_and_without) == [True, True]


def test_a_run_that_recomputes_goes_on_doing_so_and_is_the_same_run(
    tiny: TinySettings, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"TRAIN_LR_SCHEDULE": "constant", "TRAIN_VAL_EVERY": 0, "TRAIN_SAMPLE_EVERY": 0}
    settings = {name: tiny(**changes, TRAIN_RUN_NAME=name) for name in ("kept", "all")}
    train(settings["all"])
    assert RECOMPUTE_NOTE not in capsys.readouterr().out
    train(tiny(**changes, TRAIN_RUN_NAME="kept", TRAIN_RECOMPUTE="true", TRAIN_MAX_STEPS=4))
    assert RECOMPUTE_NOTE in capsys.readouterr().out.splitlines()
    train(settings["kept"])
    assert RECOMPUTE_NOTE in capsys.readouterr().out.splitlines()
    assert_same_run(settings["kept"].run_dir, settings["all"].run_dir)
    for name, expected in (("kept", "true"), ("all", "false")):
        stored = json.loads((settings[name].run_dir / "settings.json").read_text())
        assert stored["settings"]["train"]["recompute"] == expected


def test_only_a_model_whose_single_sequence_does_not_fit_is_recomputed() -> None:
    # Its blocks keep half a terabyte of a sequence.
    large = GPTConfig(65536, 50257, 50, 4096, 32)
    for config, previous, recompute, expected in (
        (CONFIGS["gpt2"], False, "auto", "false"),
        (large, False, "auto", "true"),
        (large, False, "false", "false"),
        (CONFIGS["gpt2"], True, "auto", "true"),
        (CONFIGS["gpt2"], True, "false", "false"),
        (CONFIGS["gpt2"], False, "true", "true"),
    ):
        cfg = TrainSettings(recompute=recompute)
        before = replace(
            checkpoint_state(1), settings={"train": {"recompute": str(previous).lower()}}
        )
        decided, _ = fit_to_memory(cfg, config, before, cpu(), 1, 1)
        assert decided.recompute == expected


def test_the_estimate_counts_the_inputs_of_blocks_and_one_block() -> None:
    configs = [GPTConfig(256, 50257, layers, 256, 4) for layers in (1, 2, 9)]

    def bytes_per_sequence(recompute: str, config: GPTConfig) -> int:
        cfg = TrainSettings(recompute=recompute)
        return estimate_memory(cfg, config, cpu("bf16"), 1).bytes_per_sequence

    one, two, nine = (bytes_per_sequence("true", config) for config in configs)
    # The residual stream of 256 tokens in 2 bytes.
    assert two - one == 256 * 256 * 2
    assert nine - two == 7 * (two - one)
    one_whole, _, nine_whole = (bytes_per_sequence("false", config) for config in configs)
    assert one == one_whole + 256 * 256 * 2
    assert nine_whole - one_whole > 12 * (nine - one)
