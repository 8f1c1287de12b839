"""Entry point of the report."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from app.files import atomic_file
from app.locks import WAIT_SECONDS, locked
from app.runs.checkpoints import missing_run_error
from app.settings.settings import Settings
from app.tools.latest_run import with_latest_run
from app.tools.report.run_data import read_run

# File names have at most 255 bytes, and the lock's is longer.
_MAX_NAME_BYTES = 240


def report(settings: Settings, *, runs: Sequence[str], serve: bool) -> None:
    """Write a report on the named runs and print its main files, or serve it.

    Without a name it is on TRAIN_RUN_NAME, or on the latest run.
    """
    if serve:
        from app.tools.report.server import serve_report

        serve_report(settings, runs)
        return
    data_dir, out = settings.general.data_dir, settings.report.out
    named = [*dict.fromkeys(data_dir / "runs" / name for name in runs)]
    for folder in named:
        if not folder.is_dir():
            raise missing_run_error(folder, None)
    run_dirs = named or [with_latest_run(settings).run_dir]
    if out is None and len(named) > 1:
        out = Path("reports", _together([folder.name for folder in named]))
    page, picture, *_ = write_report(run_dirs, data_dir / out if out else None)
    print(page, picture, sep="\n")


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write report.html, report.png and a PNG per chart.

    Each file is replaced atomically, and reports written at once do not mix.

    Args:
        run_dirs: the runs' folders.
        out: the folder to write; by default report in the first run's folder.

    Returns:
        the files' paths, the page first.

    Raises:
        UserError: there is no such run, or its metrics are missing or damaged.
    """
    read = {folder: read_run(folder) for folder in run_dirs}
    names = [run.name for run in read.values()]
    # Charts tell runs apart by their names.
    runs = [
        replace(run, name=str(folder)) if names.count(run.name) > 1 else run
        for folder, run in read.items()
    ]

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
    folder = out or run_dirs[0] / "report"
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    with locked(folder, "report", wait_seconds=WAIT_SECONDS, file=lock):
        for name, content in files.items():
            with atomic_file(folder / name) as file:
                file.write(content)
    return [folder / name for name in files]


def _together(names: Sequence[str]) -> str:
    """Return the name of the folder of a report on several runs."""
    together = "+".join(names)
    if len(encoded := together.encode(errors="surrogateescape")) > _MAX_NAME_BYTES:
        return f"{len(names)}-runs-{sha256(encoded).hexdigest()[:12]}"
    return together
