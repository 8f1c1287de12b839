from typing import Literal

import pytest
import torch

from app.model.gpt import GPT, GPTConfig
from app.model.qwen3 import Qwen3, Qwen3Config
from app.settings.train import TrainSettings
from app.train.muon import Muon
from app.train.optimizer import build_optimizers


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize(
    ("decay_on", "kept"),
    (("blocks", ("vector", "embedding")), ("matrices", ("vector",)), ("all", ())),
)
def test_biases_and_norms_decay_only_with_decay_on_all(
    optimizer: Literal["adamw", "muon"],
    decay_on: Literal["blocks", "matrices", "all"],
    kept: tuple[str, ...],
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    cfg = TrainSettings(optimizer=optimizer, weight_decay=0.5, weight_decay_on=decay_on)
    optimizers = build_optimizers(model, cfg)
    optimizers.begin_step(0, 0.1)
    optimizers.step()
    for name, parameter in model.named_parameters():
        kind = "vector" if parameter.ndim < 2 else "matrix" if ".h." in name else "embedding"
        expected = 1.0 if kind in kept else 0.95
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), msg=name)


def test_muon_updates_the_matrices_of_the_blocks_orthogonally() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = build_optimizers(model, TrainSettings(weight_decay=0.0))
    optimizers.begin_step(0, 0.1)
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


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_embeddings_may_have_a_learning_rate_of_their_own(
    optimizer: Literal["adamw", "muon"],
) -> None:
    """AdamW's first update is the learning rate, whatever the gradient."""
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg = TrainSettings(
        optimizer=optimizer, learning_rate=0.1, embedding_learning_rate=0.25, weight_decay=0
    )
    optimizers = build_optimizers(model, cfg)
    optimizers.begin_step(0, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or ".h." not in name:
            update = 0.01 if parameter.ndim < 2 else 0.025
            torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, update))


def updated(gradients: list[torch.Tensor], stacked: int) -> torch.Tensor:
    """Return a matrix, first zero, after Muon's updates by these gradients."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    muon = Muon([parameter], lr=0.02, stacked=stacked)
    for gradient in gradients:
        parameter.grad = gradient
        muon.step()
    return parameter.detach()


@pytest.mark.parametrize(("stacked", "rows"), ((3, 16), (2, 40), (2, 8)))
def test_muon_updates_stacked_matrices_as_if_each_were_stored_alone(
    stacked: int, rows: int
) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(stacked * rows, 16) for _ in range(3)]
    together = updated(gradients, stacked)
    parts = zip(*(gradient.split(rows) for gradient in gradients), strict=True)
    alone = [updated(list(part), 1) for part in parts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    assert (together - updated(gradients, stacked=1)).norm() > 0.1 * together.norm()


@pytest.mark.parametrize("split", (True, False))
def test_muon_splits_q_k_and_v_of_the_model(split: bool) -> None:
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    optimizers = build_optimizers(model, TrainSettings(muon_split=split))
    stacked = {
        id(parameter): group["stacked"]
        for group in optimizers.parts[1].param_groups
        for parameter in group["params"]
    }
    c_attn = model.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert stacked.pop(id(c_attn)) == (3 if split else 1)
    assert set(stacked.values()) == {1}


@pytest.mark.parametrize("tied", (True, False))
def test_an_output_layer_of_its_own_is_trained_as_an_embedding(tied: bool) -> None:
    model = Qwen3(Qwen3Config(8, 50, 1, 8, 2, 4, tie_embeddings=tied))
    cfg = TrainSettings(
        learning_rate=1e-3,
        embedding_learning_rate=3e-3,
        weight_decay_on="blocks",
        muon_split=True,
    )
    optimizers = build_optimizers(model, cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = (
        [{names[id(it)] for it in group["params"]} for group in part.param_groups]
        for part in optimizers.parts
    )
    of_embeddings = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert of_embeddings in adamw
    ratios = [group["lr_ratio"] for group in optimizers.parts[0].param_groups]
    assert ratios[adamw.index(of_embeddings)] == pytest.approx(3)
    layer = "model.layers.0."
    stacked = {group["stacked"]: group["params"] for group in optimizers.parts[1].param_groups}
    assert {
        count: {names[id(it)].removeprefix(layer) for it in parameters}
        for count, parameters in stacked.items()
    } == {
        1: {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
        2: {"mlp.gate_up_proj.weight"},
        3: {"self_attn.qkv_proj.weight"},
    }
    assert sum(map(len, (*adamw, *muon))) == len(names)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_skipped_step_changes_nothing_and_leaves_a_state_to_save(
    optimizer: Literal["adamw", "muon"],
) -> None:
    torch.manual_seed(0)
    models = [GPT(GPTConfig(8, 50, 1, 8, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    cfg = TrainSettings(optimizer=optimizer)
    updated, skipping = (build_optimizers(model, cfg) for model in models)
    for step, skips in enumerate((True, False, True, False)):
        for model, optimizers in zip(models, (updated, skipping), strict=True):
            optimizers.begin_step(step, 0.1)
            for index, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        if skips:
            skipping.skip_step()
            assert all(parameter.grad is None for parameter in models[1].parameters())
        else:
            updated.step()
            skipping.step()
        for name, parameter in models[1].named_parameters():
            state, empty = skipping.state(parameter), skipping.empty_state(parameter)
            assert {slot: (it.shape, it.dtype) for slot, it in state.items()} == {
                slot: (it.shape, it.dtype) for slot, it in empty.items()
            }, name
    whole = [
        dict(optimizers.named_state(model)) | model.state_dict()
        for model, optimizers in zip(models, (updated, skipping), strict=True)
    ]
    torch.testing.assert_close(*whole, rtol=0, atol=0)


def test_muons_momentum_rises_during_its_warm_up() -> None:
    model = GPT(GPTConfig(8, 50, 1, 8, 2))
    optimizers = build_optimizers(model, TrainSettings(momentum_warmup_steps=4))
    momenta = []
    for step in range(6):
        optimizers.begin_step(step, 0.01)
        momenta.append(optimizers.parts[1].param_groups[0]["momentum"])
    assert momenta == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert all(group.get("momentum", 0) == 0 for group in optimizers.parts[0].param_groups)


@pytest.mark.parametrize("shape", ((24, 24), (16, 48), (48, 16)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
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
            # In fp16 itself, gradients as small as those of a real run would be lost.
            mine.grad = 1e-6 * torch.randn(shape)
            their.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, their, first in zip(ours, theirs, start, strict=True):
        moved = (their - first).norm()
        assert (mine - their).norm() < 0.02 * moved
