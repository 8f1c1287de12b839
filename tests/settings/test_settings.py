import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.errors import UserError
from app.formats import short_count
from app.settings.prepare import PrepareSettings
from app.settings.settings import GROUPS, GeneralSettings, Settings
from app.settings.sources import load_settings
from app.settings.train import ModelSettings, TrainSettings
from app.settings.types import Group, parse_count
from tests.newcomer import REPOSITORY, settle

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


@pytest.fixture(autouse=True)
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)


def defaults() -> Settings:
    return load_settings({}, "train")


@pytest.fixture
def example() -> str:
    return (REPOSITORY / ".env.example").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "count"),
    (
        ("500", 500),
        ("20M", 20_000_000),
        ("20m", 20_000_000),
        ("1.5B", 1_500_000_000),
        ("1.1M", 1_100_000),
        ("4.35k", 4_350),
        ("2T", 2_000_000_000_000),
        ("1e7", 10_000_000),
        ("2.5E3", 2_500),
        ("20_000_000", 20_000_000),
        (" 20M ", 20_000_000),
        ("5.0", 5),
    ),
)
def test_counts_may_have_units_exponents_and_underscores(text: str, count: int) -> None:
    settings = load_settings({"PREPARE_TOTAL_TOKENS": text, "PREPARE_SHARD_SIZE": "9"}, "prepare")
    assert settings.prepare.total_tokens == count


@pytest.mark.parametrize(
    "text",
    ("lots", "1.5", "20 M", "20,000", "1,5B", "0x10", "M", "1e-3", "20Mi", "--5", "nan", "1e999"),
)
def test_a_text_that_is_not_a_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "allowed"),
    (("0", 0), ("1", 1), ("20", 20), ("1k", 1000), ("0.001", 0.001), ("0.1%", 0.001)),
)
def test_bad_lines_allowed_are_a_count_or_a_share(text: str, allowed: float) -> None:
    assert load_settings({"PREPARE_SKIP_BAD": text}, "prepare").prepare.skip_bad == allowed


@pytest.mark.parametrize("text", ("1.5", "100%", "-0.1", "nan", "inf", "0.1%%", "some"))
def test_neither_a_count_nor_a_share(text: str) -> None:
    with pytest.raises(UserError, match=r"must be a whole number, .* or a share below 1"):
        load_settings({"PREPARE_SKIP_BAD": text}, "prepare")


@given(st.integers(0, 10**15), st.sampled_from(("", "k", "M", "B", "T")), st.integers(0, 3))
def test_counts_are_exact(digits: int, unit: str, decimals: int) -> None:
    size = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]
    number = Decimal(digits).scaleb(-decimals)
    if number * size == int(number * size):
        assert parse_count(f"{number:f}{unit}") == int(number * size)


@given(st.integers(0, 10**16))
def test_a_short_count_is_the_same_number(count: int) -> None:
    assert parse_count(short_count(count)) == count


@pytest.mark.parametrize(
    ("count", "short"),
    (
        (20_000_000, "20M"),
        (10_000_000_000, "10B"),
        (1_500_000, "1.5M"),
        (1_048_576, "1048576"),
        (999, "999"),
    ),
)
def test_a_short_count_uses_the_largest_exact_unit(count: int, short: str) -> None:
    assert short_count(count) == short


@pytest.mark.parametrize(
    ("values", "folder"),
    (
        ({}, "fineweb20M"),
        ({"total_tokens": "all"}, "fineweb10B"),
        ({"total_tokens": "all", "dataset_config": "sample-350BT"}, "fineweb350B"),
        ({"total_tokens": "all", "dataset_config": "default"}, "fineweb"),
        ({"dataset": "stdlib", "total_tokens": "4M"}, "stdlib4M"),
        ({"dataset": "stdlib", "total_tokens": "all"}, "stdlib"),
        ({"dataset": "roneneldan/TinyStories"}, "TinyStories20M"),
        ({"dataset": "/texts/my book.txt.gz"}, "my-book20M"),
        ({"dataset": "texts/"}, "texts20M"),
        ({"dataset": "texts/**/*.md"}, "text20M"),
        ({"dataset": "stdlib", "out_dir": "elsewhere"}, "elsewhere"),
    ),
)
def test_a_dataset_folder_is_named_after_dataset_and_tokens(
    values: dict[str, Any], folder: str
) -> None:
    assert PrepareSettings(**values).dataset_dir == Path(folder)


