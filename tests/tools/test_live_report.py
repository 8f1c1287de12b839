"""`report --serve` as a process, over sockets, on runs whose files grow."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.newcomer import run_really, settle
from tests.tools.run_folders import make_run, rows
from tests.tools.served import Served

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_run(folder / "runs" / "adamw", rows(20, 10, lowest=3.5))
    make_run(folder / "runs" / "muon", rows(38, 19))
    return folder


@pytest.fixture(scope="module")
def shared(data_dir: Path) -> Iterator[Served]:
    """One process for all tests."""
    with Served(data_dir, "report", "--serve", "muon").running() as served:
        yield served


@pytest.fixture
def run(data_dir: Path) -> Iterator[Path]:
    """A run that begins and ends with its test."""
    folder = data_dir / "runs" / "new"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def page(served: Served, path: str) -> str:
    status, content = served.request("GET", path)
    assert status == 200
    return content.decode()


def data(html: str) -> dict[str, Any]:
    (found,) = re.findall('id="data">(.*?)</script>', html)
    content: dict[str, Any] = json.loads(found)
    return content


def steps_drawn(html: str) -> list[int]:
    return [row["step"] for row in data(html)["charts"]["loss"]["spec"]["data"]["values"]]


def notes(html: str) -> list[str]:
    return [unescape(note) for note in re.findall('<p class="note">(.*?)</p>', html)][:-1]


def append(run: Path, metrics: list[dict[str, Any]]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in metrics)


def test_the_page_shows_the_chosen_runs_and_offers_all(shared: Served) -> None:
    for path, shown in (
        ("/", ["muon"]),
        ("/?run=adamw&run=muon", ["adamw", "muon"]),
        ("/?run=", []),
    ):
        html = page(shared, path)
        assert data(html)["runs"] == shown
        assert re.findall('<input type="checkbox" value="(.*?)"', html) == ["adamw", "muon"]
        assert re.findall('value="(.*?)" checked', html) == sorted(shown)
        assert notes(html) == []


def test_the_page_grows_with_the_run_and_says_when_nothing_has_changed(
    shared: Served, run: Path
) -> None:
    make_run(run, rows(5))
    status, first, headers = shared.ask("GET", "/?run=new")
    assert status == 200
    assert steps_drawn(first.decode()) == [1, 2, 3, 4, 5]
    known = {"If-None-Match": headers["ETag"]}
    assert shared.request("GET", "/?run=new", headers=known) == (304, b"")
    append(run, rows(8)[5:])
    assert steps_drawn(page(shared, "/?run=new")) == [*range(1, 9)]
    # A line that is being written is shown once it is whole.
    line = json.dumps(rows(9)[8])
    for part, steps in ((line[:40], 8), (line[40:] + "\n", 9)):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(part)
        status, content = shared.request("GET", "/?run=new", headers=known)
        assert (status, len(steps_drawn(content.decode()))) == (200, steps)


@pytest.mark.parametrize("steps", (6, 20))
def test_a_run_that_was_cut_back_or_deleted_and_begun_again_is_read_again(
    shared: Served, run: Path, steps: int
) -> None:
    make_run(run, rows(8))
    page(shared, "/?run=new")
    # Into the same inode, as a file system may give a deleted one to the next file.
    make_run(run, rows(steps, lowest=2))
    values = data(page(shared, "/?run=new"))["charts"]["loss"]["spec"]["data"]["values"]
    expected = [row["train_loss"] for row in rows(steps, lowest=2)]
    assert [row["raw"] for row in values] == pytest.approx(expected, rel=1e-4)


def test_a_run_and_a_link_to_it_are_two_runs(shared: Served, run: Path) -> None:
    run.symlink_to("muon")
    try:
        assert data(page(shared, "/?run=muon&run=new"))["runs"] == ["muon", "new"]
    finally:
        run.unlink()


def test_a_run_that_cannot_be_shown_is_a_note(shared: Served, run: Path) -> None:
    path = "/?run=muon&run=new"
    assert notes(page(shared, path)) == ["there is no run new; it appears here once it has begun"]
    run.mkdir()
    (run / "settings.json").write_text("{}")
    (note,) = notes(page(shared, path))
    assert note.endswith("metrics.jsonl has no steps: wait until the run has completed one")
    make_run(run, [*rows(3), {"step": "three"}])
    (note,) = notes(html := page(shared, path))
    assert "new/metrics.jsonl, line 4 is not the JSON object of a step" in note
    assert data(html)["runs"] == ["muon"]
    shutil.rmtree(run)
    assert "there is no run new" in notes(page(shared, path))[0]
    assert "there is no run ../secret" in notes(page(shared, "/?run=../secret"))[0]


def test_a_damaged_line_that_is_mended_is_read(shared: Served, run: Path) -> None:
    make_run(run, [*rows(3), {"step": "three"}])
    assert notes(page(shared, "/?run=new"))
    make_run(run, rows(4))
    assert steps_drawn(page(shared, "/?run=new")) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "headers",
    ({"Host": "rebound.example:8001"}, {"Origin": "https://elsewhere.example"}),
)
def test_other_sites_read_nothing(shared: Served, headers: dict[str, str]) -> None:
    for path in ("/", "/?run=muon", "/vega.js"):
        status, content = shared.request("GET", path, headers=headers)
        assert status == 403
        assert b"muon" not in content
    assert shared.request("GET", "/?run=muon", headers={"Host": "localhost"})[0] == 200


def test_without_a_name_the_run_written_to_last_is_shown(tmp_path: Path) -> None:
    with Served(tmp_path, "report", "--serve").running() as served:
        assert "a run appears here once it has begun" in page(served, "/")
        make_run(tmp_path / "runs" / "z", rows(3))
        make_run(tmp_path / "runs" / "a", rows(3))
        assert data(page(served, "/"))["runs"] == ["a"]
        served.process.send_signal(signal.SIGINT)
        assert served.wait() == (130, "stopped\n")


def test_while_there_is_no_run_of_its_name_the_latest_is_shown_beside_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPE", "demo")
    make_run(tmp_path / "runs" / "a", rows(3))
    with Served(tmp_path, "report", "--serve").running() as served:
        before = page(served, "/")
        make_run(tmp_path / "runs" / "demo", rows(5))
        after = page(served, "/")
    assert data(before)["runs"] == ["a"]
    assert notes(before) == ["there is no run demo; it appears here once it has begun"]
    assert (data(after)["runs"], notes(after)) == (["demo"], [])


def test_a_port_in_use_is_refused(
    shared: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    ended = run_really(f"report --serve --port {shared.port}")
    assert ended.returncode == 2
    assert ended.stderr.endswith("fix: set REPORT_PORT to another port\n")
