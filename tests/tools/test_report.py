import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from app.errors import UserError
from app.tools.report import (
    HELD_OUT,
    TRAIN,
    columns,
    format_count,
    format_duration,
    format_rate,
    smooth,
    write_report,
)

SETTINGS = {
    "settings": {"data_dir": "data", "prepare": {}, "model": {}, "train": {"max_steps": 38}},
    "versions": {"torch": "2.13.0"},
    "device": {"name": "NVIDIA H200"},
    "git_revision": None,
    "parameters": 124439808,
}


def rows(steps: int, val_every: int = 0, tokens_per_step: int = 524288) -> list[dict[str, Any]]:
    """Metrics of a run whose loss falls from 11 towards 3, with the compilation in step 0."""
    noise = np.random.default_rng(0).standard_normal(steps)
    result: list[dict[str, Any]] = []
    for step in range(steps):
        loss = 3 + 8 / (1 + step / 20) + 0.05 * float(noise[step])
        step_ms = 60000.0 if step == 0 else 2500 + 20 * float(noise[step])
        result.append(
            {
                "step": step,
                "tokens": (step + 1) * tokens_per_step,
                "train_loss": loss,
                "lr": 6e-4 * min(1, (step + 1) / 10),
                "grad_norm": 0.3 + 10 / (1 + step),
                "step_ms": step_ms,
                "tokens_per_second": tokens_per_step / step_ms * 1000,
                "mfu": None,
                "memory_bytes": 41 * 2**30,
            }
        )
        if val_every and (step + 1) % val_every == 0:
            result[-1]["val_loss"] = loss + 0.1
    return result


