import itertools
import re
from pathlib import Path

import pytest
from dotenv import dotenv_values

from app.errors import UserError
from app.settings.settings import VARIABLES, Settings
from app.settings.sources import RECIPES, load_settings, suggestion
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
            "TRAIN_DEVICE=gpu (flag --device): must be 'auto', 'cpu', 'cuda' or 'mps'",
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
        ("TRAIN_LR_SCHEDULE", "Cosine", "must be 'constant', 'cosine', 'linear' or 'wsd'"),
        ("TRAIN_DETERMINISTIC", "maybe", "must be 'auto', 'true' or 'false'"),
        (
            "TRAIN_RUN_NAME",
            "../up",
            "must start with a letter or digit, and hold only A-Z a-z 0-9 . _ -",
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
    unreadable, value = faults()
    assert unreadable == ".env, lines 1, 2, 4: not of the form NAME=VALUE"
    assert value.startswith("TRAIN_VAL_EVERY=x (.env, line 5)")


def test_a_name_set_twice_in_a_file_is_a_fault() -> None:
    write(".env", "TRAIN_SEED=1", "", "TRAIN_MAX_STEPS=", "TRAIN_MAX_STEPS=50", "TRAIN_SEED=2")
    assert faults() == ["TRAIN_SEED is set twice in .env: lines 1, 5"]


def test_a_dotenv_file_that_is_not_utf8_or_a_link_to_nothing_is_a_fault() -> None:
    Path(".env").write_bytes(b"TRAIN_RUN_NAME=caf\xe9\n")
    assert faults() == [".env, line 1: not UTF-8; save the file as UTF-8 text"]
    Path(".env").unlink()
    Path(".env").symlink_to("absent")
    assert faults() == [
        ".env cannot be read (No such file or directory): make it readable, or move it away"
    ]


def test_an_undefined_variable_is_a_fault_in_dotenv_and_in_a_recipe() -> None:
    write(".env", "TRAIN_RUN_NAME=${EXPERIMENT}", "TRAIN_TOKENS_PER_STEP=$T", "RECIPE=./mine.env")
    write("mine.env", "MODEL_CONTEXT_LENGTH=1000", "TRAIN_SEED=${SEEDS?}")
    assert [fault.partition(" is not set")[0] for fault in faults()] == [
        "TRAIN_RUN_NAME (.env, line 1): ${EXPERIMENT}",
        "TRAIN_TOKENS_PER_STEP (.env, line 2): ${T}",
        "TRAIN_SEED (./mine.env, line 2): ${SEEDS}",
    ], "nor is a conflict with the default in place of $T reported"


def test_a_recipe_may_refer_to_what_is_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    write(".env", "BASE=dotenv", "RECIPE=./mine.env")
    write("mine.env", "TRAIN_RUN_NAME=$BASE-1", "SAMPLE_PROMPT='costs $5, $BASE'")
    assert load().train.run_name == "dotenv-1"
    assert load().sample.prompt == "costs $5, $BASE"
    monkeypatch.setenv("BASE", "environment")
    assert load().train.run_name == "environment-1"


def test_names_close_to_ours_are_faults_in_dotenv_unless_another_line_uses_them() -> None:
    typos = {
        "RECPIE": "RECIPE",
        "DATADIR": "DATA_DIR",
        "TRIAN_MAX_STEPS": "TRAIN_MAX_STEPS",
        "LEARNING_RATE": "TRAIN_LEARNING_RATE",
    }
    write(".env", "SEED=1", "PORT=80", "EXPERIMENT=a", *(f"{name}=1" for name in typos))
    assert faults() == [
        f"{name} (.env, line {line}): there is no such setting; did you mean {meant}?"
        for line, (name, meant) in enumerate(typos.items(), 4)
    ]
    write(".env", "DATADIR=/disk", "DATA_DIR=$DATADIR/data")
    assert load().general.data_dir == Path("/disk/data")


@pytest.mark.parametrize("name", ("TRIAN_MAX_STEPS", "TRAINMAX_STEPS", "RECPIE", "PREPRAE_WORKERS"))
def test_names_in_the_environment_that_can_only_be_ours_are_faults(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "5")
    (fault,) = faults()
    assert fault.startswith(f"{name} (environment): there is no such setting; did you mean ")


def test_variables_of_other_programs_are_no_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HOME", "TRAINING", "MODELS", "LEARNING_RATE", "OUT_DIR", "PORT", "GPU_ID"):
        monkeypatch.setenv(name, "anything")
    load()
    assert capsys.readouterr() == ("", "")
    for name in ("DATADIR", "RECIPES"):
        monkeypatch.setenv(name, "anything")
    load()
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(err.splitlines()) == [
        "warning: DATADIR (environment): there is no such setting; did you mean DATA_DIR?",
        "warning: RECIPES (environment): there is no such setting; did you mean RECIPE?",
    ]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    (
        ("--lr", ("--learning-rate", "--val-every"), "--learning-rate"),
        ("--batch-size", ("--micro-batch-size", "--seed"), "--micro-batch-size"),
        ("--steps", ("--max-steps", "--warmup-steps"), "--max-steps or --warmup-steps"),
        ("--epochs", ("--max-steps", "--seed", "--shuffle"), ""),
        ("--lerning-rate", ("--learning-rate", "--min-lr-ratio"), "--learning-rate"),
        ("eval", ("evaluate", "export"), "evaluate"),
        ("generate", ("prepare", "train", "evaluate"), ""),
        ("TRAIN_URL", tuple(VARIABLES), ""),
        ("TRAIN_LR", tuple(VARIABLES), "TRAIN_LEARNING_RATE"),
        ("TRAIN_NUM_LAYERS", tuple(VARIABLES), "MODEL_NUM_LAYERS"),
    ),
)
def test_only_close_names_are_suggested(name: str, known: tuple[str, ...], meant: str) -> None:
    assert suggestion(name, known) == (f"; did you mean {meant}?" if meant else "")


