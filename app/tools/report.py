"""One picture of a run: loss, learning rate, gradient norm and throughput over tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.errors import UserError
from app.files import atomic_file, read_json
from app.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Format = Callable[[float], str]
Box = tuple[int, int, int, int]
Words = tuple[str, str, str]

COLUMNS = (
    *("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm"),
    *("step_ms", "tokens_per_second", "mfu", "memory_bytes"),
)
WIDTH, HEIGHT, LEFT, RIGHT, DPI = 1600, 1080, 60, 1540, 100  # pixels from the top left corner
# Okabe and Ito's blue and vermilion (https://jfly.uni-koeln.de/color/) suit all colour vision.
TRAIN, TRAIN_TINT, HELD_OUT = "#0072B2", "#B0D1E8", "#D55E00"
INK, GREY, RULE, GRID = "#1B2430", "#6B7480", "#B4BCC6", "#E7EAEE"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Draw run_dir's metrics.jsonl, titled from its settings.json, as a PNG of 1600 x 1080 pixels.

    Returns its path: out, by default run_dir/report/report.png; the file is replaced atomically.
    Raises UserError if matplotlib, the folder or its metrics are missing, or if a line of the
    metrics is not a JSON object with a step, its tokens and its loss.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(f"matplotlib is missing: {error}", "pip install matplotlib") from error
    if not run_dir.is_dir():
        raise UserError(f"there is no run in {run_dir}", "check TRAIN_RUN_NAME and DATA_DIR")
    out = out or run_dir / "report" / "report.png"
    metrics = columns(run_dir / "metrics.jsonl")
    settings = run_dir / "settings.json"
    facts = read_json(settings, "restore or remove it") if settings.is_file() else {}

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _draw_header(figure, run_dir.resolve().name, metrics, facts)
    _draw_loss(figure, metrics)
    _draw_small_panels(figure, metrics)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        figure.savefig(file, format="png")
    return out


def columns(path: Path) -> dict[str, Floats]:
    """Read metrics.jsonl into one float64 [steps] array per column, NaN where not measured.

    Raises UserError if there is no step, or names the line that cannot be used.
    """
    records = read_metrics(path) if path.is_file() else []
    if not records:
        raise UserError(f"{path} holds no step", "let the run finish one, then draw it again")
    return {
        name: np.array([record.get(name) for record in records], dtype=np.float64)
        for name in COLUMNS
    }


def smooth(values: Floats, centres: npt.NDArray[np.int64], reach: int) -> Floats:
    """Interquartile mean, blind to spikes, over `reach` steps to both sides of each centre.

    values: float64 [steps], of which only the finite count; centres: int64 [points], indices of
    steps; returns float64 [points]. Windows narrow towards the start: its steep descent stays put.
    """
    windows = [np.sort(_finite(values[i - min(i, reach) : i + min(i, reach) + 1])) for i in centres]
    middles = [window[len(window) // 4 : len(window) - len(window) // 4] for window in windows]
    return np.array([middle.mean() if middle.size else np.nan for middle in middles])


def format_count(value: float) -> str:
    """A number with three significant digits and k, M, B or T: 124439808 is 124M."""
    value = float(f"{value:.3g}")
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 159.5 is 2 min 40 s, 6.31 is 6.3 s."""
    whole, units = round(seconds), (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (part, part_size) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part}"
    return f"{seconds:.2g} s"