def make_run(folder: Path, metrics: list[dict[str, Any]], settings: Any = SETTINGS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def pixels(path: Path) -> npt.NDArray[np.float64]:
    """The picture as float [height, width, 3]."""
    return np.asarray(imread(path), dtype=np.float64)[..., :3]


def count_pixels(path: Path, color: str) -> int:
    return int((np.abs(pixels(path) - to_rgb(color)).max(axis=-1) < 1 / 255).sum())


@pytest.mark.parametrize("steps", (1, 2, 38, 20000))
@pytest.mark.parametrize("val_every", (0, 1000))
def test_picture_has_its_size_and_keeps_its_margins(
    tmp_path: Path, steps: int, val_every: int
) -> None:
    run = make_run(tmp_path / "run", rows(steps, min(val_every, steps)))
    path = write_report(run)
    assert path == run / "report" / "report.png"
    picture = pixels(path)
    assert picture.shape == (1080, 1600, 3)
    assert (picture[:12] == 1).all()
    assert (picture[-12:] == 1).all()
    assert (picture[:, :12] == 1).all()
    assert (picture[:, -12:] == 1).all()
    assert count_pixels(path, TRAIN) > 50


def test_long_names_stay_within_the_picture(tmp_path: Path) -> None:
    settings = SETTINGS | {"device": {"name": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"}}
    path = write_report(make_run(tmp_path / ("name-of-a-run-" * 10), rows(20), settings))
    assert (pixels(path)[:, -12:] == 1).all()


def test_held_out_loss_is_drawn_only_where_measured(tmp_path: Path) -> None:
    without = write_report(make_run(tmp_path / "run", rows(38)), tmp_path / "without.png")
    with_it = write_report(make_run(tmp_path / "run", rows(38, 19)), tmp_path / "with.png")
    assert count_pixels(without, HELD_OUT) == 0
    assert count_pixels(with_it, HELD_OUT) > 50


def test_compilation_in_step_0_does_not_change_the_throughput(tmp_path: Path) -> None:
    metrics = rows(38)
    plain = write_report(make_run(tmp_path / "run", metrics), tmp_path / "plain.png")
    metrics[0]["tokens_per_second"] /= 1000
    compiled = write_report(make_run(tmp_path / "run", metrics), tmp_path / "compiled.png")
    assert plain.read_bytes() == compiled.read_bytes()


def test_spikes_and_values_that_are_not_finite_are_drawn_around(tmp_path: Path) -> None:
    metrics = rows(2000, 100)
    metrics[700] |= {"train_loss": 300.0, "grad_norm": 1e6}
    for row in metrics[1900:]:
        row |= {"train_loss": float("nan"), "grad_norm": float("inf")}
    path = write_report(make_run(tmp_path / "run", metrics))
    curve = np.abs(pixels(path) - to_rgb(TRAIN)).max(axis=-1) < 1 / 255
    heights = np.flatnonzero(curve[206:706, 126:1370].any(axis=1))
    assert np.ptp(heights) > 250, "the spike squashed the loss"


@pytest.mark.parametrize(
    "settings", ({}, {"parameters": 3, "git_revision": "3f9c1d2"}, SETTINGS | {"versions": {}})
)
def test_optional_settings_may_be_missing(tmp_path: Path, settings: Any) -> None:
    assert write_report(make_run(tmp_path / "run", rows(3), settings)).is_file()


def test_a_run_name_is_not_read_as_a_formula(tmp_path: Path) -> None:
    assert write_report(make_run(tmp_path / r"a$\frac$b$", rows(3))).is_file()


def test_only_required_columns_are_needed(tmp_path: Path) -> None:
    metrics = [{"step": 0, "tokens": 8, "train_loss": 10.9, "lr": None}]
    assert write_report(make_run(tmp_path / "run", metrics)).is_file()


def test_settings_file_may_be_missing_but_not_broken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(3))
    (run / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json"):
        write_report(run)
    (run / "settings.json").unlink()
    assert write_report(run).is_file()


def test_report_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", rows(20)))
    first, kept = path.read_bytes(), tmp_path / "kept.png"
    os.link(path, kept)
    write_report(make_run(tmp_path / "run", rows(38)))
    assert kept.read_bytes() == first, "the old file was written into"
    assert path.read_bytes() != first
    assert [file.name for file in path.parent.iterdir()] == ["report.png"]


def test_same_metrics_give_the_same_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows(20))
    nested = tmp_path / "new" / "folder" / "b.png"
    assert write_report(run, nested) == nested
    assert nested.read_bytes() == write_report(run).read_bytes()


def test_missing_run_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .*nothing"):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize("text", (None, "", '{"step": 0, "tok'))
def test_run_without_a_step_is_the_users_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no step"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "line",
    (
        '{"step": 1, "tok',
        "",
        "[1, 2]",
        "7",
        '{"step": 1, "tokens": 2}',
        '{"step": 1, "tokens": 2, "train_loss": "low"}',
        '{"step": 1, "tokens": 2, "train_loss": {}}',
        "\0\0\0",
    ),
)
def test_unusable_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps(rows(1)[0])
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 "):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_metrics_are_columns_with_nan_where_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows(4, 2))
    metrics = columns(run / "metrics.jsonl")
    assert metrics["tokens"].tolist() == [524288, 1048576, 1572864, 2097152]
    assert np.isnan(metrics["val_loss"]).tolist() == [True, False, True, False]
    assert np.isnan(metrics["mfu"]).all()


def test_matplotlib_missing_is_the_users_error(tmp_path: Path) -> None:
    make_run(tmp_path, rows(3))
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from app.errors import UserError\n"
        "from app.tools.report import write_report\n"
        "try: write_report(Path(sys.argv[1]))\n"
        "except UserError as error: print(error.fix)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "pip install matplotlib\n"


def smooth_all(values: list[float], reach: int) -> list[float]:
    return smooth(np.array(values), np.arange(len(values)), reach).tolist()


def test_smoothing_has_exact_values() -> None:
    assert smooth_all([5, 1, 4], 0) == [5, 1, 4]
    # Windows [0], [0..2], [1..3], [2..3] of 1, 2, 6, 4: below four values nothing is left out.
    assert smooth_all([1, 2, 6, 4], 1) == [1, 3, 4, 5]
    # The middle window holds all five, of which the lowest and the highest are left out.
    assert smooth_all([1, 2, 900, 4, 3], 2)[2] == 3
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), np.array([2]), 1).tolist() == [4]


def test_smoothing_keeps_straight_lines_and_ignores_spikes() -> None:
    line = np.linspace(11, 3, 500)
    inner = np.arange(490)
    assert np.allclose(smooth(line, inner, 10), line[:490])
    spiked = line.copy()
    spiked[[50, 250]] = 1e9
    assert np.allclose(smooth(spiked, inner, 10), line[:490], atol=0.02)


def test_smoothing_counts_only_finite_values() -> None:
    nan = float("nan")
    assert smooth_all([1, nan, 3], 1) == [1, 2, 3]
    assert np.isnan(smooth_all([nan, nan], 1)).all()


@pytest.mark.parametrize(
    ("value", "text"),
    (
        (0, "0"),
        (0.31, "0.31"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (8223.23, "8.22k"),
        (201937.3, "202k"),
        (999_950, "1M"),
        (19_922_944, "19.9M"),
        (124_439_808, "124M"),
        (1_558_000_000, "1.56B"),
        (10_000_000_000, "10B"),
        (15e12, "15T"),
    ),
)
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    (
        (0.634, "0.63 s"),
        (6.31, "6.3 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (159.51, "2 min 40 s"),
        (3599.7, "1 h 0 min"),
        (5430, "1 h 30 min"),
        (93600, "1 d 2 h"),
    ),
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), ((0, "0"), (6e-4, "6e-4"), (2.5e-5, "2.5e-5"), (1e-3, "1e-3"), (0.02, "2e-2"))
)
def test_learning_rates_are_short(rate: float, text: str) -> None:
    assert format_rate(rate) == text
