import pytest
import torch

from app.model.gpt import GPT, GPTConfig
from app.settings.train import ModelSettings
from app.tools.doctor.inputs import check_dataset
from app.tools.doctor.machine import check_space, count_parameters
from tests.tools.doctor.conftest import NewContext


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


def test_the_disk_row_has_what_is_left_to_write(new_context: NewContext) -> None:
    """The shards are there, and so is a part of the checkpoints."""
    context = new_context()
    assert list(check_dataset(context))
    (row,) = check_space(context)
    assert "(0 KB of shards, " in row.found
    assert " of 4 checkpoints, 300 MB of caches)" in row.found
    before = context.disk_bytes
    assert before is not None
    filler = context.settings.run_dir / "checkpoints" / "filler"
    filler.write_bytes(bytes(100_000))
    list(check_space(context))
    assert context.disk_bytes == before - 100_000
