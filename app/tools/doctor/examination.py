"""`doctor`: all checks in their order, the table of what they find, and the exit code."""

import json
import os
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from app.errors import ExitCode, ExitWithCode
from app.settings.settings import Settings
from app.tools.doctor.case import Case
from app.tools.doctor.estimate import check_duration, estimate
from app.tools.doctor.finding import Finding, counted, examined, examined_within
from app.tools.doctor.inputs import check_dataset, check_run, check_text, check_vocabulary
from app.tools.doctor.machine import check_cpu, check_folders, check_space
from app.tools.doctor.nvidia_smi import check_driver
from app.tools.doctor.supervised import DeviceProcess

# That a check may take without a word; those that compare hashes read gigabytes.
_LIMIT_SECONDS = 60.0
_HASHING_SECONDS = 600.0


def doctor(settings: Settings, *, verify: bool, as_json: bool) -> None:
    """Print what is wrong with this machine, or missing, for the run that the settings mean.

    Args:
        settings: of the run.
        verify: compare every hash of the dataset.
        as_json: print one JSON object at the end instead of a table.

    Raises:
        ExitWithCode: a check has failed.
    """
    case = Case(settings, verify)
    findings = []
    if not as_json:
        print(_heading(settings), flush=True)
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else sys.maxsize
    coloured = is_terminal and not os.environ.get("NO_COLOR")
    for finding in examine(case):
        findings.append(finding)
        if not as_json:
            print(finding.lines(width, coloured=coloured), flush=True)
    count = Counter(finding.status for finding in findings)
    if as_json:
        print(json.dumps(_as_json(case, findings), indent=2))
    else:
        print(
            f"{count['pass']} passed, {count['warn']} to look at, {count['fail']} failed, "
            f"{count['skip']} skipped"
        )
    if count["fail"]:
        raise ExitWithCode(ExitCode.BUG)


def examine(case: Case) -> Iterator[Finding]:
    """Every finding, as soon as it is there; no error of a check ends the examination."""
    checks: dict[str, Callable[[Case], Iterator[Finding]]] = {
        "dataset": check_dataset,
        "run": check_run,
        "text": check_text,
        "vocabulary": check_vocabulary,
        "data folder": check_folders,
        "disk space": check_space,
        "cpu": check_cpu,
        "driver": _check_driver,
    }
    limits = {"dataset": None if case.verify else _LIMIT_SECONDS, "run": _HASHING_SECONDS}
    # It imports torch while the others look.
    with DeviceProcess(case) as device:
        for name, check in checks.items():
            yield from examined_within(limits.get(name, _LIMIT_SECONDS), name, partial(check, case))
        yield from examined("device", device.findings)
    yield from examined("duration", partial(check_duration, case))


def _check_driver(case: Case) -> Iterator[Finding]:
    return check_driver(_cuda_of_torch(), wanted=case.settings.train.device != "cpu")


def _cuda_of_torch() -> str | None:
    """Return the version of CUDA that torch is built for, without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    cuda: str | None = facts["cuda"]
    return cuda


def _heading(settings: Settings) -> str:
    chosen, model, recipe = settings.train, settings.model, settings.general.recipe
    return (
        f"{f'RECIPE={recipe}: ' if recipe else ''}{counted(chosen.max_steps, 'step')} of "
        f"{chosen.tokens_per_step:,} tokens, {counted(model.num_layers, 'layer')} of width "
        f"{model.embd_size}"
    )


def _as_json(case: Case, findings: list[Finding]) -> dict[str, object]:
    found, price = estimate(case), case.settings.train.price_per_hour
    return {
        "findings": [asdict(finding) for finding in findings],
        "trial": asdict(case.trial) if case.trial else None,
        "estimate": {
            "seconds": found.seconds if found else None,
            "cost": found.cost(price) if found and price is not None else None,
            "disk_bytes": case.disk_bytes,
        },
    }
