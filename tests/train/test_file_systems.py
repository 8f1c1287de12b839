"""Training where the file system lacks what those of networks and shared folders lack."""

import errno
import re
from pathlib import Path
from signal import SIGTERM

import pytest

from tests.lacking import lacking
from tests.python_process import run_python
from tests.train.processes import Start, Unbroken, assert_same_run, run_to_end

pytestmark = pytest.mark.processes

LACKING = re.compile(r"warning: the file system of \S+ (.*):")
LACKS_ALL = {
    "lock": errno.ENOLCK,
    "fsync_folder": errno.EINVAL,
    "map": errno.ENODEV,
    "chmod": errno.EPERM,
    "rename_folder": errno.ENOTEMPTY,
}


@pytest.mark.slow
def test_a_run_continues_to_the_same_weights_where_nearly_all_is_lacking(
    start: Start, unbroken: Unbroken, data_dir: Path
) -> None:
    environment = lacking(data_dir, **LACKS_ALL)
    stopped = start(**environment)
    stopped.signal_at("step:4/", SIGTERM)
    code, output = stopped.end()
    assert code == 143, output
    assert LACKING.findall(output) == ["has no flock", "cannot fsync a folder"]
    continued = run_to_end(start, **environment)
    assert_same_run(continued.run_dir, unbroken())
    assert not (continued.run_dir / ".locked").exists()


@pytest.mark.slow
def test_two_trains_at_once_without_flock_do_not_mix(start: Start, data_dir: Path) -> None:
    environment = lacking(data_dir, lock=errno.ENOSYS)
    first = start(TRAIN_MAX_STEPS=100_000, **environment)
    first.wait_for("step:0/")
    code, output = start(TRAIN_MAX_STEPS=10, **environment).end()
    assert code == 2, output
    assert (
        f"another process is working on {first.run_dir}: process {first.process.pid} on" in output
    )
    first.process.kill()
    first.end()
    # The kill has left the lock behind, and it counts for nothing.
    run_to_end(start, **environment)


@pytest.mark.parametrize(("calls", "kept"), (({}, True), ({"lock": errno.ENOSYS}, False)))
def test_compiled_code_is_kept_where_its_locks_work(
    tmp_path: Path, calls: dict[str, int], kept: bool
) -> None:
    code = (
        "import os, sys; from pathlib import Path; from app.train import compile\n"
        "os.environ.pop('TORCHINDUCTOR_CACHE_DIR', None)\n"
        "compile.set_compile_cache_dir(Path(sys.argv[1], 'cache'))\n"
        "print('TORCHINDUCTOR_CACHE_DIR' in os.environ)"
    )
    printed = run_python(code, tmp_path, **lacking(tmp_path, **calls))
    assert printed.stdout == f"{kept}\n"
