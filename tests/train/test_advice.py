"""Each line against a hopeless run, with its numbers worked out, and none without need."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.hardware.device import matmul_flops, select_device
from app.runs.checkpoint import TENSOR_FILES
from app.settings.settings import Settings
from app.settings.sources import RECIPES, load_settings
from app.train.advice import (
    Advice,
    advise,
    advise_on_disk,
    advise_on_duration,
    checkpoints_bytes,
    count_checkpoints,
)
from app.train.init_from import are_published
from tests.train.conftest import TinySettings
from tests.train.processes import CHECKOUT, TINY, Start

# Training and held-out tokens that each recipe prepares.
PREPARED = {
    "demo": (4_000_000, 65_536),
    "original": (20_000_000, 0),
    "fineweb20M": (20_000_000, 1_048_576),
    "gpt2-124M": (4_200_000_000, 10_485_760),
    "qwen3-124M": (2_000_000_000, 10_485_760),
    # A megabyte of English.
    "finetune": (250_000, 12_500),
}
# 124M parameters, of which 12 * 12 * 768 * 768 are in the blocks' matrices.
GPT2_PARAMETERS, GPT2_BLOCKS = 124_439_808, 84_934_656
HOUR, DAY = 3600.0, 86400.0


def settings(**changes: object) -> Settings:
    """The default run, without the settings of whoever runs the tests."""
    return load_settings({name: str(value) for name, value in changes.items()}, "train")


def lines(
    tokens: int | None, held_out: int | None = None, step: int = 0, /, **changes: object
) -> list[Advice]:
    chosen = settings(**changes)
    published = are_published(chosen)
    return list(advise(chosen.train, chosen.model, tokens, held_out, step, are_published=published))


@pytest.fixture(autouse=True)
def newcomer(data_dir: object) -> None:
    """No .env, and no settings in the environment."""


@pytest.mark.parametrize("recipe", sorted(PREPARED))
def test_nothing_speaks_against_a_recipe_on_its_own_data(recipe: str) -> None:
    tokens, held_out = PREPARED[recipe]
    assert lines(tokens, held_out, RECIPE=recipe) == []
    assert lines(None, None, RECIPE=recipe) == []


@pytest.mark.parametrize("tokens", (300_000, 1_000_000, 25_000_000))
def test_nothing_speaks_against_own_text_of_1_to_100_megabytes(tokens: int, tmp_path: Path) -> None:
    content = {"source": {"dataset": "files"}, "totals": {"train_tokens": tokens}}
    (tmp_path / "data" / "story").mkdir()
    (tmp_path / "data" / "story" / "manifest.json").write_text(json.dumps(content))
    for device in ("cpu", "cuda"):
        own = settings(TRAIN_DEVICE=device)
        assert own.general.recipe == "own-text"
        assert list(advise(own.train, own.model, tokens, tokens // 20, 0)) == []


def test_every_recipe_is_covered() -> None:
    # Own text has no size of its own; its model and steps are chosen by the text.
    assert {path.stem for path in RECIPES.glob("*.env")} - {"own-text"} == {*PREPARED}


def test_nothing_speaks_against_the_documented_extension_of_a_recipe() -> None:
    """docs/recipes.md lets 19,000 steps read 2B tokens 4.98 times."""
    tokens, held_out = PREPARED["qwen3-124M"]
    assert lines(tokens, held_out, RECIPE="qwen3-124M", TRAIN_MAX_STEPS=19_000) == []


def test_nothing_speaks_against_the_small_runs_of_the_tests(tiny: TinySettings) -> None:
    for changes in ({}, {"TRAIN_VAL_EVERY": 1}, {"TRAIN_MAX_STEPS": 3}):
        small = tiny(**changes)
        assert list(advise(small.train, small.model, 6000, 1001, 0)) == []


def test_text_that_is_read_many_times() -> None:
    # 120 * 524,288 / 10,000,000 = 6.29; 4 * 10,000,000 / 524,288 = 76.3.
    expected = (
        "120 steps read the 10,000,000 tokens of text 6.3 times; beyond about 4, repeated "
        "text adds little",
        "set TRAIN_MAX_STEPS=76, or prepare more text",
    )
    assert lines(10_000_000, 0, TRAIN_MAX_STEPS=120) == [expected]
    assert lines(10_000_000, 0, TRAIN_MAX_STEPS=114) == []
    # A run that continues can still end there, until it is beyond.
    assert lines(10_000_000, 0, 75, TRAIN_MAX_STEPS=120) == [expected]
    assert lines(10_000_000, 0, 76, TRAIN_MAX_STEPS=120) == []
    # The time limit decides how many steps there are.
    assert lines(10_000_000, 0, TRAIN_MAX_STEPS=120, TRAIN_MAX_HOURS=1) == []


def test_a_step_larger_than_the_text_and_a_model_too_large_for_it() -> None:
    # What the recipe of own text takes for less than a million tokens, on a CPU.
    too_large = (
        "84.9M weights in the model's blocks will memorize the 300,000 tokens of text",
        "set MODEL_NUM_LAYERS=4 MODEL_EMBD_SIZE=128 MODEL_NUM_HEADS=2 as RECIPE=own-text does, or "
        "prepare more text",
    )
    assert lines(300_000, 0) == [
        (
            "a step of 524,288 tokens is more than the 300,000 tokens of text",
            "set TRAIN_TOKENS_PER_STEP=1024, or prepare more text",
        ),
        too_large,
    ]
    # Neither can change in a run that continues.
    assert lines(300_000, 0, 2) == []
    # The model that is named is never too large itself, nor the step.
    fixed = {
        "MODEL_NUM_LAYERS": 4,
        "MODEL_EMBD_SIZE": 128,
        "MODEL_NUM_HEADS": 2,
        "TRAIN_TOKENS_PER_STEP": 1024,
    }
    assert lines(300_000, 0, **fixed) == []
    # With even less text, no size of the recipe is smaller, and a step is at least a sequence.
    few = fixed | {"MODEL_CONTEXT_LENGTH": 64}
    assert lines(2000, 0, **few, RECIPE="demo")[1][1] == "prepare more text"
    step, _ = lines(1000, 0, **few)
    assert step == (
        "a step of 1,024 tokens is more than the 1,000 tokens of text",
        "set TRAIN_TOKENS_PER_STEP=64, or prepare more text",
    )
    # A token for 40 of 84.9M weights.
    assert not any("memorize" in problem for problem, _ in lines(2_123_367, 0))
    assert any("memorize" in problem for problem, _ in lines(2_123_366, 0))


@pytest.mark.parametrize(
    ("optimizer", "width", "highest", "usual"),
    # 2.8 / 768 = 3.6e-3, of which 5 times is 1.82e-2; AdamW takes half of that.
    (
        ("muon", 768, 1.8e-2, "3.6e-03"),
        ("adamw", 768, 9.1e-3, "1.8e-03"),
        ("muon", 128, 0.109, "2.2e-02"),
        ("adamw", 1600, 4.3e-3, "8.7e-04"),
    ),
)
def test_a_learning_rate_far_above_what_works(
    optimizer: str, width: int, highest: float, usual: str
) -> None:
    def rate(value: float) -> list[Advice]:
        return lines(
            None,
            TRAIN_OPTIMIZER=optimizer,
            MODEL_EMBD_SIZE=width,
            MODEL_NUM_HEADS=width // 64,
            TRAIN_LEARNING_RATE=value,
        )

    assert rate(highest) == []
    too_high = float(f"{1.02 * highest:.3g}")
    assert rate(too_high) == [
        (
            f"TRAIN_LEARNING_RATE={too_high:g} is far above what works with {optimizer} at width "
            f"{width}",
            f"set TRAIN_LEARNING_RATE={usual}, or try factors of 2 of it",
        )
    ]


def test_published_weights_need_lower_rates() -> None:
    hub = {"TRAIN_INIT_FROM": "openai-community/gpt2"}
    # 2.8 / 768 / 20 = 1.8e-4, and the default is 20 times that.
    assert lines(250_000, 12_500, RECIPE="finetune", TRAIN_LEARNING_RATE=4e-4) == []
    assert lines(None, **hub) == [
        (
            "TRAIN_LEARNING_RATE=0.0036 is far above what works with muon at width 768 and trained "
            "weights",
            "set TRAIN_LEARNING_RATE=1.8e-04, or try factors of 2 of it",
        )
    ]
    assert lines(None, TRAIN_INIT_FROM="distilgpt2") == lines(None, **hub)
    # The weights of a run may go on as before.
    settings().run_dir.with_name("mine").mkdir(parents=True)
    assert lines(None, TRAIN_INIT_FROM="mine@100") == []


def test_a_learning_rate_that_changes_nothing() -> None:
    assert lines(None, TRAIN_LEARNING_RATE="1e-6") == []
    assert lines(None, TRAIN_LEARNING_RATE="3e-7") == [
        (
            "TRAIN_LEARNING_RATE=3e-07 is too low to change the model",
            "set TRAIN_LEARNING_RATE=3.6e-03, or try factors of 2 of it",
        )
    ]


def test_a_warm_up_of_most_of_the_run() -> None:
    expected = [("the warm-up takes 60 of 100 steps", "set TRAIN_WARMUP_STEPS=auto, which takes 1")]
    run = {"TRAIN_MAX_STEPS": 100, "TRAIN_WARMUP_STEPS": 60}
    assert lines(None, **run) == lines(None, None, 59, **run) == expected
    assert lines(None, None, 60, **run) == []
    assert lines(None, **run | {"TRAIN_WARMUP_STEPS": 50}) == []
    assert lines(None, TRAIN_MAX_STEPS=19, TRAIN_WARMUP_STEPS=18) == []


def test_a_cool_down_of_hardly_any_step() -> None:
    run = {"TRAIN_MAX_STEPS": 100, "TRAIN_LR_SCHEDULE": "wsd"}
    assert lines(None, **run, TRAIN_COOLDOWN=0.02) == [
        ("the cool-down takes 2 steps of 100", "set TRAIN_COOLDOWN=0.2 or more")
    ]
    for cooldown in (0, 0.03):
        assert lines(None, **run, TRAIN_COOLDOWN=cooldown) == []
    assert lines(None, TRAIN_MAX_STEPS=100, TRAIN_COOLDOWN=0.02) == []


def test_evaluations_that_take_longer_than_the_training() -> None:
    # A third of 1,048,576 tokens every 2 steps of 16,384: 10.67 times; every 214 steps a tenth.
    run = {"TRAIN_TOKENS_PER_STEP": 16_384, "TRAIN_MAX_STEPS": 1000, "TRAIN_VAL_EVERY": 2}
    problem = "held-out losses take 10.7 times as long as the training"
    assert lines(None, 2_000_000, **run) == [(problem, "set TRAIN_VAL_EVERY=214")]
    assert lines(None, None, **run) == []
    # Or only at the end, unless that alone takes longer: 21.3 steps' time.
    for steps, every in ((100, 100), (22, 22), (20, 0)):
        few = run | {"TRAIN_MAX_STEPS": steps}
        assert lines(None, 2_000_000, **few) == [(problem, f"set TRAIN_VAL_EVERY={every}")]
    # Less held-out text is measured sooner: a third of 196,608 tokens every 2 steps is twice.
    assert lines(None, 196_608, **run) == []
    assert lines(None, 196_609, **run) != []
    assert lines(None, 2_000_000, **run | {"TRAIN_VAL_EVERY": 214}) == []
    # 10,042 questions of 320 tokens, a third of the work, twice in 80 steps of 1,024: 26.2.
    demo = {"RECIPE": "demo", "TRAIN_HELLASWAG_EVERY": 40}
    assert lines(*PREPARED["demo"], **demo) == [
        (
            "scores on HellaSwag take 26.2 times as long as the training",
            "set TRAIN_HELLASWAG_EVERY=0",
        )
    ]
    assert lines(*PREPARED["demo"], **demo, TRAIN_HELLASWAG_FILE="mine.jsonl") == []


def duration(seconds: float, steps: int, *, on_cpu: bool = True, **changes: object) -> list[Advice]:
    return list(advise_on_duration(settings(**changes).train, seconds, steps, on_cpu=on_cpu))


def test_a_run_of_a_month_names_the_steps_of_a_day() -> None:
    often: dict[str, Any] = {"TRAIN_CHECKPOINT_EVERY": 1}
    assert duration(40 * DAY, 9600, **often) == [
        (
            "9,600 steps take at least 40 d 0 h on this CPU",
            "train on a GPU (docs/cloud.md), or set TRAIN_MAX_HOURS=24 for 240 steps; RECIPE=demo "
            "takes minutes",
        )
    ]
    ((_, fix),) = duration(40 * DAY, 9600, on_cpu=False, **often)
    assert fix == "use more or faster GPUs, or set TRAIN_MAX_HOURS=24 for 240 steps"
    assert duration(6.9 * DAY, 9600, **often) == []
    # Not even a step a day.
    ((_, fix), *_) = duration(40 * DAY, 38)
    assert fix == "train on a GPU (docs/cloud.md), or a smaller model; RECIPE=demo takes minutes"


def test_checkpoints_that_are_hours_apart() -> None:
    # 38 steps in 19 hours: half an hour each.
    assert duration(19 * HOUR, 38, TRAIN_CHECKPOINT_EVERY=250) == [
        (
            "checkpoints are at least 19.0 hours apart, and if the machine is lost, so is all "
            "work since the last one",
            "set TRAIN_CHECKPOINT_EVERY=1",
        )
    ]
    assert duration(2.9 * HOUR, 38) == []
    ((problem, _),) = duration(100 * HOUR, 2000, TRAIN_CHECKPOINT_EVERY=0, TRAIN_MAX_HOURS=5)
    assert problem.startswith("checkpoints are at least 5.0 hours apart, ")
    assert duration(2.3 * HOUR, 8000, on_cpu=False, RECIPE="gpt2-124M") == []


def test_a_time_limit_of_a_few_steps() -> None:
    # Half an hour a step.
    assert duration(19 * HOUR, 38, TRAIN_MAX_HOURS=2) == [
        (
            "TRAIN_MAX_HOURS=2 is enough for at most 4 steps here",
            "set TRAIN_MAX_HOURS=10 or more, or a smaller TRAIN_TOKENS_PER_STEP",
        )
    ]
    # A limit makes any number of steps short enough.
    assert duration(400 * DAY, 19_200, TRAIN_MAX_HOURS=24, TRAIN_CHECKPOINT_EVERY=4) == []


@pytest.mark.parametrize(
    ("changes", "count"),
    (
        ({}, 1),
        ({"TRAIN_MAX_STEPS": 500}, 2),
        ({"TRAIN_MAX_STEPS": 8000}, 4),
        ({"TRAIN_MAX_STEPS": 8000, "TRAIN_CHECKPOINT_EVERY": 0}, 1),
        ({"TRAIN_MAX_STEPS": 8000, "TRAIN_KEEP_CHECKPOINTS": 5}, 7),
        ({"TRAIN_MAX_STEPS": 8000, "TRAIN_LR_SCHEDULE": "wsd"}, 5),
        ({"TRAIN_LR_SCHEDULE": "wsd"}, 2),
    ),
)
def test_checkpoints_at_once(changes: dict[str, object], count: int) -> None:
    assert count_checkpoints(settings(**changes).train) == count


def test_a_disk_too_small_for_the_checkpoints() -> None:
    run = settings(TRAIN_MAX_STEPS=8000, TRAIN_KEEP_CHECKPOINTS=3, TRAIN_OPTIMIZER="adamw")
    # Weights and two moments in float32: 1.49 GB each, 3 kept, the best, and one being written.
    needed = 5 * 12 * GPT2_PARAMETERS
    assert checkpoints_bytes(run.train, run.model) == needed
    assert list(advise_on_disk(run.train, run.model, needed)) == []
    assert list(advise_on_disk(run.train, run.model, needed - 1)) == [
        (
            "5 checkpoints take 7.47 GB, and 7.47 GB are free for them",
            "set TRAIN_KEEP_CHECKPOINTS=2, or set DATA_DIR to a larger disk",
        )
    ]
    assert list(advise_on_disk(run.train, run.model, 3_000_000_000)) == [
        (
            "5 checkpoints take 7.47 GB, and 3 GB are free for them",
            "free 4.47 GB, or set DATA_DIR to a larger disk",
        )
    ]
    # Muon has one moment of each matrix.
    muon = settings(TRAIN_OPTIMIZER="muon")
    expected = 12 * GPT2_PARAMETERS - 4 * GPT2_BLOCKS
    assert checkpoints_bytes(muon.train, muon.model) == expected


def test_the_documented_lines_are_those_that_are_printed() -> None:
    """The table in docs/recipes.md, whose first column describes these runs."""
    tokens, held_out = PREPARED["fineweb20M"]
    long = settings(TRAIN_MAX_STEPS=8000)
    printed = [
        *lines(tokens, held_out, TRAIN_MAX_STEPS=1000),
        *lines(300_000, held_out)[:1],
        *lines(2_000_000, held_out, TRAIN_TOKENS_PER_STEP=32_768),
        *lines(tokens, held_out, TRAIN_LEARNING_RATE=3e-2),
        *lines(tokens, held_out, TRAIN_LEARNING_RATE=1e-2, TRAIN_OPTIMIZER="adamw"),
        *lines(tokens, held_out, TRAIN_LEARNING_RATE=3e-7),
        *lines(tokens, held_out, TRAIN_WARMUP_STEPS=30),
        *lines(tokens, held_out, TRAIN_LR_SCHEDULE="wsd", TRAIN_COOLDOWN=0.05),
        *lines(tokens, held_out, TRAIN_TOKENS_PER_STEP=16_384, TRAIN_VAL_EVERY=2),
        *lines(*PREPARED["demo"], RECIPE="demo", TRAIN_HELLASWAG_EVERY=40),
        *duration(38 * 6 * HOUR, 38, TRAIN_CHECKPOINT_EVERY=1)[:1],
        *duration(19 * HOUR, 38),
        *duration(19 * HOUR, 38, TRAIN_MAX_HOURS=2),
        *advise_on_disk(long.train, long.model, 3_000_000_000),
    ]
    page = (CHECKOUT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("## Warnings about a run")[2].partition("\n## ")[0]
    documented = [
        row.split(" | ")[1].removesuffix(" |") for row in section.splitlines() if " | " in row
    ]
    assert documented[1:] == ["; ".join(advice) for advice in printed]


def test_a_cpu_multiplies_at_a_rate_that_can_be_believed() -> None:
    rate = matmul_flops(select_device("cpu", "float32", "auto"))
    assert rate is not None
    assert 1e8 < rate < 1e14


@pytest.mark.processes
def test_train_says_what_speaks_against_a_run_and_what_to_type_next(start: Start) -> None:
    process = start(
        TRAIN_LEARNING_RATE=1e-7,
        TRAIN_MAX_STEPS=3,
        TRAIN_VAL_EVERY=1,
        TRAIN_VAL_TOKENS=1000,
        TRAIN_TOKENS_PER_STEP=128,
        TRAIN_SAMPLE_EVERY=0,
    )
    out, errors = process.process.communicate(timeout=300)
    assert process.process.returncode == 0, errors
    assert errors.splitlines() == [
        "warning: TRAIN_LEARNING_RATE=1e-07 is too low to change the model; set "
        "TRAIN_LEARNING_RATE=1.7e-01, or try factors of 2 of it",
        "warning: held-out losses take 2.6 times as long as the training; set TRAIN_VAL_EVERY=3",
    ]
    here = f"--data-dir {process.run_dir.parents[1]} --run-name run"
    then = f"next: python -m app sample {here}; python -m app report {here}"
    assert out.splitlines()[-1] == then
    # A checkpoint takes what is expected of it, but for the files' headers.
    run, checkpoint = settings(**TINY), process.run_dir / "checkpoints" / "step-000003"
    written = sum((checkpoint / name).stat().st_size for name in TENSOR_FILES)
    expected = checkpoints_bytes(run.train, run.model) // count_checkpoints(run.train)
    assert expected < written < expected + 20_000
