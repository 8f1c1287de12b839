"""`python -m app.tools.doctor.trial`: everything that touches the device, in a process of its own.

A driver that hangs or a compiler that crashes takes this process along, and not doctor, which
reads a JSON object a line here: {"begins": CHECK}, {"finding": {…}}, and at last {"trial": {…}}.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from app.settings import Settings
from app.tools.doctor.device_checks import (
    Examined,
    check_attention,
    check_device,
    check_memory,
    check_precision,
    check_shared_memory,
    choose,
)
from app.tools.doctor.finding import Finding, examined
from app.tools.doctor.rates import check_copies, check_matmul
from app.tools.doctor.steps import check_compilation

Check = Callable[[Examined], Iterator[Finding]]
CHECKS: dict[str, tuple[Check, str]] = {
    "device": (check_device, ""),
    "precision": (check_precision, ""),
    "memory": (check_memory, ""),
    "shared memory": (check_shared_memory, ""),
    "attention": (check_attention, ""),
    "matmul": (check_matmul, ""),
    "copies": (check_copies, ""),
    "compile": (
        check_compilation,
        "set TRAIN_COMPILE=false, which trains without the compiler, slower",
    ),
}


def try_device(settings: Settings, say: Callable[[dict[str, Any]], None]) -> None:
    """Run all checks of the device, and say what each of them finds."""
    say({"begins": "device"})
    found: list[Examined] = []

    def begin() -> Iterator[Finding]:
        found.append(choose(settings))
        return iter(())

    for finding in examined("device", begin):
        say({"finding": asdict(finding)})
    for case in found:
        for name, (check, fix) in CHECKS.items():
            say({"begins": name})
            for finding in examined(name, partial(check, case), fix):
                say({"finding": asdict(finding)})
            say({"trial": asdict(case.trial)})


def main() -> None:
    """Read settings as JSON, and write lines of JSON; what libraries print goes elsewhere."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = Settings.model_validate_json(sys.stdin.read())
    try_device(settings, lambda line: print(json.dumps(line), file=lines, flush=True))


if __name__ == "__main__":
    main()
