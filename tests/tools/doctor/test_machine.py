import pytest
import torch

from app.model.gpt import GPT, GPTConfig
from app.settings.train import ModelSettings
from app.tools.doctor.machine import count_parameters, cpu_quota


@pytest.mark.parametrize(
    ("text", "cores"),
    (("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("", None)),
)
def test_the_quota_of_a_control_group_is_read(text: str, cores: float | None) -> None:
    """The format of cpu.max: Linux, Documentation/admin-guide/cgroup-v2.rst."""
    assert cpu_quota(text) == cores


@pytest.mark.parametrize(
    "settings",
    (
        ModelSettings(),
        ModelSettings(context_length=32, num_layers=3, embd_size=48, num_heads=4),
    ),
)
def test_parameters_are_counted_as_the_model_has_them(settings: ModelSettings) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings.model_dump()))
    assert count_parameters(settings) == model.num_parameters()