def test_a_recipe_that_is_another_kind_of_file_is_one_fault() -> None:
    write("train.py", "import torch", "steps = 5", "rate = 0.1")
    assert faults(RECIPE="./train.py") == ["./train.py, line 1: not of the form NAME=VALUE"]
    (fault,) = faults(RECIPE="train.py")
    assert fault.endswith("; did you mean ./train.py?")


def test_flags_without_a_value_are_reported_with_other_faults() -> None:
    assert faults(TRAIN_TOKENS_PER_STEP="", TRAIN_RUN_NAME="", TRAIN_SEED="x") == [
        "TRAIN_TOKENS_PER_STEP (flag --tokens-per-step): has no value; give it one, or leave the "
        "flag out",
        "TRAIN_RUN_NAME (flag --run-name): has no value; give it one, or leave the flag out",
        "TRAIN_SEED=x (flag --seed): must be a whole number, such as 500, 20M, 1.5B or 1e7",
    ]


@pytest.mark.parametrize("place", ("file", "file/below", "link"))
def test_a_data_dir_that_cannot_be_a_folder_is_a_fault(place: str) -> None:
    write("file", "notes")
    Path("link").symlink_to("absent")
    assert faults(DATA_DIR=place) == [
        f"DATA_DIR={place} (flag --data-dir): there is a file, or a link to nothing, instead of a "
        "folder"
    ]


NUMBERS = [
    variable
    for variable, group in VARIABLES.items()
    for kind in [str(group.model_fields[group.variables()[variable]].annotation)]
    if "int" in kind or "float" in kind
]
NO_NUMBERS = ("nan", "-inf", "1e400", "١٢", "\uff12", "0x10", "½", "1,5,", "-1", "9" * 5000)


@pytest.mark.parametrize("variable", NUMBERS)
def test_no_setting_takes_a_number_that_is_none_or_beyond_all_bounds(variable: str) -> None:
    # A gradient norm may be clipped to any size.
    for text in (*NO_NUMBERS, *(("1e99",) if variable != "TRAIN_GRAD_CLIP" else ())):
        (fault,) = faults(**{variable: text})
        assert fault.startswith(f"{variable}={text} (flag --")
        assert re.search(r"\): must be [^\n]{3,80}$", fault)


def test_no_fault_shows_the_hub_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write(
        ".env",
        f"HF_TOKN={TOKEN}",
        f"HF_TOKEN {TOKEN}",
        "TRAIN_SEED=$HF_TOKEN",
        "TRAIN_VAL_EVERY=x$HF_TOKEN",
    )
    assert TOKEN not in "".join(faults())


def test_faults_print_nothing_but_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    write(".env", "TRAIN_SEED 5", "TRAIN_X=1")
    faults()
    assert capfd.readouterr() == ("", "")
