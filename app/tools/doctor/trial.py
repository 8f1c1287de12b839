"""`python -m app.tools.doctor.trial PIPE SETTINGS`: what touches the device, in its own process.

The pipe says when to begin. Into it go the name of each check when it begins, what it finds, and
what is known afterwards; None in the end, since the process takes its time to end.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection

from app.errors import AppError
from app.settings.settings import Settings
from app.tools.doctor import device_checks, measurements
from app.tools.doctor.device_checks import Examined
from app.tools.doctor.finding import UNCOMPILED, UNEXPECTED, Finding, examined, failure
from app.train.compile import set_compile_cache_dir

CHECKS: dict[str, Callable[[Examined], Iterator[Finding]]] = {
    "device": device_checks.check_device,
    "precision": device_checks.check_precision,
    "memory": device_checks.check_memory,
    "shared memory": device_checks.check_shared_memory,
    "attention": device_checks.check_attention,
    "matmul": measurements.check_matmul,
    "copies": measurements.check_copies,
    "compile": measurements.check_compilation,
}


def main(descriptor: str, settings: str) -> None:
    """Run all checks of the device.

    Args:
        descriptor: of the pipe.
        settings: of the run that is meant, as JSON.
    """
    pipe, chosen = Connection(int(descriptor)), Settings.model_validate_json(settings)
    if chosen.train.compile:
        # Where train finds it.
        set_compile_cache_dir(chosen.general.data_dir / "cache")
    try:
        pipe.recv()
    except EOFError:
        return
    try:
        case = device_checks.choose(chosen)
    except AppError as error:
        pipe.send(failure("device", error))
        pipe.send(None)
        return
    for name, check in CHECKS.items():
        pipe.send(name)
        fix = UNCOMPILED if name == "compile" else UNEXPECTED
        for finding in examined(name, partial(check, case), fix):
            pipe.send(finding)
        pipe.send(case.trial)
    pipe.send(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
