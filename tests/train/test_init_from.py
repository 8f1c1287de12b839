"""Runs that begin with the weights of another model: the same logits as transformers'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.errors import UserError
from app.hardware.device import select_device
from app.model.architectures import build_config, build_model
from app.prepare.model_folder import hub_model
from app.runs.checkpoint_state import CheckpointState
from app.runs.checkpoints import latest_checkpoint
from app.runs.load import load_model
from app.settings.settings import Settings
from app.settings.sources import load_settings
from app.tools.export import export
from app.train.init_from import are_published, with_initial_weights
from app.train.main import train
from tests.model.transformers_models import CONTEXT_LENGTH, gpt2, logits, qwen3, tokens
from tests.train.conftest import TinySettings

WEIGHTS = "model.safetensors"


def settings_of(data_dir: Path, init_from: object, **flags: object) -> Settings:
    known = {"TRAIN_TOKENS_PER_STEP": CONTEXT_LENGTH, "TRAIN_INIT_FROM": init_from, **flags}
    flags = {"DATA_DIR": data_dir, "TRAIN_DEVICE": "cpu", **known}
    return load_settings({name: str(value) for name, value in flags.items()}, "train")


def our_logits(data_dir: Path, init_from: object, **flags: object) -> torch.Tensor:
    settings, weights = with_initial_weights(settings_of(data_dir, init_from, **flags))
    model = build_model(build_config(settings.model.shape()))
    assert weights is not None
    weights.load(model)
    with torch.no_grad():
        return model(tokens()[:, : settings.model.context_length])


def refusal(data_dir: Path, init_from: object, **flags: object) -> UserError:
    with pytest.raises(UserError) as refused:
        our_logits(data_dir, init_from, **flags)
    return refused.value


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 that transformers has stored."""
    folder = tmp_path_factory.mktemp("stored") / "gpt2"
    gpt2().save_pretrained(folder)
    return folder


