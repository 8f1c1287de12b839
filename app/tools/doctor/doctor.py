"""`doctor`: all checks in their order, the table or JSON of their findings, and the exit code."""

import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial

from app.errors import ExitCode, ExitWithCode
from app.formats import plural
from app.settings.next_command import command_for_run, command_with_settings
from app.settings.settings import Settings
from app.tools.doctor.checks import Context, Finding, run_check, run_check_within
from app.tools.doctor.child import device_findings
from app.tools.doctor.estimate import check_duration, estimate
from app.tools.doctor.inputs import (
    check_dataset,
    check_hellaswag,
    check_plan,
    check_run,
    check_text,
    check_vocabulary,
    check_weights,
)
from app.tools.doctor.machine import check_cpu, check_driver, check_folders, check_space

_CHECKS: dict[str, Callable[[Context], Iterator[Finding]]] = {
    "weights": check_weights,
    "dataset": check_dataset,
    "run": check_run,
    "plan": check_plan,
    "text": check_text,
    "HellaSwag": check_hellaswag,
    "vocabulary": check_vocabulary,
    "data folder": check_folders,
    "disk space": check_space,
    "cpu": check_cpu,
    "driver": check_driver,
}
# The longest that a check may take; comparing hashes means reading gigabytes.
_LIMIT_SECONDS = 60.0
_HASHING_SECONDS = 600.0
# Colors of terminals (ECMA-48, 8.3.117).
_COLORS = {"pass": "32", "warn": "33", "fail": "1;31", "skip": "2"}
_MIN_WIDTH = 60


def doctor(settings: Settings, *, verify: bool, as_json: bool) -> None:
    """Print what is wrong with this machine, or missing, for the run that the settings describe.

    Args:
        verify: compare every hash of the dataset.
        as_json: print one JSON object at the end instead of a table.

    Raises:
        ExitWithCode: a check has failed.
    """
    context, findings = Context(settings, verify), []
    if not as_json:
        print(_heading(settings), flush=True)
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else sys.maxsize
    colored = is_terminal and not os.environ.get("NO_COLOR")
    with closing(run_checks(context)) as iterator:
        for finding in iterator:
            findings.append(finding)
            if not as_json:
                print(format_row(finding, width, colored=colored), flush=True)
    count = Counter(finding.status for finding in findings)
    if as_json:
        print(json.dumps(_as_json(context, findings), indent=2))
    else:
        print(
            f"{count['pass']} passed, {count['warn']} to look at, {count['fail']} failed, "
            f"{count['skip']} skipped"
        )
        if not count["fail"]:
            # Without steps left, the run has a model.
            command = "train" if context.remaining_steps else "sample"
            command = command if context.fingerprint else "prepare"
            wording = command_for_run if command == "sample" else command_with_settings
            print(f"next: {wording(settings, command)}")
    if count["fail"]:
        raise ExitWithCode(ExitCode.BUG)


def run_checks(context: Context) -> Generator[Finding, None, None]:
    """Yield every finding as soon as there is one; an error in a check does not end the others."""
    limits = {"dataset": None if context.verify else _LIMIT_SECONDS}
    limits |= dict.fromkeys(("weights", "run"), _HASHING_SECONDS)
    for name, check in _CHECKS.items():
        limit = limits.get(name, _LIMIT_SECONDS)
        yield from run_check_within(limit, name, partial(check, context))
    yield from run_check("device", partial(device_findings, context))
    yield from run_check("duration", partial(check_duration, context))


def format_row(finding: Finding, width: int = sys.maxsize, *, colored: bool = False) -> str:
    """Return the finding as lines of at most `width` characters, with a terminal's colors."""
    head = f"{finding.status}  {finding.check:<13} "
    fill = partial(textwrap.fill, width=max(width, _MIN_WIDTH), subsequent_indent=" " * len(head))
    row = fill(finding.found, initial_indent=head)
    if finding.fix:
        row += "\n" + fill(f"fix: {finding.fix}", initial_indent=" " * len(head))
    if not colored:
        return row
    return f"\x1b[{_COLORS[finding.status]}m{row[:4]}\x1b[0m{row[4:]}"


def _heading(settings: Settings) -> str:
    cfg, model, recipe = settings.train, settings.model, settings.general.recipe
    shape = f"{plural(model.num_layers, 'layer')} of width {model.embd_size}"
    return (
        f"{f'RECIPE={recipe}: ' if recipe else ''}{plural(cfg.max_steps, 'step')} of "
        f"{cfg.tokens_per_step:,} tokens, "
        + (f"from the weights of {cfg.init_from}" if cfg.init_from else shape)
    )


def _as_json(context: Context, findings: list[Finding]) -> dict[str, object]:
    duration = estimate(context)
    return {
        "findings": [asdict(finding) for finding in findings],
        "trial": asdict(context.report) if context.report else None,
        "estimate": {
            "seconds": duration.seconds if duration else None,
            "cost": duration.cost(context.settings.train) if duration else None,
            "disk_bytes": context.disk_bytes,
        },
    }
