"""A page and pictures of how runs have learned."""

from collections.abc import Sequence
from pathlib import Path

from app.files import atomic_file
from app.settings.settings import Settings
from app.tools.report.run_data import read_run


def report(settings: Settings, *, runs: Sequence[str]) -> None:
    """Write the report of the named runs, by default of the settings' run, and print its files."""
    folder = settings.general.data_dir / "runs"
    page, picture, *_ = write_report([folder / name for name in runs] or [settings.run_dir])
    print(page, picture, sep="\n")


def write_report(run_dirs: Sequence[Path]) -> list[Path]:
    """Write report.html, report.png and a PNG of each chart to report/ of the first run.

    Returns their paths, the page first; each file is replaced atomically.

    Raises:
        UserError: there is no such run, or its metrics cannot be used.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(run_dirs)]

    # The modules that draw are slow to import: faults of the runs are told before.
    from app.tools.report.charts import charts
    from app.tools.report.facts import figures
    from app.tools.report.page import page
    from app.tools.report.pictures import overview, picture

    drawn = charts(runs)
    files = {
        "report.html": page(runs, drawn).encode("utf-8", "replace"),
        "report.png": overview(runs, figures(runs[0]), drawn),
        **{f"{chart.key}.png": picture(chart) for chart in drawn},
    }
    folder = run_dirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]
