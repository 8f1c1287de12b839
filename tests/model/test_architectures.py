from typing import Any

import pytest

from app.model.architectures import build_config, build_model
from app.model.gpt import GPT, GPTConfig
from app.model.qwen3 import Qwen3, Qwen3Config

SIZES = {"context_length": 8, "vocab_size": 50, "num_layers": 1, "embd_size": 12, "num_heads": 2}
GPT2 = {"architecture": "gpt2", **SIZES}
QWEN3 = {"architecture": "qwen3", **SIZES, "head_dim": 4, "tie_embeddings": True}


def test_a_shape_names_the_class_of_config_and_model() -> None:
    gpt2, qwen3 = build_config(GPT2), build_config(QWEN3)
    assert gpt2 == GPTConfig(8, 50, 1, 12, 2)
    assert qwen3 == Qwen3Config(8, 50, 1, 12, 2, head_dim=4, tie_embeddings=True)
    assert (gpt2.head_dim, qwen3.head_dim) == (6, 4)
    for config, kind in ((gpt2, GPT), (qwen3, Qwen3)):
        model = build_model(config, bf16_residual=True, zero_init=True)
        assert type(model) is kind
        assert (model.config, model.bf16_residual) == (config, True)
        idx = model.embed(model.head_weight.new_zeros(1, 8).long())
        assert model.blocks[0](idx).equal(idx)


@pytest.mark.parametrize(
    ("shape", "fault"),
    (
        (QWEN3 | {"architecture": "llama"}, "there is no architecture 'llama'"),
        (QWEN3 | {"architecture": "gpt2"}, "only one of the two has head_dim, tie_embeddings of"),
        (GPT2 | {"rope_theta": 1e6}, "only one of the two has rope_theta of a model"),
        ({"architecture": "qwen3", **SIZES}, "only one of the two has head_dim, tie_embeddings of"),
        (GPT2 | {"num_heads": 5}, "5 heads do not divide a width of 12"),
        (QWEN3 | {"head_dim": 5}, "rotary positions turn pairs of values, and 5 is odd"),
    ),
)
def test_a_shape_that_no_model_here_has_is_refused(shape: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        build_config(shape)
