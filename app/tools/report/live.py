"""The page of runs that train: read and rendered again whenever something has changed."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock

from app.errors import UserError
from app.tools.report.charts import charts
from app.tools.report.page import Choice, page
from app.tools.report.run_data import Run, RunReader

_FILES = ("metrics.jsonl", "settings.json", "samples.txt")


class LiveReport:
    """Renders the report of any runs of a folder.

    Args:
        runs_dir: the folder of the runs.
        first: names of the runs to show first; while there is none of them, the one that was
            written to last is shown as well.
    """

    def __init__(self, runs_dir: Path, first: Sequence[str]) -> None:
        self._runs_dir, self._first = runs_dir, first
        self._readers: dict[str, RunReader] = {}
        self._lock = Lock()

    def choice(self, wanted: Sequence[str] | None) -> Choice:
        """Return the choice of the wanted runs; None wants the first ones."""
        folders = sorted(self._runs_dir.glob("*"))
        written = {folder.name: stamps for folder in folders if (stamps := list(_stamps(folder)))}
        latest = sorted(written, key=lambda name: max(time for *_, time in written[name]))[-1:]
        first = self._first if written.keys() & {*self._first} else [*self._first, *latest]
        chosen = list(dict.fromkeys(first if wanted is None else wanted))
        state = repr((list(written), [(name, written.get(name)) for name in chosen]))
        version = f'"{sha256(state.encode(errors="replace")).hexdigest()[:20]}"'
        return Choice(list(written), chosen, version)

    def page(self, choice: Choice) -> str:
        """Return the page; a run that cannot be read is a note on it."""
        with self._lock:
            for name in self._readers.keys() - choice.offered:
                del self._readers[name]
            runs, problems = self._read(choice)
            return page(runs, charts(runs) if runs else [], choice, problems)

    def _read(self, choice: Choice) -> tuple[list[Run], list[str]]:
        """Return the chosen runs, and why others of them cannot be shown."""
        runs, problems = [], []
        for name in choice.chosen:
            if name not in choice.offered:
                problems.append(f"there is no run {name}; it appears here once it has begun")
                continue
            try:
                reader = self._readers.setdefault(name, RunReader(self._runs_dir / name))
                runs.append(reader.read())
            except UserError as error:
                problems.append(f"{error.problem}: {error.fix}")
            except OSError as error:
                problems.append(f"{name} cannot be read: {error}")
        return runs, problems


def _stamps(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield the name, inode, size and modification time of each of a run's files."""
    for name in _FILES:
        with suppress(OSError):
            found = (folder / name).stat()
            yield name, found.st_ino, found.st_size, found.st_mtime_ns
