import csv
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from app.errors import UserError
from app.tools.report.pictures import THEMES, picture
from app.tools.sweep.chart import sweep_chart
from app.tools.sweep.plan import plan_sweep
from app.tools.sweep.results import (
    Result,
    best_of,
    combinations,
    read_result,
    read_results,
    table,
    write_results,
)
from tests.tools.run_folders import make_run, rows
from tests.train.processes import TINY


def result(rate: object, seed: int, loss: float | None) -> Result:
    values = {"learning_rate": rate, "seed": seed}
    run, rest = f"run-{rate}-{seed}", (loss, 60.0, "abc")
    return Result(run, values, "diverged" if loss is None else "complete", *rest)


RESULTS = [
    *(result(0.001, seed, loss) for seed, loss in enumerate((4.0, 4.2, 4.4))),
    *(result(0.002, seed, loss) for seed, loss in enumerate((3.9, 4.0, 4.1))),
    *(result(0.02, seed, loss) for seed, loss in enumerate((3.5, None))),
]


def test_the_table_has_mean_spread_and_seeds_and_marks_the_best_that_never_diverged() -> None:
    assert table(combinations(RESULTS)).splitlines() == [
        "learning_rate  held-out loss    seeds",
        "0.001          4.2000 ± 0.2000  3",
        "0.002          4.0000 ± 0.1000  3      best",
        "0.02           3.5000           1      1 diverged",
    ]
    assert best_of(combinations(RESULTS[-1:])) is None


def test_files_hold_every_run_and_every_combination(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS, 9)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["planned_runs"] == 9
    assert [it["is_best"] for it in written["combinations"]] == [False, True, False]
    assert written["combinations"][0]["standard_deviation"] == pytest.approx(0.2)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["held_out_loss"] for line in lines] == [
        "4.0",
        "4.2",
        "4.4",
        "3.9",
        "4.0",
        "4.1",
        "3.5",
        "",
    ]
    assert lines[-1] == {
        "run": "run-0.02-1", "learning_rate": "0.02", "seed": "1",
        "status": "diverged", "held_out_loss": "", "seconds": "60.0", "git_revision": "abc",
    }  # fmt: skip


def test_results_are_read_again_unless_the_run_was_deleted(data_dir: Path) -> None:
    folder, runs = plan_sweep(TINY, ["train.seed=0,1"])
    folder.mkdir(parents=True)
    for run in runs:
        make_run(run.folder.path, rows(10, 5), {})
    results = [read_result(run, diverged=False) for run in runs]
    losses = [row["val_loss"] for row in rows(10, 5) if "val_loss" in row]
    assert [it.held_out_loss for it in results] == [losses[-1]] * 2
    write_results(folder, results, 2)
    assert [*read_results(folder, runs).values()] == results
    runs[0].folder.metrics.unlink()
    assert [*read_results(folder, runs).values()] == results[1:]
    with pytest.raises(UserError, match="holds a sweep of other values: run-seed1"):
        read_results(folder, plan_sweep(TINY, ["train.seed=0,2"])[1])
    (folder / "sweep.json").write_text('{"runs": [{}]}')
    with pytest.raises(UserError, match=r"sweep.json is damaged: .*\n  fix: delete"):
        read_results(folder, runs)


def test_a_run_that_uses_its_best_checkpoint_counts_with_its_lowest_loss(data_dir: Path) -> None:
    metrics = rows(10, 5)
    metrics[4]["val_loss"], metrics[9]["val_loss"] = 3.0, 4.0
    for use_best, loss in (("true", 3.0), ("false", 4.0)):
        (run,) = plan_sweep(TINY | {"TRAIN_USE_BEST": use_best}, ["train.seed=0"])[1]
        make_run(run.folder.path, metrics, {})
        assert read_result(run, diverged=False).held_out_loss == loss


@pytest.mark.parametrize(
    "results",
    (
        RESULTS,
        RESULTS[:1],
        RESULTS[-1:],
        [result("muon", 0, 4.0), result("adamw", 1, 4.2)],
        [result([0.9, 0.95], 0, 4.0), result([0.9, 0.99], 0, 4.2)],
        [Result("run-1", {"seed": 1}, "complete", 4.0, 1.0, None)],
    ),
)
def test_any_results_have_a_picture_in_both_themes(results: list[Result]) -> None:
    chart = sweep_chart(results)
    for theme, corner in zip(THEMES, ((255, 255, 255), (0x16, 0x1B, 0x22)), strict=True):
        with Image.open(BytesIO(picture(chart, theme))) as image:
            assert image.convert("RGB").getpixel((2, 2)) == corner
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


def test_the_axis_is_logarithmic_over_a_decade() -> None:
    for first, last, scale in ((1e-3, 2e-3, "linear"), (1e-3, 1e-2, "log"), (3e-5, 3e-4, "log")):
        chart = sweep_chart([result(first, 0, 4.0), result(last, 0, 4.0)])
        assert chart.spec["encoding"]["x"]["scale"]["type"] == scale