@pytest.fixture
def model(stored: Path, data_dir: Path) -> Path:
    """The same in a folder of this test's own."""
    return Path(shutil.copytree(stored, data_dir / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "make",
    (
        gpt2,
        lambda: gpt2(activation_function="gelu", n_layer=1),
        lambda: gpt2(activation_function="gelu_pytorch_tanh", n_inner=192),
        qwen3,
        lambda: qwen3(tie_word_embeddings=True),
    ),
    ids=("gpt2", "exact", "tanh", "qwen3", "tied"),
)
def test_logits_are_those_of_transformers(make: Any, data_dir: Path) -> None:
    theirs = make()
    theirs.save_pretrained(data_dir / "model")
    expected = logits(theirs)
    assert expected.std() > 0.3
    assert (our_logits(data_dir, data_dir / "model") - expected).abs().max() < 1e-4


def test_other_activations_would_be_seen(model: Path, data_dir: Path) -> None:
    """The difference of the two GELUs is more than the tests allow."""
    expected = logits(model)
    change_config(model, activation_function="gelu")
    assert (our_logits(data_dir, model) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("prefix", ("", "transformer."))
@pytest.mark.parametrize("shards", (1, 2))
def test_names_and_buffers_of_older_versions(
    model: Path, data_dir: Path, prefix: str, shards: int
) -> None:
    expected = logits(model)
    weights = {
        prefix + name.removeprefix("transformer."): value
        for name, value in load_file(model / WEIGHTS).items()
    }
    for layer in range(3):
        weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    weights["lm_head.weight"] = weights[f"{prefix}wte.weight"].clone()
    names = sorted(weights)
    parts = {f"model-{i}-of-{shards}.safetensors": names[i::shards] for i in range(shards)}
    (model / WEIGHTS).unlink()
    for file, inside in parts.items():
        save_file({name: weights[name] for name in inside}, model / file)
    index = {name: file for file, inside in parts.items() for name in inside}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert (our_logits(data_dir, model) - expected).abs().max() < 1e-4


def test_half_precision_is_read(model: Path, data_dir: Path) -> None:
    expected = our_logits(data_dir, model)
    weights = {name: value.half() for name, value in load_file(model / WEIGHTS).items()}
    save_file(weights, model / WEIGHTS)
    assert 0 < (our_logits(data_dir, model) - expected).abs().max() < 0.1


def test_a_shorter_context_cuts_the_positions(model: Path, data_dir: Path) -> None:
    expected = logits(model)[:, :16]
    actual = our_logits(data_dir, model, MODEL_CONTEXT_LENGTH=16)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("flags", "problem"),
    (
        (
            {"MODEL_CONTEXT_LENGTH": 128, "TRAIN_TOKENS_PER_STEP": 128},
            "MODEL_CONTEXT_LENGTH=128, but {} has 64, and can only be cut",
        ),
        (
            {"MODEL_NUM_LAYERS": 12, "MODEL_ACTIVATION": "gelu", "MODEL_HEAD_DIM": 16},
            "MODEL_ACTIVATION=gelu, but {0} has gelu_new; MODEL_HEAD_DIM=16, but {0} has 12; "
            "MODEL_NUM_LAYERS=12, but {0} has 3",
        ),
        ({"MODEL_ARCHITECTURE": "qwen3"}, "MODEL_ARCHITECTURE=qwen3, but {} has gpt2"),
        (
            {"TRAIN_TOKENS_PER_STEP": 100},
            "with the model of {}, TRAIN_TOKENS_PER_STEP and MODEL_CONTEXT_LENGTH conflict: 100 is "
            "not a multiple of 64; 64 and 128 are",
        ),
    ),
)
def test_settings_that_contradict_are_named(
    model: Path, data_dir: Path, flags: dict[str, object], problem: str
) -> None:
    assert refusal(data_dir, model, **flags).problem == problem.format(model)


def test_a_recipe_for_another_model_does_not_contradict(model: Path, data_dir: Path) -> None:
    settings, _ = with_initial_weights(settings_of(data_dir, model, RECIPE="gpt2-124M"))
    assert (settings.model.num_layers, settings.model.context_length) == (3, 64)
    assert settings.train.learning_rate == 1.8e-3


@pytest.mark.parametrize(
    ("changes", "problem"),
    (
        ({"model_type": "llama"}, "its architecture is llama, not gpt2 or qwen3"),
        ({"vocab_size": 50258}, "vocab_size is 50258, not 50257"),
        ({"activation_function": "relu"}, "activation_function is relu, not a GELU"),
        ({"n_inner": 100}, "n_inner is 100, not 192"),
        (
            {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
            "scale_attn_by_inverse_layer_idx is True, not False; reorder_and_upcast_attn is True",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, not True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, not True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, not 1e-05"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, not None"),
        ({"n_embd": "many"}, "n_embd is many, not a whole number"),
        ({"n_layer": -1}, "n_layer is -1, not a whole number"),
        ({"n_head": None}, "n_head is None, not a whole number"),
        ({"n_head": 5}, "MODEL_EMBD_SIZE and MODEL_NUM_HEADS conflict: 48 is not a multiple of 5"),
        ({"n_layer": 4}, "transformer.h.3.ln_1.weight is missing"),
        ({"n_embd": 96}, "is float32 [144], not [288] of floating point"),
    ),
)
def test_a_model_that_is_computed_otherwise_is_refused(
    model: Path, data_dir: Path, changes: dict[str, Any], problem: str
) -> None:
    change_config(model, **changes)
    error = refusal(data_dir, model)
    assert problem in error.problem
    assert error.fix


def spoil(model: Path, how: str) -> None:
    path = model / WEIGHTS
    weights = load_file(path)
    match how:
        case "pickle":
            path.rename(model / "pytorch_model.bin")
        case "none":
            path.unlink()
        case "config":
            (model / "config.json").unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "untied":
            weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
        case "more":
            weights["transformer.adapter.weight"] = torch.ones(2)
        case "nan":
            weights["transformer.ln_f.bias"][0] = torch.nan
        case "int8":
            weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"].to(torch.int8)
        case "vocab.json" | "tokenizer.json":
            other = {f"t{i}": i for i in range(50257)}
            content = other if how == "vocab.json" else {"model": {"vocab": other}}
            (model / how).write_text(json.dumps(content))
        case "shard":
            path.rename(model / "model-1.safetensors")
            index = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
            (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
        case "outside":
            path.rename(model.parent / "elsewhere.safetensors")
            index = {"a": "../elsewhere.safetensors"}
            (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    if path.exists() and how != "cut":
        save_file(weights, path)


@pytest.mark.parametrize(
    ("how", "problem"),
    (
        ("pickle", "has its weights as a pickle only"),
        ("none", "has no model.safetensors"),
        ("config", "has no config.json: it is not a model of transformers"),
        ("cut", "model.safetensors cannot be read"),
        ("untied", "lm_head.weight is not the embedding, to which it must be tied"),
        ("more", "transformer.adapter.weight is not expected"),
        ("nan", "transformer.ln_f.bias has values that are not finite"),
        ("int8", "transformer.ln_f.bias is int8 [48], not [48] of floating point"),
        ("vocab.json", "its vocabulary is not GPT-2's (vocab.json)"),
        ("tokenizer.json", "its vocabulary is not GPT-2's (tokenizer.json)"),
        ("shard", "lacks model-2.safetensors"),
        ("outside", "has a wrong model.safetensors.index.json"),
    ),
)
def test_files_that_are_not_those_of_such_a_model_are_refused(
    model: Path, data_dir: Path, how: str, problem: str
) -> None:
    spoil(model, how)
    error = refusal(data_dir, model)
    assert problem in error.problem
    assert error.fix


def test_what_a_name_means(model: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = data_dir / "runs/distilgpt2"
    assert hub_model("openai-community/gpt2", run_dir) == ("openai-community/gpt2", "main")
    assert hub_model("gpt2@607a30d", run_dir) == ("gpt2", "607a30d")
    # A step, a path, a folder below DATA_DIR and one here.
    for local in ("gpt2@100", "/somewhere/gpt2", "./gpt2", "a/b/c", "model", "data/model"):
        assert hub_model(local, run_dir) is None
    # A new run with its model's name.
    run_dir.mkdir(parents=True)
    assert hub_model("distilgpt2", run_dir) == ("distilgpt2", "main")
    assert hub_model("distilgpt2", data_dir / "runs/other") is None
    for init_from, published in (("distilgpt2", True), ("model", True), ("other", False)):
        (data_dir / "runs/other").mkdir(exist_ok=True)
        given = settings_of(data_dir, init_from, TRAIN_RUN_NAME="distilgpt2")
        assert are_published(given) is published
    assert refusal(data_dir, "gpt2@100").problem == f"there is no run {data_dir}/runs/gpt2"
    assert refusal(data_dir, "./gpt2").problem == "there is no folder ./gpt2"
    file = model / WEIGHTS
    assert refusal(data_dir, file).fix == f"set TRAIN_INIT_FROM to its folder, {model}"


def state_of(settings: Settings) -> CheckpointState:
    return latest_checkpoint(settings.run_dir).state


def test_a_run_trains_from_them_continues_without_them_and_exports_the_logits(
    model: Path, data_dir: Path, tiny: TinySettings
) -> None:
    """An export right after the start, then one of trained weights, from which a run begins."""
    before = logits(model)
    begun = {"TRAIN_INIT_FROM": "model", "TRAIN_WARMUP_STEPS": 0, "TRAIN_OPTIMIZER": "adamw"}

    def settings(**changes: object) -> Settings:
        flags = begun | {"DATA_DIR": data_dir, "TRAIN_DATASET_DIR": "text", "TRAIN_DEVICE": "cpu"}
        flags |= {"TRAIN_RUN_NAME": "tuned", "TRAIN_TOKENS_PER_STEP": 256, "TRAIN_MAX_STEPS": 2}
        flags |= {"TRAIN_COMPILE": "false", "TRAIN_PRECISION": "float32", "TRAIN_SAMPLE_EVERY": 0}
        return load_settings({k: str(v) for k, v in (flags | changes).items()}, "train")

    # A rate that changes nothing: what is exported is what was read.
    train(settings(TRAIN_LEARNING_RATE=1e-12, TRAIN_RUN_NAME="same", TRAIN_WEIGHT_DECAY=0))
    export(settings(TRAIN_RUN_NAME="same"))
    assert (logits(data_dir / "runs/same/export") - before).abs().max() < 1e-4

    train(settings(TRAIN_LEARNING_RATE=1e-3))
    shutil.move(model, data_dir / "moved")
    # The same command continues, and needs the weights no more; so does one that names them so.
    train(settings(TRAIN_LEARNING_RATE=1e-3, TRAIN_MAX_STEPS=4))
    lines = (data_dir / "runs/tuned/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    state = state_of(settings())
    assert (state.step, state.initial_weights, state.origin) == (4, "model", None)
    assert state.model["activation"] == "gelu_new"
    recorded = json.loads((data_dir / "runs/tuned/settings.json").read_text())
    assert recorded["initial_weights"] == "model"
    assert recorded["settings"]["model"]["num_layers"] == 3

    export(settings())
    exported = data_dir / "runs/tuned/export"
    device = select_device("cpu", "float32", "auto")
    with torch.no_grad():
        ours = load_model(latest_checkpoint(data_dir / "runs/tuned"), device)(tokens())
    assert (ours - before).abs().max() > 1e-2
    assert (logits(exported) - ours).abs().max() < 1e-4
    card = (exported / "README.md").read_text()
    assert "A GPT-2, trained from the weights of model with gpt-compose." in card
    # From the export, and from the run.
    assert (our_logits(data_dir, exported) - ours).abs().max() < 1e-4
    assert torch.equal(our_logits(data_dir, "tuned", TRAIN_RUN_NAME="new"), ours)
    cut = our_logits(data_dir, "tuned@4", TRAIN_RUN_NAME="new", MODEL_CONTEXT_LENGTH=32)
    assert (cut - ours[:, :32]).abs().max() < 1e-4
    new = settings_of(data_dir, "tuned", TRAIN_RUN_NAME="new")
    weights = with_initial_weights(new)[1]
    assert weights is not None
    assert weights.name == "tuned@4"

    with pytest.raises(UserError, match="tuned has begun with the weights of model, not with oth"):
        train(settings(TRAIN_INIT_FROM="other", TRAIN_MAX_STEPS=5))
    (data_dir / "runs/empty").mkdir()
    with pytest.raises(UserError, match="a run cannot begin with its own weights"):
        with_initial_weights(settings(TRAIN_INIT_FROM="empty@5", TRAIN_RUN_NAME="empty"))
    with pytest.raises(UserError, match="runs/tuned has no checkpoint of step 3"):
        our_logits(data_dir, "tuned@3", TRAIN_RUN_NAME="new")


def test_a_run_that_began_otherwise_is_not_taken_for_one(
    model: Path, data_dir: Path, tiny: TinySettings
) -> None:
    train(tiny(TRAIN_MAX_STEPS=3))
    with pytest.raises(UserError) as refused:
        train(tiny(TRAIN_MAX_STEPS=4, TRAIN_INIT_FROM="model"))
    assert "has begun without TRAIN_INIT_FROM, not with model" in refused.value.problem
    assert "leave TRAIN_INIT_FROM out to continue this run" in refused.value.fix
