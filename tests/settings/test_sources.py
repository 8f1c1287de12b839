import itertools
from pathlib import Path

import pytest
from dotenv import dotenv_values

from app.errors import UserError
from app.settings.settings import VARIABLES, Settings
from app.settings.sources import RECIPES, load_settings
from tests.newcomer import settle

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


def load(**flags: str) -> Settings:
    return load_settings(flags, "train")


def faults(**flags: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        load(**flags)
    assert raised.value.fix.startswith("correct ")
    first, *others = raised.value.problem.splitlines()
    return [line.removeprefix("  ") for line in others] or [first]


def write(name: str, *lines: str) -> None:
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


SOURCES = ("flag", "environment", ".env", "recipe", "default")


@pytest.mark.parametrize(("above", "below"), tuple(itertools.combinations(SOURCES, 2)))
def test_the_source_above_wins(above: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"RECIPE": "./mine.env"}
    write("mine.env", "TRAIN_SEED=4" if "recipe" in (above, below) else "")
    write(".env", "TRAIN_SEED=3" if ".env" in (above, below) else "")
    if "environment" in (above, below):
        monkeypatch.setenv("TRAIN_SEED", "2")
    if above == "flag":
        flags["TRAIN_SEED"] = "1"
    assert load(**flags).train.seed == SOURCES.index(above) + 1


def test_each_source_supplies_what_others_do_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("mine.env", *(f"TRAIN_{name}=14" for name in ("SEED", "MAX_STEPS", "VAL_EVERY")))
    write(".env", "TRAIN_SEED=13", "TRAIN_MAX_STEPS=13", "RECIPE=./mine.env")
    monkeypatch.setenv("TRAIN_SEED", "12")
    train = load().train
    assert (train.seed, train.max_steps, train.val_every) == (12, 13, 14)
    assert train.sample_every == type(train).model_fields["sample_every"].default


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.env")))
def test_every_recipe_can_be_named_in_every_source(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        variable: str(text) for variable, text in dotenv_values(RECIPES / f"{name}.env").items()
    }
    expected = load(**lines).model_copy(update={"general": None})
    by_flag = load(RECIPE=name)
    monkeypatch.setenv("RECIPE", name)
    by_environment = load()
    monkeypatch.delenv("RECIPE")
    write(".env", f"RECIPE={name}")
    by_dotenv = load()
    assert by_flag.model_copy(update={"general": None}) == expected
    assert by_flag == by_environment == by_dotenv
    assert by_flag.general.recipe == name


def test_the_recipe_follows_the_same_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, place in enumerate(("flag", "environment", "dotenv"), start=1):
        write(f"{place}.env", f"TRAIN_SEED={number}")
    write(".env", "RECIPE=./dotenv.env")
    assert load().train.seed == 3
    monkeypatch.setenv("RECIPE", "./environment.env")
    assert load().train.seed == 2
    assert load(RECIPE="./flag.env").train.seed == 1
    monkeypatch.setenv("RECIPE", "")
    assert load().train.seed == 3


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.env", "TRAIN_SEED=4", "TRAIN_MAX_STEPS=44", "TRAIN_RUN_NAME=")
    write(".env", "TRAIN_SEED=", "TRAIN_MAX_STEPS=33", "RECIPE=./mine.env")
    monkeypatch.setenv("TRAIN_SEED", "")
    monkeypatch.setenv("TRAIN_MAX_STEPS", "")
    monkeypatch.setenv("TRAIN_LERNING_RATE", "")
    train = load().train
    assert (train.seed, train.max_steps, train.run_name) == (4, 33, None)


def test_an_empty_prompt_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_PROMPT", "Once")
    assert load().sample.prompt == "Once"
    assert load(SAMPLE_PROMPT="").sample.prompt == ""


def test_a_dotenv_file_has_the_usual_syntax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    content = (
        "\ufeff# a comment\r\n"
        "export TRAIN_SEED=5   # five\r\n"
        "SAMPLE_PROMPT='a # b'\r\n"
        "train_max_steps = 50\r\n"
        "TRAIN_RUN_NAME=${WHO}-1\r\n"
        "COMPOSE_PROJECT_NAME=elsewhere\r\n"
        "UNRELATED=1\r\n"
    )
    Path(".env").write_bytes(content.encode())
    settings = load()
    assert settings.train.seed == 5
    assert settings.sample.prompt == "a # b"
    assert settings.train.max_steps == 50
    assert settings.train.run_name == "me-1"


def test_every_fault_is_reported_once_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine.env", "TRAIN_SEED=minus one", "TRAIN_OPTIMISER=adamw", "LEARNING_RATE=1")
    write(".env", "", "# mine", "MODEL_NUM_LAYERS=0", "TRAIN_BETAS=2,3", "RECIPIE=demo")
    monkeypatch.setenv("TRAIN_LERNING_RATE", "3e-4")
    monkeypatch.setenv("PREPARE_WORKERS", "many")
    monkeypatch.setenv("MODEL_NUM_HEADS", "5")
    assert sorted(faults(RECIPE="./mine.env", TRAIN_DEVICE="gpu", TRAIN_COMPILE="maybe")) == sorted(
        (
            "TRAIN_SEED=minus one (./mine.env, line 1): "
            "must be a whole number, such as 500, 20M, 1.5B or 1e7",
            "TRAIN_OPTIMISER (./mine.env, line 2): "
            "there is no such setting; did you mean TRAIN_OPTIMIZER?",
            "LEARNING_RATE (./mine.env, line 3): "
            "there is no such setting; did you mean TRAIN_LEARNING_RATE?",
            "MODEL_NUM_LAYERS=0 (.env, line 3): must be at least 1",
            "TRAIN_BETAS=2,3 (.env, line 4): must be less than 1",
            "RECIPIE (.env, line 5): there is no such setting; did you mean RECIPE?",
            "TRAIN_LERNING_RATE (environment): "
            "there is no such setting; did you mean TRAIN_LEARNING_RATE?",
            "PREPARE_WORKERS=many (environment): "
            "must be a whole number, such as 500, 20M, 1.5B or 1e7, or auto",
            "TRAIN_DEVICE=gpu (flag --device): must be 'auto', 'cpu' or 'cuda'",
            "TRAIN_COMPILE=maybe (flag --compile): must be true or false",
            "MODEL_EMBD_SIZE=768 (default) and MODEL_NUM_HEADS=5 (environment): "
            "768 is not a multiple of 5; 765 and 770 are",
        )
    )


@pytest.mark.parametrize(
    ("variable", "text", "reason"),
    (
        ("TRAIN_LEARNING_RATE", "fast", "must be a number"),
        ("TRAIN_LEARNING_RATE", "0", "must be more than 0"),
        ("TRAIN_LEARNING_RATE", "2", "must be at most 1"),
        ("TRAIN_LEARNING_RATE", "nan", "must be a finite number"),
        ("TRAIN_GRAD_CLIP", "inf", "must be a finite number"),
        ("TRAIN_GRAD_CLIP", "-1", "must be at least 0"),
        ("TRAIN_MIN_LR_RATIO", "nan", "must be a finite number"),
        ("TRAIN_WEIGHT_DECAY", "nan", "must be a finite number"),
        ("SAMPLE_TEMPERATURE", "nan", "must be a finite number"),
        ("TRAIN_BETAS", "0.9", "must be two numbers, as in 0.9,0.95"),
        ("TRAIN_BETAS", "0.9,nan", "must be a finite number"),
        ("TRAIN_BETAS", "0.9,1", "must be less than 1"),
        ("TRAIN_SEED", "4294967296", "must be less than 4294967296"),
        ("TRAIN_MICRO_BATCH_SIZE", "0", "must be at least 1, or auto"),
        ("PREPARE_TOTAL_TOKENS", "0", "must be at least 1, or all"),
        ("PREPARE_WORKERS", "1e9", "must be at most 1024, or auto"),
        ("PREPARE_RETRY_SECONDS", "1,x", "must be a number"),
        ("PREPARE_RETRY_SECONDS", "1,-1", "must be at least 0"),
        ("TRAIN_LR_SCHEDULE", "Cosine", "must be 'constant', 'cosine' or 'linear'"),
        ("TRAIN_DETERMINISTIC", "maybe", "must be 'auto', 'true' or 'false'"),
        (
            "TRAIN_RUN_NAME",
            "../up",
            "must start with a letter or digit, and hold only these and . _ -",
        ),
        ("TRAIN_RUN_NAME", "a" * 201, "must have at most 200 characters"),
        (
            "DATA_DIR",
            "~nobody-of-this-name/x",
            "begins with ~, but there is no such user's home folder",
        ),
    ),
)
def test_reasons_are_plain_words(variable: str, text: str, reason: str) -> None:
    field = VARIABLES[variable].variables()[variable].replace("_", "-")
    assert faults(**{variable: text}) == [f"{variable}={text} (flag --{field}): {reason}"]


def test_conflicts_are_reported_unless_one_of_the_two_values_is_invalid() -> None:
    write(".env", "TRAIN_WARMUP_STEPS=3", "MODEL_EMBD_SIZE=100")
    assert faults(MODEL_NUM_HEADS="many", TRAIN_TOKENS_PER_STEP="5", TRAIN_MAX_STEPS="3") == [
        "MODEL_NUM_HEADS=many (flag --num-heads): "
        "must be a whole number, such as 500, 20M, 1.5B or 1e7",
        "TRAIN_TOKENS_PER_STEP=5 (flag --tokens-per-step) and MODEL_CONTEXT_LENGTH=1024 (default): "
        "5 is not a multiple of 1024; 1024 is",
        "TRAIN_WARMUP_STEPS=3 (.env, line 1) and TRAIN_MAX_STEPS=3 (flag --max-steps): "
        "the warm-up must be shorter than the run",
    ]


def test_a_missing_recipe_is_reported_with_other_faults_but_without_conflicts() -> None:
    unknown, number = faults(RECIPE="dmeo", TRAIN_SEED="x", TRAIN_TOKENS_PER_STEP="4097")
    assert unknown.startswith("RECIPE=dmeo (flag --recipe): there is no such recipe among demo, ")
    assert unknown.endswith("; did you mean demo?")
    assert number.startswith("TRAIN_SEED=x")


def test_a_missing_recipe_file_and_a_nested_recipe_are_faults() -> None:
    assert faults(RECIPE="./mine.env") == [
        "RECIPE=./mine.env (flag --recipe): there is no such file"
    ]
    write("mine.env", "RECIPE=demo")
    assert faults(RECIPE="./mine.env") == [
        "RECIPE (./mine.env, line 1): a recipe cannot name another"
    ]


def test_lines_without_an_assignment_are_faults() -> None:
    write(".env", "TRAIN_SEED 5", "TRAIN_MAX_STEPS", "", "SAMPLE_PROMPT='open", "TRAIN_VAL_EVERY=x")
    assert faults()[:3] == [
        ".env, line 1: not of the form NAME=VALUE",
        ".env, line 2: not of the form NAME=VALUE",
        ".env, line 4: not of the form NAME=VALUE",
    ]
    assert faults()[3].startswith("TRAIN_VAL_EVERY=x (.env, line 5)")


def test_a_name_set_twice_in_a_file_is_a_fault() -> None:
    write(".env", "TRAIN_SEED=1", "", "TRAIN_MAX_STEPS=", "TRAIN_MAX_STEPS=50", "TRAIN_SEED=2")
    assert faults() == ["TRAIN_SEED is set twice in .env: lines 1, 5"]


def test_a_file_that_is_not_utf8_is_a_fault() -> None:
    Path(".env").write_bytes(b"TRAIN_RUN_NAME=caf\xe9\n")
    assert faults() == [".env is not UTF-8 text"]


def test_variables_of_other_programs_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "DATADIR", "TRAINING", "MODELS", "LEARNING_RATE", "RECIPES"):
        monkeypatch.setenv(name, "anything")
    load()


def test_no_fault_shows_the_hub_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write(".env", f"HF_TOKN={TOKEN}", f"HF_TOKEN {TOKEN}", "TRAIN_SEED=x")
    assert TOKEN not in "".join(faults())


def test_faults_print_nothing_but_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    write(".env", "TRAIN_SEED 5", "TRAIN_X=1")
    faults()
    assert capfd.readouterr() == ("", "")
