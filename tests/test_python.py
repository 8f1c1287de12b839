"""Python's functions: prepare and train in processes of their own, and a trained model."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from app.errors import UserError
from app.python import load, prepare, train
from app.runs.checkpoint import open_checkpoint
from tests.newcomer import settle
from tests.python_process import run_python
from tests.tools.small_run import RUN, SETTINGS
from tests.tools.written_run import write_run


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


@pytest.mark.parametrize("package", ("app", "gpt_compose"))
def test_the_functions_are_imported_when_they_are_used(package: str) -> None:
    program = (
        f"import sys, {package}\n"
        f"assert 'app.python' not in sys.modules\n"
        f"from {package} import load, prepare, train\n"
        "assert 'torch' not in sys.modules\n"
        f"print(train.__module__, {package}.load.__name__, hasattr({package}, 'sample'))\n"
    )
    ended = run_python(program)
    assert ended.stdout == "app.python load False\n", ended.stderr


@pytest.mark.usefixtures("newcomer")
def test_wrong_input_raises_an_error_with_a_fix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^train has no setting 'max_step'; did you mean max_st"):
        train(max_step=3)
    with pytest.raises(UserError) as raised:
        train(max_steps="x", seed=-1, betas=[0.9, 2])
    assert raised.value.problem.startswith("3 settings are wrong:\n  TRAIN_MAX_STEPS=x")
    assert "TRAIN_BETAS=0.9,2 (flag --betas): must be less than 1" in raised.value.problem
    assert raised.value.fix.startswith("correct them; ")
    with pytest.raises(UserError, match="there is no file or folder nothing"):
        prepare("nothing.txt")
    with pytest.raises(UserError, match="there is no run"):
        load("nothing")
    # The exception says it.
    assert "error: " not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("newcomer")
def test_a_model_is_trained_loaded_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".env").write_text(SETTINGS, "utf-8")
    dataset = prepare()
    assert dataset == Path("data/words").absolute()
    # An argument counts before .env.
    run = train(dataset_dir=dataset, max_steps=10, shuffle=False)
    assert run.folder == RUN.absolute()
    assert [record.step for record in run.metrics] == list(range(10))
    assert run.val_loss == run.metrics[-1].val_loss is not None
    assert "step:9/10 train_loss:" in capsys.readouterr().out

    trained, by_name = load(run.folder), load("small", step=10)
    text = "def add(first, second):\n    return first + second\n" * 6
    tokens = trained.tokens(text)
    length = trained.model.config.context_length
    assert tokens.shape[1] > length + 1
    assert trained.tokenizer.decode(tokens[0, 1:].tolist()) == text
    with torch.no_grad():
        logits = [
            by_name.model(tokens[:, first : first + length])
            for first in range(0, tokens.shape[1] - 1, length)
        ]
    expected = F.cross_entropy(torch.cat(logits, 1)[0, : tokens.shape[1] - 1], tokens[0, 1:])
    assert trained.loss(text) == pytest.approx(float(expected), rel=1e-5)
    one, two = trained.generate("class", num_samples=2, max_tokens=4)
    assert one.startswith("class")
    assert one != two
    assert by_name.generate("class", max_tokens=4, num_samples=2) == [one, two]
    for wrong in ({"num_samples": 0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is "):
            trained.generate("class", **wrong)


@pytest.mark.usefixtures("newcomer")
def test_the_best_checkpoint_is_loaded_if_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path("data/runs/two")
    best, last = write_run(run, step=1), write_run(run, step=2, seed=1)
    folder = run / "checkpoints/step-000002"
    replace(open_checkpoint(folder).state, val_loss=5.0).write(folder)
    for variable, model in (("false", last), ("true", best)):
        monkeypatch.setenv("TRAIN_USE_BEST", variable)
        assert load("two", device="cpu").model.head_weight.equal(model.head_weight)


TRAIN_LONG = """\
from app import prepare, train
prepare()
try:
    train(max_steps=100_000)
except KeyboardInterrupt:
    print("the notebook goes on")
"""


def start_long_training() -> subprocess.Popen[str]:
    """Start the script, and return once a step is done."""
    Path(".env").write_text(SETTINGS, "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step:1/"):
            break
    return process


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("send", (os.kill, os.killpg), ids=("notebook", "terminal"))
def test_ctrl_c_saves_a_checkpoint(send: Callable[[int, int], None]) -> None:
    process = start_long_training()
    send(process.pid, signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode == 0
    assert rest.endswith("the same command continues\nthe notebook goes on\n")
    assert list(Path("data/runs/small/checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("newcomer")
def test_sigterm_saves_a_checkpoint_and_ends_the_script() -> None:
    process = start_long_training()
    process.terminate()
    rest, _ = process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert rest.endswith("the same command continues\n")
    assert list(Path("data/runs/small/checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_error_while_saving_is_raised_after_a_signal(number: signal.Signals) -> None:
    process = start_long_training()
    checkpoints = Path("data/runs/small/checkpoints")
    shutil.rmtree(checkpoints, ignore_errors=True)
    checkpoints.write_bytes(b"")
    process.send_signal(number)
    rest, _ = process.communicate()
    assert process.returncode == 1
    assert "app.errors." in rest.splitlines()[-2], rest
    assert str(checkpoints) in rest.splitlines()[-2], rest


def test_a_package_that_is_imported_later_does_not_hide_its_function() -> None:
    script = "import app; first = app.load; import app.prepare.pipeline, app.train.loop; "
    script += "assert callable(app.prepare) and callable(app.train)"
    subprocess.run([sys.executable, "-c", script], check=True)
