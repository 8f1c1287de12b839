"""`doctor`: all checks in their order, the table of what they find, and the exit code."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

from app.errors import Ended, ExitCode
from app.settings import Settings
from app.tools.doctor.case import Case
from app.tools.doctor.disk import (
    check_folders,
    check_locks,
    check_space,
    check_speed,
)
from app.tools.doctor.estimate import check_duration, estimate
from app.tools.doctor.finding import Finding, Status, examined
from app.tools.doctor.inputs import check_dataset, check_run, check_text, check_vocabulary
from app.tools.doctor.machine import check_cpu
from app.tools.doctor.nvidia_smi import check_driver
from app.tools.doctor.supervised import check_device

Check = tuple[str, Callable[[], Iterator[Finding]]]


def doctor(settings: Settings, *, verify: bool, as_json: bool) -> None:
    """Print what is wrong with this machine, or missing, for the run that the settings mean.

    Args:
        settings: of the run.
        verify: compare every hash of the dataset.
        as_json: print one JSON object at the end instead of a table.

    Raises:
        Ended: a check has failed.
    """
    case = Case(settings, verify)
    is_terminal = sys.stdout.isatty()
    coloured = is_terminal and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns if is_terminal else None
    findings = []
    if not as_json:
        print(_heading(settings), flush=True)
    for finding in examine(case):
        findings.append(finding)
        if not as_json:
            print(finding.lines(width=width, coloured=coloured), flush=True)
    count = {status: _count(findings, status) for status in ("pass", "warn", "fail", "skip")}
    if as_json:
        print(json.dumps(_as_json(case, findings), indent=2))
    else:
        print(
            f"{count['pass']} passed, {count['warn']} to look at, {count['fail']} failed, "
            f"{count['skip']} skipped"
        )
    if count["fail"]:
        raise Ended(ExitCode.BUG)


def examine(case: Case) -> Iterator[Finding]:
    """Every finding, as soon as it is there; no error of a check ends the examination."""
    for name, check in _checks(case):
        yield from examined(name, check)


def _checks(case: Case) -> Iterator[Check]:
    yield "dataset", partial(check_dataset, case)
    yield "run", partial(check_run, case)
    yield "text", partial(check_text, case)
    yield "vocabulary", check_vocabulary
    yield "data folder", partial(check_folders, case)
    yield "disk space", partial(check_space, case)
    yield "disk speed", partial(check_speed, case)
    yield "file locks", partial(check_locks, case)
    yield "cpu", check_cpu
    yield "driver", partial(_check_driver, case)
    yield "device", partial(check_device, case)
    yield "duration", partial(check_duration, case)


def _check_driver(case: Case) -> Iterator[Finding]:
    import torch

    return check_driver(torch.version.cuda, wanted=case.settings.train.device != "cpu")


def _heading(settings: Settings) -> str:
    chosen, recipe = settings.train, settings.general.recipe
    return (
        f"{f'RECIPE={recipe}: ' if recipe else ''}{chosen.max_steps:,} steps of "
        f"{chosen.tokens_per_step:,} tokens, {settings.model.num_layers} layers of width "
        f"{settings.model.embd_size}"
    )


def _count(findings: list[Finding], status: Status) -> int:
    return sum(finding.status == status for finding in findings)


def _as_json(case: Case, findings: list[Finding]) -> dict[str, object]:
    found, price = estimate(case), case.settings.train.price_per_hour
    return {
        "findings": [asdict(finding) for finding in findings],
        "trial": asdict(case.trial) if case.trial else None,
        "estimate": {
            "seconds": [found.least_seconds, found.most_seconds] if found else None,
            "cost": [found.least_seconds / 3600 * price, found.most_seconds / 3600 * price]
            if found and price is not None
            else None,
            "disk_bytes": case.disk_bytes,
        },
    }
