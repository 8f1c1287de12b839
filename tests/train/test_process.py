"""Real `python -m app train` processes, compiled and with default threads, killed and stopped."""

import signal

import pytest

from tests.train.processes import Start, assert_same_run, measured, run_to_end

pytestmark = pytest.mark.processes


def test_killed_twice_and_continued_equals_unbroken(start: Start) -> None:
    compiled = {"TRAIN_COMPILE": "true", "TRAIN_PRECISION": "bf16"}
    unbroken = run_to_end(start, **compiled, TRAIN_RUN_NAME="unbroken")
    # Killed after steps that no checkpoint holds: 4 and 8 are saved, 7 and 9 reached.
    for reached in ("step:6/", "step:8/"):
        killed = start(**compiled)
        killed.signal_at(reached, signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL
    continued = run_to_end(start, **compiled)
    assert_same_run(continued.run_dir, unbroken.run_dir)
    assert any((continued.run_dir.parents[1] / "cache" / "inductor").iterdir())


@pytest.mark.parametrize(
    ("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_a_checkpoint_and_the_run_continues(
    start: Start, number: signal.Signals, code: int
) -> None:
    unbroken = run_to_end(start, TRAIN_RUN_NAME="unbroken")
    stopped = start()
    stopped.signal_at("step:1/", number)
    found, output = stopped.end()
    assert found == code, output
    assert "Traceback" not in output
    saved = [path.name for path in (stopped.run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert len(measured(stopped.run_dir)) == int(saved[0].removeprefix("step-"))
    assert f"stopped: {stopped.run_dir / 'checkpoints' / saved[0]}" in output
    continued = run_to_end(start)
    assert_same_run(continued.run_dir, unbroken.run_dir)


def test_the_lock_of_a_killed_process_is_gone(start: Start) -> None:
    killed = start()
    killed.signal_at("step:0/", signal.SIGKILL)
    killed.end()
    run_to_end(start)
