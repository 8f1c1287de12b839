"""Entry point of the report."""

from collections.abc import Sequence
from pathlib import Path

from app.files import atomic_file
from app.locks import WAIT_SECONDS, locked
from app.settings.settings import Settings
from app.tools.latest_run import with_latest_run
from app.tools.report.run_data import read_run


def report(settings: Settings, *, runs: Sequence[str]) -> None:
    """Write a report on the named runs, by default on TRAIN_RUN_NAME, and print its main files."""
    folder = settings.general.data_dir / "runs"
    named = [folder / name for name in runs]
    page, picture, *_ = write_report(named or [with_latest_run(settings).run_dir])
    print(page, picture, sep="\n")


def write_report(run_dirs: Sequence[Path]) -> list[Path]:
    """Write report.html, report.png and a PNG per chart to the first run's folder report/.

    Each file is replaced atomically, and all of them by one process.

    Returns:
        the files' paths, the page first.

    Raises:
        UserError: there is no such run, or its metrics are missing or damaged.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(run_dirs)]

    # Imported after the runs are read, because the modules that draw are slow to import.
    from app.tools.report.charts import charts
    from app.tools.report.facts import figures
    from app.tools.report.page import page
    from app.tools.report.pictures import overview, picture

    all_charts = charts(runs)
    files = {
        "report.html": page(runs, all_charts).encode("utf-8", "replace"),
        "report.png": overview(runs, figures(runs[0]), all_charts),
        **{f"{chart.key}.png": picture(chart) for chart in all_charts},
    }
    folder = run_dirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    lock = run_dirs[0] / ".report.lock"
    with locked(folder, "report", wait_seconds=WAIT_SECONDS, file=lock):
        for name, content in files.items():
            with atomic_file(folder / name) as file:
                file.write(content)
    return [folder / name for name in files]