@pytest.mark.parametrize(
    ("values", "config"),
    (
        ({}, "sample-10BT"),
        ({"dataset": "HuggingFaceFW/fineweb"}, "sample-10BT"),
        ({"dataset": "roneneldan/TinyStories"}, None),
        ({"dataset": "HuggingFaceFW/fineweb-edu", "dataset_config": "sample-10BT"}, "sample-10BT"),
    ),
)
def test_the_default_configuration_applies_to_its_dataset_only(
    values: dict[str, Any], config: str | None
) -> None:
    assert PrepareSettings(**values).config == config


def test_relative_folders_are_below_data_dir() -> None:
    settings = load_settings({"DATA_DIR": "/disk", "PREPARE_OUT_DIR": "words"}, "train")
    assert settings.prepare_dir == Path("/disk/words")
    assert settings.train_dataset_dir == Path("/disk/words")
    assert settings.run_dir == Path("/disk/runs/words")
    settings = load_settings({"TRAIN_DATASET_DIR": "/other/words", "TRAIN_RUN_NAME": "a"}, "train")
    assert settings.train_dataset_dir == Path("/other/words")
    assert settings.run_dir == Path("data/runs/a")


def test_a_leading_tilde_is_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = {"DATA_DIR": "~/data", "PREPARE_OUT_DIR": "~/p", "TRAIN_DATASET_DIR": "~/t"}
    settings = load_settings(flags, "train")
    assert settings.general.data_dir == tmp_path / "data"
    assert settings.prepare_dir == tmp_path / "p"
    assert settings.train_dataset_dir == tmp_path / "t"


@pytest.mark.parametrize(
    ("text", "value"),
    (("auto", "auto"), ("1", "true"), ("Yes", "true"), ("off", "false"), ("false", "false")),
)
def test_deterministic_accepts_the_usual_words_for_yes_and_no(text: str, value: str) -> None:
    assert load_settings({"TRAIN_DETERMINISTIC": text}, "train").train.deterministic == value


def test_settings_are_frozen() -> None:
    settings = defaults()
    with pytest.raises(ValidationError, match="frozen"):
        settings.train.max_steps = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.model = ModelSettings()  # type: ignore[misc]


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="lerning_rate"):
        TrainSettings(lerning_rate=1)  # type: ignore[call-arg]


def test_the_hub_token_is_never_printed() -> None:
    Path(".env").write_text(f"HF_TOKEN={TOKEN}\n", encoding="utf-8")
    settings = defaults()
    token = settings.general.hf_token
    assert token is not None
    assert token.get_secret_value() == TOKEN
    shown = (
        f"{settings!r} {settings} {settings.general!r} {settings.general} {settings.public()}"
        f"{settings.model_dump()} {settings.model_dump_json()} {settings.general.model_dump_json()}"
    )
    assert TOKEN not in shown
    assert "hf_token" not in settings.public()["general"]


def test_public_settings_are_all_but_secrets_as_json() -> None:
    public = defaults().public()
    named = {f"{name}.{field}" for name, group in public.items() for field in group}
    fields = {f"{name}.{field}" for name, group in GROUPS.items() for field in group.model_fields}
    assert named == fields - {"general.hf_token"}
    assert public["general"]["data_dir"] == "data"
    assert public["train"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    ("groups", "conflicts"),
    (
        (
            {"model": ModelSettings(embd_size=768, num_heads=7)},
            {("MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"): "768 is not a multiple of 7; 763 and 770 are"},
        ),
        (
            {"model": ModelSettings(embd_size=8, num_heads=12)},
            {("MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"): "8 is not a multiple of 12; 12 is"},
        ),
        ({"model": ModelSettings(head_dim=64)}, {}),
        ({"model": ModelSettings(embd_size=9, num_heads=3, tie_embeddings="true")}, {}),
        (
            {"model": ModelSettings(head_dim=128, tie_embeddings="false")},
            {
                ("MODEL_ARCHITECTURE", "MODEL_HEAD_DIM"): (
                    "gpt2 divides its width among its heads, 64 each; leave it on auto"
                ),
                ("MODEL_ARCHITECTURE", "MODEL_TIE_EMBEDDINGS"): (
                    "the output layer of gpt2 is its embedding; qwen3 can have its own"
                ),
            },
        ),
        ({"model": ModelSettings(architecture="qwen3", num_heads=7, head_dim=128)}, {}),
        (
            {"model": ModelSettings(architecture="qwen3", num_heads=7)},
            {
                ("MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"): (
                    "a head of 109.7, and qwen3 turns pairs of its values: set an even "
                    "MODEL_HEAD_DIM"
                )
            },
        ),
        (
            {"model": ModelSettings(architecture="qwen3", embd_size=9, num_heads=3)},
            {
                ("MODEL_EMBD_SIZE", "MODEL_NUM_HEADS"): (
                    "a head of 3, and qwen3 turns pairs of its values: set an even MODEL_HEAD_DIM"
                )
            },
        ),
        (
            {"model": ModelSettings(architecture="qwen3", head_dim=63)},
            {
                ("MODEL_ARCHITECTURE", "MODEL_HEAD_DIM"): (
                    "qwen3 turns pairs of a head's values: it must be even"
                )
            },
        ),
        (
            {"train": TrainSettings(warmup_steps=4, max_steps=4)},
            {
                ("TRAIN_WARMUP_STEPS", "TRAIN_MAX_STEPS"): (
                    "the warm-up must be shorter than the run"
                )
            },
        ),
        ({"train": TrainSettings(warmup_steps=0, max_steps=1)}, {}),
        (
            {
                "train": TrainSettings(tokens_per_step=1500, warmup_steps=0),
                "model": ModelSettings(context_length=1000),
            },
            {
                ("TRAIN_TOKENS_PER_STEP", "MODEL_CONTEXT_LENGTH"): (
                    "1500 is not a multiple of 1000; 1000 and 2000 are"
                )
            },
        ),
        (
            {
                "train": TrainSettings(precision="fp8", compile=False, tokens_per_step=10_000),
                "model": ModelSettings(context_length=1000, embd_size=36, num_heads=4),
            },
            {
                ("TRAIN_PRECISION", "MODEL_CONTEXT_LENGTH"): (
                    "1000 is not a multiple of 16; 992 and 1008 are"
                ),
                ("TRAIN_PRECISION", "MODEL_EMBD_SIZE"): "36 is not a multiple of 16; 32 and 48 are",
                ("TRAIN_PRECISION", "TRAIN_COMPILE"): "fp8 needs compiled code",
            },
        ),
    ),
)
def test_conflicts_name_both_settings_and_valid_values(
    groups: dict[str, Group], conflicts: dict[tuple[str, str], str]
) -> None:
    assert defaults().model_copy(update=groups).conflicts() == conflicts


