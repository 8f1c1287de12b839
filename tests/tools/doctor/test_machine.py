import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.model.architectures import build_config, build_model
from app.settings.train import ModelSettings
from app.tools.doctor.inputs import check_dataset
from app.tools.doctor.machine import check_space
from app.train.advice import count_parameters
from tests.lacking import lacking
from tests.tools.doctor.conftest import NewContext


@pytest.mark.parametrize(
    "settings",
    (
        ModelSettings(),
        ModelSettings(context_length=32, num_layers=3, embd_size=48, num_heads=4),
        ModelSettings(architecture="qwen3", num_heads=6, head_dim=128),
        ModelSettings(architecture="qwen3", num_layers=3, embd_size=48, tie_embeddings="true"),
    ),
)
def test_the_parameter_count_is_the_models(settings: ModelSettings) -> None:
    with torch.device("meta"):
        model = build_model(build_config(settings.shape()))
    assert count_parameters(settings) == model.num_parameters()


def test_the_disk_row_has_what_is_left_to_write(new_context: NewContext) -> None:
    """The shards are there, and so is a part of the checkpoints."""
    context = new_context()
    assert list(check_dataset(context))
    (row,) = check_space(context)
    assert "(0 KB of shards, " in row.found
    assert " of 3 checkpoints, 300 MB of caches)" in row.found
    before = context.disk_bytes
    assert before is not None
    filler = context.settings.run_dir / "checkpoints" / "filler"
    filler.write_bytes(bytes(100_000))
    list(check_space(context))
    assert context.disk_bytes == before - 100_000


FOLDERS = """
from app.settings.sources import load_settings
from app.tools.doctor.checks import Context
from app.tools.doctor.machine import check_folders
for finding in check_folders(Context(load_settings({}, "doctor"))):
    print(finding.status, finding.found)
"""


@pytest.mark.parametrize(
    ("calls", "row"),
    (
        ({}, "pass {} can be written by user {}"),
        (
            {"lock": errno.ENOSYS, "fsync_folder": errno.EOPNOTSUPP},
            "warn {} can be written by user {}; its file system has no flock: the lock of a "
            "process that dies on another machine or in another container stays, until you delete "
            "the folder that the error names; it cannot fsync a folder: a power failure may undo "
            "what was renamed last",
        ),
    ),
)
def test_what_the_disk_lacks_is_named(tmp_path: Path, calls: dict[str, int], row: str) -> None:
    variables = {
        "DATA_DIR": str(tmp_path),
        **lacking(tmp_path, **calls),
    }
    command = [sys.executable, "-c", FOLDERS]
    environment = os.environ | variables
    printed = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout == row.format(tmp_path, os.getuid()) + "\n"
    assert not any(tmp_path.iterdir())
