"""Entry point of the sweep."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.containers import program
from app.errors import ExitCode, ExitWithCode
from app.files import atomic_file
from app.formats import plural
from app.locks import locked
from app.progress import print_line
from app.settings.next_command import command_for_run, next_command
from app.tools.sweep.chart import sweep_chart
from app.tools.sweep.plan import PlannedRun, plan_sweep
from app.tools.sweep.processes import devices, train_all
from app.tools.sweep.results import (
    Result,
    best_of,
    combinations,
    read_result,
    read_results,
    table,
    write_results,
)


def sweep(flags: Mapping[str, str], *, recipe: str | None, sets: Sequence[str]) -> None:
    """Train a run for each combination of values; continue the sweep if it exists.

    Args:
        flags: texts given on the command line, by variable.
        recipe: RECIPE of every run.
        sets: texts `NAME=VALUE,VALUE`.

    Raises:
        UserError: a value is wrong, or the sweep exists with others; nothing has been trained.
        ExitWithCode: a signal has stopped it, or a run has failed, which has been printed.
    """
    folder, runs = plan_sweep({**flags, **({"RECIPE": recipe} if recipe else {})}, sets)
    # Imported before the runs: a missing package ends the sweep now, not after the first run.
    from app.tools.report.pictures import THEMES, picture

    def write() -> list[Result]:
        """Replace the sweep's files, and return the results in the order of the runs."""
        ordered = [results[run.name] for run in runs if run.name in results]
        if ordered:
            write_results(folder, ordered, len(runs))
            chart = sweep_chart(ordered)
            for theme in THEMES:
                suffix = "" if theme == "light" else f"-{theme}"
                with atomic_file(folder / f"sweep{suffix}.png") as file:
                    file.write(picture(chart, theme))
        return ordered

    def ended(run: PlannedRun, code: int) -> None:
        results[run.name] = read_result(run, diverged=code == ExitCode.NOT_FINITE)
        write()

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "sweep"):
        results = read_results(folder, runs)
        left = [run for run in runs if run.name not in results]
        print_line(f"{folder}: {plural(len(runs), 'run')}, {len(left)} to train")
        for run in left:
            # A process of a sweep that was killed may still be training it.
            if run.folder.path.exists():
                with run.folder.lock(math.inf):
                    pass
        places = devices(runs[0].settings) if left else []
        code = train_all(left, len(runs), places, folder, ended)
        if ordered := write():
            _print_comparison(folder, runs, ordered)
    if code:
        unfinished = plural(len(runs) - len(results), "run")
        print_line(f"{unfinished} of {len(runs)} left: the same command continues the sweep")
        raise ExitWithCode(code)


def _print_comparison(folder: Path, runs: Sequence[PlannedRun], results: Sequence[Result]) -> None:
    """Print the table, and the commands that go on with the best run."""
    found = combinations(results)
    print_line(f"\n{table(found)}\n\n{folder / 'sweep.png'}")
    if best := best_of(found):
        loss, name = min(zip(best.losses, (it.run for it in best.results), strict=True))
        settings = next(run.settings for run in runs if run.name == name)
        data_dir = settings.general.data_dir
        report = next_command(settings, "report", {}, lambda it: it.general.data_dir, data_dir)
        print_line(f"best: {name}, held-out loss {loss:.4f}")
        print_line(f"next: {command_for_run(settings, 'sample')}")
        print_line(f"      {report or f'{program()} report'} {' '.join(it.run for it in results)}")
