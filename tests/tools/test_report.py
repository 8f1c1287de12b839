import json
import os
import re
import time
from contextlib import ExitStack
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import vl_convert
from PIL import Image

from app.errors import ExitCode, UserError
from app.locks import locked
from app.tools.report.charts import charts
from app.tools.report.facts import comparison, figures
from app.tools.report.page import page
from app.tools.report.pictures import THEMES, VEGA_LITE, picture
from app.tools.report.report import write_report
from app.tools.report.run_data import read_run
from tests.newcomer import settle, type_in
from tests.tools.run_folders import SETTINGS, make_run, rows

TRAIN, HELD_OUT = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"`${1}"


class Page(HTMLParser):
    """The elements and the text of a report."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._script: str | None = None
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += f"{data} "

    @property
    def data(self) -> dict[str, Any]:
        """The data of the charts."""
        data: dict[str, Any] = json.loads(self.scripts[0])
        return data


def report(*folders: Path) -> Page:
    runs = [read_run(folder) for folder in folders]
    return Page(page(runs, charts(runs)))


def count_pixels(path: Path, color: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        counts = image.convert("RGB").getcolors(maxcolors=1 << 24) or []
    return sum(count for count, pixel in counts if pixel == color)


def test_reports_at_once_are_written_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", rows(3))
    with ExitStack() as other:
        other.enter_context(locked(run / "report", "report", file=run / ".report.lock"))
        ended = Thread(target=write_report, args=([run],))
        ended.start()
        while "waiting for another report to release" not in capsys.readouterr().err:
            time.sleep(0.01)
        assert not any((run / "report").iterdir())
    ended.join()
    assert (run / "report" / "report.html").exists()


def test_fifty_runs_fit_into_the_pictures(tmp_path: Path) -> None:
    names = [f"run-{number:02}-with-a-name-that-is-rather-long" for number in range(50)]
    runs = [read_run(make_run(tmp_path / name, rows(3))) for name in names]
    by_key = {chart.key: chart for chart in charts(runs)}
    spec = by_key["loss"].spec | {"config": THEMES["light"]}
    drawn = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    assert [f">{name}<" in drawn for name in names] == [True] * 23 + [False] * 27
    assert ">and 27 more<" in drawn
    for key, height in (("loss", 1400), ("learning_rate", 900)):
        with Image.open(BytesIO(picture(by_key[key]))) as image:
            assert image.width < 3000
            assert image.height < height, key
    # As high as its bars, which would cover each other.
    with Image.open(BytesIO(picture(by_key["time"]))) as image:
        assert image.height > 50 * 34
    document = Page(page(runs, [])).text
    assert document.count("50 runs") == 2
    assert document.count("124M parameters") == 1
    few = read_run(tmp_path / names[0])
    assert "columns" not in str(charts([few, few])[0].spec)


def test_a_comparison_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(tmp_path, monkeypatch)
    for name in ("one", "other", long := 250 * "x"):
        make_run(tmp_path / "data" / "runs" / name, rows(3))
    for words, folder in (
        ("one other", "reports/one+other"),
        ("other one --out compared/here", "compared/here"),
        (f"one {long}", "reports/2-runs-*"),
    ):
        assert type_in(f"report {words}", monkeypatch) == ExitCode.DONE
        page, picture = map(Path, capsys.readouterr().out.splitlines())
        (made,) = Path("data").glob(folder)
        assert (page, picture) == (made / "report.html", made / "report.png")
        shown = Page(page.read_text()).data["runs"]
        assert shown == words.split(" --")[0].split()
        assert (made / "loss.png").is_file()
    assert not list(Path("data/runs").glob("o*/report*"))


@pytest.mark.parametrize(("steps", "val_every"), ((1, 0), (1, 1), (2, 0), (38, 19), (20000, 1000)))
def test_run_of_any_length_has_a_page_and_pictures(
    tmp_path: Path, steps: int, val_every: int
) -> None:
    html, *pictures = write_report([make_run(tmp_path / "run", rows(steps, val_every))])
    names = [picture.stem for picture in pictures]
    assert names == [
        *("report", "loss", "learning_rate", "grad_norm", "throughput", "memory", "time"),
    ]
    for path in pictures:
        with Image.open(path) as image:
            assert image.width > 1000
    assert count_pixels(pictures[0], TRAIN) > 50
    assert (count_pixels(pictures[1], HELD_OUT) > 50) == bool(val_every)
    # The libraries alone are 0.9 MB.
    assert html.stat().st_size < 1_600_000


def test_page_fetches_nothing(tmp_path: Path) -> None:
    document = report(make_run(tmp_path / "run", rows(38), samples={38: ["text"]}))
    assert [value for name, value in document.attributes if name in ("src", "href")] == ["data:,"]
    assert not {"iframe", "img", "object"} & set(document.tags)


def test_curves_are_the_metrics(tmp_path: Path) -> None:
    metrics = rows(38, 19)
    document = report(make_run(tmp_path / "run", metrics))
    drawn = document.data["charts"]["loss"]["spec"]["data"]["values"]
    curve = [row for row in drawn if "raw" in row]
    assert [row["step"] for row in curve] == list(range(1, 39))
    assert [row["tokens"] for row in curve] == [row["tokens"] for row in metrics]
    assert [row["raw"] for row in curve] == pytest.approx(
        [row["train_loss"] for row in metrics], rel=1e-4
    )
    held_out = {row["step"]: row["held_out"] for row in drawn if "held_out" in row}
    expected = {row["step"] + 1: row["val_loss"] for row in metrics if "val_loss" in row}
    assert held_out == pytest.approx(expected, rel=1e-4)


def test_time_is_that_of_steps_and_pauses(tmp_path: Path) -> None:
    metrics = rows(4, 2)
    metrics[2] |= {"sample_ms": 500.0, "save_ms": 250.0}
    run = read_run(make_run(tmp_path / "run", metrics))
    step = [row["step_ms"] / 1000 for row in metrics]
    ends = [20 + step[0], 0.0, 0.0, 0.0]
    ends[1] = ends[0] + step[1]
    ends[2] = ends[1] + 9 + 0.75 + step[2]
    ends[3] = ends[2] + step[3]
    assert run.metrics["seconds"].tolist() == pytest.approx(ends)
    times = run.times()
    assert sum(times.values()) == pytest.approx(ends[3] + 9)
    usual = sorted(step[1:])[1]
    assert times["first steps, compiling"] == pytest.approx(step[0] - usual)
    expected = {"held-out loss": 18, "samples": 0.5, "checkpoints": 0.25, "starting": 20}
    assert {kind: times[kind] for kind in expected} == pytest.approx(expected)
    assert times["waiting for data"] == pytest.approx(0.004)


def test_hellaswag_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    metrics = rows(200, 100)
    for step, share in ((99, 0.26), (199, 0.2951)):
        metrics[step] |= {"hellaswag": share, "hellaswag_ms": 4000.0}
    folder = make_run(tmp_path / "run", metrics)
    run = read_run(folder)
    assert run.times()["HellaSwag"] == 8
    # It comes after its step, as the held-out loss does.
    spent = sum(run.times().values())
    assert run.metrics["seconds"][-1] == pytest.approx(spent - 9 - 4)
    assert [figure.value for figure in figures(run) if figure.name == "HellaSwag"] == ["29.51%"]
    drawn = report(folder).data["charts"]["hellaswag"]["spec"]
    points = [(row["step"], row["raw"]) for row in drawn["data"]["values"]]
    assert points == [(100, 0.26), (200, 0.2951)]
    low, high = drawn["encoding"]["y"]["scale"]["domain"]
    assert low < 0.25
    assert high > 0.2951
    lines = [layer["mark"] for layer in drawn["layer"] if layer["mark"]["type"] == "line"]
    assert all(mark.get("point") for mark in lines if mark["strokeWidth"] == 2)
    without = make_run(tmp_path / "without", rows(200, 100))
    assert "hellaswag" not in report(without).data["charts"]
    assert report(folder, without).data["charts"]["hellaswag"]["spec"]["data"]["values"]


def test_metrics_without_pauses_have_the_time_of_steps(tmp_path: Path) -> None:
    metrics = [
        {name: value for name, value in row.items() if name not in ("setup_ms", "data_ms")}
        for row in rows(3)
    ]
    run = read_run(make_run(tmp_path / "run", metrics))
    assert sum(run.times().values()) == pytest.approx(sum(row["step_ms"] for row in metrics) / 1e3)


def test_cost_is_price_times_time(tmp_path: Path) -> None:
    settings = json.loads(json.dumps(SETTINGS))
    assert read_run(make_run(tmp_path / "run", rows(3), settings)).cost is None
    settings["settings"]["train"]["price_per_hour"] = 3.6
    run = read_run(make_run(tmp_path / "run", rows(3), settings))
    assert run.cost == pytest.approx(sum(run.times().values()) / 1000)
    assert f"{run.cost:,.2f}" in {figure.value for figure in figures(run)}


def test_a_branch_names_its_beginning(tmp_path: Path) -> None:
    long = make_run(tmp_path / "long", rows(38))
    branch = make_run(tmp_path / "branch", rows(38), {**SETTINGS, "origin": "long@20"})
    (steps,) = [it for it in figures(read_run(branch)) if it.name == "steps"]
    assert (steps.value, steps.note) == ("38", "all done; began as long@20")
    (row,) = [row for row in comparison([read_run(long), read_run(branch)]) if row.differs]
    assert (row.name, row.values) == ("began as", ["", "long@20"])


def test_a_run_names_the_weights_that_it_began_with(tmp_path: Path) -> None:
    begun = {**SETTINGS, "initial_weights": "openai-community/gpt2@607a30d"}
    tuned, other = (
        read_run(make_run(tmp_path / name, rows(38), settings))
        for name, settings in (("tuned", begun), ("other", SETTINGS))
    )
    (steps,) = [it for it in figures(tuned) if it.name == "steps"]
    assert steps.note == "all done; from openai-community/gpt2@607a30d"
    (row,) = [row for row in comparison([tuned, other]) if row.differs]
    assert (row.name, row.values) == (
        "began with the weights of",
        ["openai-community/gpt2@607a30d", ""],
    )


@pytest.mark.parametrize(
    ("val_tokens", "on"), ((5000, ", on 4,096 tokens"), (100_000, ", on 9,216 tokens"), (None, ""))
)
def test_a_held_out_loss_tells_on_how_many_tokens_it_was_measured(
    tmp_path: Path, val_tokens: int | None, on: str
) -> None:
    own = SETTINGS["settings"]
    settings = {
        **SETTINGS,
        "settings": {
            **own,
            "model": {"context_length": 1024},
            "train": {**own["train"], "val_tokens": val_tokens},
        },
        "dataset": {"val_tokens": 10_000},
    }
    run = read_run(make_run(tmp_path / "run", rows(20, val_every=10), settings))
    (loss,) = [it for it in figures(run) if it.name == "held-out loss"]
    assert loss.note == f"nats per token{on}"


def test_compilation_in_step_0_does_not_change_throughput(tmp_path: Path) -> None:
    metrics = rows(38)
    plain = report(make_run(tmp_path / "run", metrics)).data["charts"]["throughput"]["spec"]
    metrics[0]["tokens_per_second"] /= 1000
    slow = report(make_run(tmp_path / "run", metrics)).data["charts"]["throughput"]["spec"]
    assert plain["encoding"]["y"] == slow["encoding"]["y"]


def test_axis_leaves_out_spikes_and_values_that_are_not_finite(tmp_path: Path) -> None:
    metrics = rows(2000, 100)
    metrics[700] |= {"train_loss": 300.0, "grad_norm": 1e6}
    for row in metrics[1900:]:
        row |= {"train_loss": float("nan"), "grad_norm": float("inf"), "step_ms": float("inf")}
    document = report(make_run(tmp_path / "run", metrics))
    chart = document.data["charts"]["loss"]
    low, high = chart["spec"]["encoding"]["y"]["scale"]["domain"]
    assert 2 < low < 3.5 < high < 12
    assert chart["fullY"][1] > 300
    assert 300 in [row.get("raw") for row in chart["spec"]["data"]["values"]]
    assert "NaN" not in document.scripts[0]
    assert "Infinity" not in document.scripts[0]


def test_settings_dataset_and_hardware_are_in_the_tables(tmp_path: Path) -> None:
    document = report(make_run(tmp_path / "run", rows(3)))
    for words in (
        *("TRAIN_LEARNING_RATE", "0.0036", "0.9, 0.95", "true", "HuggingFaceFW/fineweb"),
        *("20,000,000", "NVIDIA H200", "140.0 GiB", "bf16", "2.13.0", "124M parameters"),
    ):
        assert words in document.text


def test_several_runs_are_compared(tmp_path: Path) -> None:
    other = json.loads(json.dumps(SETTINGS))
    other["settings"]["train"] |= {"learning_rate": 0.0005, "seed": 7}
    other["settings"]["report"] = {"port": 8002}
    runs = [
        make_run(tmp_path / "muon", rows(38, 19)),
        make_run(tmp_path / "adamw", rows(20, 10, lowest=3.5), other),
    ]
    document = report(*runs)
    tables = re.split("Settings that differ|Held-out loss", document.text)
    comparison, differing = (tables[0], tables[1])
    assert "TRAIN_LEARNING_RATE 0.0036 0.0005" in " ".join(differing.split())
    assert "TRAIN_SEED 7" in " ".join(differing.split())
    assert "TRAIN_MAX_STEPS" not in differing
    assert "REPORT_PORT" not in document.text
    for run in runs:
        held_out = [row["val_loss"] for row in rows_of(run) if "val_loss" in row]
        assert f"{held_out[-1]:.4f}" in comparison
        assert f"{min(held_out):.4f}" in comparison
    drawn = document.data["charts"]
    for chart in drawn.values():
        assert {row["run"] for row in chart["spec"]["data"]["values"]} == {"muon", "adamw"}
    assert list(drawn)[:2] == ["held_out_loss", "loss"]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_named_twice_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(3))
    (path, *_) = write_report([run, run])
    assert Page(path.read_text()).data["runs"] == ["run"]


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / disk / "run", rows(3)) for disk in ("one", "two")]
    (path, *_) = write_report(folders)
    assert Page(path.read_text()).data["runs"] == [*map(str, folders)]


def test_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    settings = json.loads(json.dumps(SETTINGS))
    settings["settings"]["train"][HOSTILE] = HOSTILE
    settings["device"]["name"] = settings["dataset"]["folder"] = HOSTILE
    samples = {2: [HOSTILE], 3: ["東京 שלום مرحبا 🙂\n\ttab \x07", HOSTILE]}
    name = "<b>run<b>&"
    hostile = make_run(tmp_path / name, rows(3), settings, samples)
    plain = make_run(tmp_path / "plain", rows(3), samples={2: ["a"], 3: ["a", "b"]})
    for runs in ((hostile,), (hostile, plain)):
        document = report(*runs)
        assert document.tags.count("script") == 3
        assert "img" not in document.tags
        assert "onerror" not in dict(document.attributes)
        assert document.text.count(HOSTILE) >= 4
        assert name in document.text
        assert "東京 שלום مرحبا 🙂" in document.text


def test_samples_are_shown_with_the_loss_at_their_step(tmp_path: Path) -> None:
    metrics = rows(40, 20)
    samples = {step: [f"text {step}"] for step in (10, 20, 40)}
    document = report(make_run(tmp_path / "run", metrics, samples=samples))
    words = " ".join(document.text.split())
    assert f"after 10 steps training loss {metrics[9]['train_loss']:.3f} text 10" in words
    assert f"after 20 steps held-out loss {metrics[19]['val_loss']:.3f} text 20" in words
    assert words.index("text 10") < words.index("text 20") < words.index("text 40")


def test_first_and_last_of_many_samples_are_shown(tmp_path: Path) -> None:
    samples = {step: [f"<{step}>"] for step in range(1, 401)}
    document = report(make_run(tmp_path / "run", rows(400), samples=samples))
    kept = [int(step) for step in re.findall(r"<(\d+)>", document.text)]
    assert len(kept) == document.tags.count("article") == 100
    assert (kept[0], kept[-1]) == (1, 400)
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    "settings",
    (
        *({}, [], None, 7, "text", {"settings": None}, {"settings": [1, [2, {}]]}),
        *({"settings": {"train": 3, "general": "x"}}, {"device": "H200", "parameters": "many"}),
        {"settings": {"train": {"max_steps": "all", "price_per_hour": [1]}}},
        {"parameters": 1e999, "processes": None, "dataset": {"folder": {"a": [None]}}},
        {"device": {"name": None, "memory_bytes": 0}, "versions": [], "git_revision": 5},
        SETTINGS | {"versions": {}},
    ),
    ids=lambda value: json.dumps(value)[:40],
)
def test_malformed_settings_do_not_affect_the_rest(tmp_path: Path, settings: Any) -> None:
    document = report(make_run(tmp_path / "run", rows(3), settings))
    assert len(document.data["charts"]) == 6


def test_the_code_of_the_runs_is_shown_and_escaped(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", rows(3))
    assert comparison([read_run(old), read_run(old)])[-1].name != "code"
    source = {"differs": False, "sha256": "fedcba9876543210"}
    known = SETTINGS | {"git_revision": "0123456789abcdef", "source": source}
    plain = make_run(tmp_path / "plain", rows(3), known)
    changed = make_run(
        tmp_path / "changed", rows(3), known | {"source": source | {"differs": True}}
    )
    alone = report(plain).text
    assert "Code changes" not in alone
    assert "code 0123456789, SHA-256 fedcba9876 " in " ".join(alone.split())
    assert alone.count("0123456789") == 1
    (changed / "code.patch").write_text(f"-old\n+{HOSTILE}\n")
    (changed / "code-000002.patch").write_bytes(b"+later \xff\n")
    (changed / "code-mine.patch").write_text("not ours")
    document = report(changed, plain, old)
    words = " ".join(document.text.split())
    assert f"from the start -old +{HOSTILE} changed, after 2 steps +later \ufffd" in words
    assert "plain unchanged old not recorded" in words
    assert "not ours" not in words
    row = next(
        row
        for row in comparison([read_run(it) for it in (changed, plain, old)])
        if row.name == "code"
    )
    assert row.values == [
        "0123456789 with changes, SHA-256 fedcba9876, other code after 2 steps",
        "0123456789, SHA-256 fedcba9876",
        "",
    ]


def test_unreadable_settings_are_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(3))
    (run / "settings.json").write_text("{")
    assert "settings.json is not valid JSON" in report(run).text
    (run / "settings.json").unlink()
    assert "settings.json is missing" in report(run).text


@pytest.mark.parametrize(
    "content", (b"", b"\xff\xfe\0 no heading", b"----- after 3 steps -----\n\xff")
)
def test_malformed_samples_do_not_affect_the_rest(tmp_path: Path, content: bytes) -> None:
    run = make_run(tmp_path / "run", rows(3))
    (run / "samples.txt").write_bytes(content)
    assert ("after 3 steps" in report(run).text) == content.startswith(b"-----")


def test_only_required_columns_are_needed(tmp_path: Path) -> None:
    metrics = [{"step": 0, "tokens": 8, "train_loss": 10.9, "lr": None}]
    written = write_report([make_run(tmp_path / "run", metrics)])
    assert [path.name for path in written] == ["report.html", "report.png", "loss.png"]


def test_run_without_a_finite_loss_has_a_report(tmp_path: Path) -> None:
    metrics = [{"step": 0, "tokens": 8, "train_loss": float("nan")}]
    written = write_report([make_run(tmp_path / "run", metrics)])
    assert [path.name for path in written] == ["report.html", "report.png"]


def test_report_is_replaced_in_one_step(tmp_path: Path) -> None:
    run, kept = make_run(tmp_path / "run", rows(20)), tmp_path / "kept.html"
    (path, *_) = write_report([run])
    first = path.read_bytes()
    os.link(path, kept)
    write_report([make_run(run, rows(38))])
    assert kept.read_bytes() == first, "the old file was written into"
    assert path.read_bytes() != first


def test_same_metrics_give_the_same_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(20))
    first = [path.read_bytes() for path in write_report([run])]
    assert first == [path.read_bytes() for path in write_report([run])]


def test_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run .*nothing"):
        write_report([tmp_path / "nothing"])


@pytest.mark.parametrize("text", (None, "", '{"step": 0, "tok'))
def test_run_without_a_step_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl has no steps"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    "line",
    (
        '{"step": 1, "tok',
        "",
        "[1, 2]",
        "7",
        "[" * 100_000,
        '{"step": 1, "tokens": 2}',
        '{"step": 1, "tokens": 2, "train_loss": "low"}',
        '{"step": 1, "tokens": 2, "train_loss": "3"}',
        '{"step": 1, "tokens": 2, "train_loss": {}}',
        '{"step": null, "tokens": 2, "train_loss": 3}',
        '{"step": 1e999, "tokens": 2, "train_loss": 3}',
        "\0\0\0",
    ),
    ids=range(12),
)
def test_unusable_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps(rows(1)[0])
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 "):
        write_report([tmp_path])
    assert not (tmp_path / "report").exists()
