import pytest
import torch

from app.model.gpt import GPT, GPTConfig
from app.settings.train import ModelSettings
from app.tools.doctor.machine import count_parameters


@pytest.mark.parametrize(
    "settings",
    (
        ModelSettings(),
        ModelSettings(context_length=32, num_layers=3, embd_size=48, num_heads=4),
    ),
)
def test_the_parameter_count_is_the_models(settings: ModelSettings) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings.model_dump()))
    assert count_parameters(settings) == model.num_parameters()