def format_rate(value: float) -> str:
    """A learning rate as papers write it: 0.0006 is 6e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _key(values: Floats, form: Format, of: Callable[[Floats], Any] = np.median) -> str:
    """A key figure of what was measured, or nothing."""
    return form(float(of(_finite(values)))) if _finite(values).size else ""


def _draw_header(figure: Figure, name: str, metrics: dict[str, Floats], facts: Any) -> None:
    parameters, tokens = facts.get("parameters"), format_count(metrics["tokens"][-1])
    size = f"{format_count(parameters)} parameters" if parameters else ""
    device = facts.get("device", {}).get("name")
    scale = "  ·  ".join(filter(None, (size, f"{tokens} tokens", device)))
    shrink = min(1.0, (RIGHT - LEFT) / (20 * len(name) + 14 * len(scale)))
    _write(figure, LEFT, 66, (name, 22 * shrink, INK), (scale, 16 * shrink, GREY))
    steps = len(metrics["step"])
    planned = facts.get("settings", {}).get("train", {}).get("max_steps", steps)
    held_out, trained = (_finite(metrics[name])[-1:] for name in ("val_loss", "train_loss"))
    # Step 0 contains the compilation: it counts only where it is all there is.
    speed, mfu = (metrics[name][steps > 1 :] for name in ("tokens_per_second", "mfu"))
    x = float(LEFT)
    for value, caption in (
        (_key(held_out, "{:.3f}".format), "held-out loss"),
        (_key(trained[held_out.size :], "{:.3f}".format), "training loss"),
        (f"{steps:,}", f"of {planned:,} steps"),
        (_key(metrics["step_ms"] / 1000, format_duration, np.sum), "training"),
        (_key(speed, format_count), "tokens/s, median"),
        (_key(mfu, "{:.1%}".format), "MFU, median"),
        (_key(metrics["memory_bytes"] / 2**30, "{:.1f} GiB".format, np.max), "peak memory"),
    ):
        if value:
            x = 22 + _write(figure, x, 108, (value, 14, INK), (caption, 12.5, GREY))
    torch, revision = facts.get("versions", {}).get("torch"), facts.get("git_revision") or ""
    source = f"gpt-compose {revision[:12]}" + (f"  ·  torch {torch}" if torch else "")
    _write(figure, LEFT, HEIGHT - 24, (source, 9.5, GREY))


def _draw_loss(figure: Figure, metrics: dict[str, Floats]) -> None:
    tokens, train_loss, measured = (metrics[n] for n in ("tokens", "train_loss", "val_loss"))
    x, held_out = tokens[np.isfinite(measured)], _finite(measured)
    box, words = (LEFT, 206, RIGHT - 150, 706), ("Loss", "nats per token", "")
    axes, trained = _panel(figure, box, words, tokens, train_loss, "{:.2f}".format, held_out[-1:])
    edge, (low, high), height = axes.get_xlim()[1], axes.get_ylim(), -np.inf
    ends = [(trained, "train", TRAIN)] if np.isfinite(trained) else []
    if held_out.size:
        axes.plot(x, held_out, "o", color=HELD_OUT, ms=6, mec="white", zorder=4)
        axes.plot(x[-1:], held_out[-1:], "o", color=HELD_OUT, ms=10, mec="white", zorder=5)
        axes.axhline(held_out[-1], x[-1] / edge, color=HELD_OUT, lw=1, ls=(0, (1, 3)))
        ends.append((float(held_out[-1]), "held-out", HELD_OUT))
    for loss, name, color in sorted(ends):
        height = max(loss, height + 0.05 * (high - low))
        label = axes.text(edge, height, f" {loss:.3f} {name}", color=color, va="center")
        label.set(size=12, weight="bold")

    done = metrics["step"][-1] + 1
    ticks = axes.xaxis.get_major_locator().tick_values(0, done)
    ticks = [tick for tick in ticks if tick <= done and tick % 1 == 0]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.multiply(ticks, tokens[-1] / done), [f"{tick:,.0f}" for tick in ticks])
    top.tick_params(length=0, labelsize=11, labelcolor=GREY, pad=7)
    top.spines["top"].set_visible(False)
    _write(figure, LEFT, box[1] - 13, ("steps", 10, GREY))


def _draw_small_panels(figure: Figure, metrics: dict[str, Floats]) -> None:
    x, rate, norm = metrics["tokens"], metrics["lr"], metrics["grad_norm"]
    boxes = [(left, 832, left + 448, 996) for left in (LEFT, LEFT + 516, LEFT + 1032)]
    words = ("Learning rate", "", _key(rate, lambda value: f"peak {format_rate(value)}", np.max))
    _panel(figure, boxes[0], words, x, rate, format_rate, np.zeros(1))
    words = ("Gradient norm", "", _key(norm, lambda value: f"median {format_count(value)}"))
    _panel(figure, boxes[1], words, x, norm, format_count, np.zeros(1))
    unit = "from step 1" if len(x) > 1 else ""
    x, speed = x[len(x) > 1 :], metrics["tokens_per_second"][len(x) > 1 :]
    words = ("Tokens/s", unit, _key(speed, lambda value: f"median {format_count(value)}"))
    # Room for a tenth to both sides keeps ordinary jitter from looking like trouble.
    around = np.array([0.9, 1.1]) * (np.median(_finite(speed)) if words[-1] else np.nan)
    _panel(figure, boxes[2], words, x, speed, format_count, around)


def _panel(
    figure: Figure, box: Box, words: Words, x: Floats, y: Floats, form: Format, beside: Floats
) -> tuple[Axes, float]:
    """Draw a curve thin and smoothed under its heading; return the axes and the smoothed end.

    box: pixels, left of the heading, then top, right and bottom of the axes. The view holds
    `beside` and the curve, except for spikes (two in a thousand to both sides) and for what only
    the first fiftieth of a run reaches, whose descent is steep and known.
    """
    (left, top, right, bottom), (name, unit, note) = box, words
    y = np.where(np.isfinite(y), y, np.nan)
    start, wide = left + 66, right - left > WIDTH / 2
    baseline = top - (48 if wide else 20)
    _write(figure, left, baseline, (name, 14, INK), (unit, 12, GREY))
    note = note if _finite(y).size else "not recorded"
    figure.text(right / WIDTH, 1 - baseline / HEIGHT, note, ha="right", size=12, color=INK)
    _write(figure, left, bottom + 21, ("tokens", 10, GREY))
    place = (start / WIDTH, 1 - bottom / HEIGHT, (right - start) / WIDTH, (bottom - top) / HEIGHT)
    axes = figure.add_axes(place, xlim=(0, x[-1] * (1 + 8 / (right - start))))
    axes.locator_params(nbins=9 if wide else 4)
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    axes.tick_params(length=0, labelsize=11, labelcolor=GREY, pad=7)
    axes.grid(axis="y", color=GRID, lw=1)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)

    centres = np.linspace(0, len(y) - 1, min(len(y), 1000)).round().astype(np.int64)
    smoothed = smooth(y, centres, len(y) // 100)
    axes.plot(x, y, color=TRAIN_TINT, lw=0.8)
    axes.plot(x[centres], smoothed, "o-" if len(y) <= 50 else "-", color=TRAIN, lw=2, ms=4.5)
    usual = np.sort(_finite(y[len(y) // 50 :]))
    outer = len(usual) // 500
    view = [*usual[outer : len(usual) - outer], *_finite(beside)] or [0.0]
    low, high = min(view), max(view)
    margin = 0.07 * ((high - low) or abs(high) or 1.0)
    axes.set_ylim(low - (margin if low else 0), high := high + margin)
    if (y > high).any():
        peak = int(np.nanargmax(y))
        back = peak + int(np.argmin(y[peak:] > high))
        axes.text(x[back], high, f"  ▲ {form(y[peak])}", color=GREY, size=9.5, va="top")
    return axes, float(smoothed[-1])


def _write(figure: Figure, x: float, y: float, *pieces: tuple[str, float, str]) -> float:
    """Set (text, points, colour) side by side on a baseline; x, y and the returned end: pixels."""
    for text, size, color in pieces:
        drawn = figure.text(x / WIDTH, 1 - y / HEIGHT, text, size=size, color=color)
        drawn.set(weight="bold" if color == INK else "normal", parse_math=False)
        x += drawn.get_window_extent().width + 0.7 * size
    return x