@pytest.mark.parametrize(
    ("settings", "of_the_architecture"),
    (
        ({}, {"architecture": "gpt2"}),
        ({"head_dim": 64, "tie_embeddings": "true"}, {"architecture": "gpt2"}),
        (
            {"architecture": "qwen3"},
            {"architecture": "qwen3", "head_dim": 64, "tie_embeddings": False},
        ),
        (
            {"architecture": "qwen3", "head_dim": "128", "tie_embeddings": "yes"},
            {"architecture": "qwen3", "head_dim": 128, "tie_embeddings": True},
        ),
    ),
)
def test_a_checkpoint_records_what_auto_means(
    settings: dict[str, Any], of_the_architecture: dict[str, Any]
) -> None:
    sizes = {"context_length": 1024, "vocab_size": 50257, "num_layers": 12}
    sizes |= {"embd_size": 768, "num_heads": 12}
    assert ModelSettings(**settings).shape() == sizes | of_the_architecture


def test_the_example_is_up_to_date(example: str) -> None:
    written = subprocess.run(
        [sys.executable, "-m", "app.settings.__main__"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert written.stdout == example, "python -m app.settings.__main__ > .env.example"


def test_the_example_describes_every_setting_in_the_line_above_it(example: str) -> None:
    lines = example.splitlines()
    for group in GROUPS.values():
        for variable, field in group.variables().items():
            place = lines.index(f"#{variable}={group.default_text(field)}")
            assert lines[place - 1] == f"# {group.description(field)}"


def test_the_example_copied_as_it_is_changes_nothing(example: str) -> None:
    expected = defaults()
    Path(".env").write_text(example, encoding="utf-8")
    settings = defaults()
    assert settings == expected
    assert settings.prepare.model_fields_set == set()


def test_the_example_with_every_line_uncommented_gives_the_defaults(example: str) -> None:
    expected = defaults()
    uncommented = re.sub(r"(?m)^#([A-Z_]+=.+)$", r"\1", example)
    for group in GROUPS.values():
        for variable, field in group.variables().items():
            text = group.default_text(field)
            assert f"\n{variable}={text}\n" in uncommented or not text
    Path(".env").write_text(uncommented, encoding="utf-8")
    settings = defaults()
    assert settings == expected
    assert settings.prepare.config == expected.prepare.config
    assert settings.prepare_dir == expected.prepare_dir
    assert settings.run_dir == expected.run_dir


def test_general_settings_have_no_prefix() -> None:
    assert set(GeneralSettings.variables()) == {"DATA_DIR", "RECIPE", "HF_TOKEN"}


@pytest.mark.parametrize("name", ("auto", "model", "blocks", "true"))
def test_a_settings_file_with_an_earlier_name_of_compiling_still_compiles(name: str) -> None:
    settings = load_settings({"TRAIN_COMPILE": name}, "train")
    assert settings.train.compile is True
