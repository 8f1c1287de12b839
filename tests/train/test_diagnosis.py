import json
import math
from pathlib import Path

import pytest

from app.data.sequences import BatchPlan
from app.errors import NotFiniteError
from app.runs.folder import RunFolder
from app.train.diagnosis import out_of_memory, write_diagnosis
from tests.train.tiny_model import CPU, new_model

ERROR = NotFiniteError("step 3: loss nan", "lower TRAIN_LEARNING_RATE")


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "advice"),
    (
        (12, 1, "set TRAIN_MICRO_BATCH_SIZE=6"),
        (6, 1, "set TRAIN_MICRO_BATCH_SIZE=4"),
        (6, 2, "set TRAIN_MICRO_BATCH_SIZE=3"),
        (1, 1, "use a smaller model"),
    ),
)
def test_out_of_memory_names_the_next_smaller_micro_batch(
    micro_batch_size: int, world_size: int, advice: str
) -> None:
    error = out_of_memory(CPU, BatchPlan(12, world_size, micro_batch_size))
    assert f"a micro-batch of {micro_batch_size} sequences" in error.problem
    assert error.fix == f"{advice}; the run continues with it"


def test_a_diagnosis_has_the_batch_and_the_norms_of_each_tensor(tmp_path: Path) -> None:
    model = new_model()
    parameters = dict(model.named_parameters())
    name = "transformer.ln_f.weight"
    parameters[name].data[3] = math.inf
    parameters[name].grad = parameters[name].data.clone().fill_(2.0)
    error = write_diagnosis(RunFolder(tmp_path), ERROR, 3, [5, 1], model)

    path = tmp_path / "not-finite-000003.json"
    assert error.problem == f"step 3: loss nan; {path} has the batch and all norms"
    assert error.fix == "lower TRAIN_LEARNING_RATE; the run restarts from the beginning"
    diagnosis = json.loads(path.read_text())
    assert (diagnosis["step"], diagnosis["windows"]) == (3, [5, 1])
    assert diagnosis["tensors"].keys() == parameters.keys()
    norm = 2.0 * math.sqrt(8)
    assert diagnosis["tensors"][name] == {
        "weight_norm": "inf",
        "gradient_norm": pytest.approx(norm),
    }
    assert diagnosis["tensors"]["transformer.wte.weight"]["gradient_norm"] is None


def test_a_disk_that_refuses_the_diagnosis_does_not_hide_the_error(tmp_path: Path) -> None:
    error = write_diagnosis(RunFolder(tmp_path / "missing"), ERROR, 3, [5, 1], new_model())
    assert error.problem == "step 3: loss nan"
