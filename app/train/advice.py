"""Warnings about a run, each with a value that would do. `train` and `doctor` print them."""

import math
from collections.abc import Iterator

from app.formats import format_bytes, format_count, format_duration, plural
from app.model.config_json import qwen3_mlp_size
from app.settings.own_text import sizes
from app.settings.train import ModelSettings, TrainSettings

Advice = tuple[str, str]  # problem, fix

# Repeated up to 4 times, text is worth nearly as much as new text (Muennighoff et al., 2023).
_EPOCHS, _MANY_EPOCHS = 4, 6
# nanoGPT's recipe for Shakespeare is near this; with less text, a model only memorizes it.
_MIN_TOKENS_PER_WEIGHT = 0.025
# The best rate measured for widths of 256 to 768 is near this, divided by the width. Optimizers
# that have not been measured count as AdamW.
_RATE_TIMES_WIDTH = {"muon": 2.8, "adamw": 1.4}
_FAR_ABOVE, _USELESS_RATE = 5, 1e-6
# Published weights take a twentieth of it (nanoGPT, config/finetune_shakespeare.py).
_FINE_TUNING_SHARE = 1 / 20
# Shorter runs are tries, whose schedule does not matter.
_FEWEST_STEPS, _FEWEST_COOLDOWN_STEPS = 20, 3
# A forward pass is a third of a step's work.
EVALUATION_SHARE, _MOST_EVALUATION = 1 / 3, 2
# The published questions, and the tokens of one with its four endings, estimated from their file.
HELLASWAG_QUESTIONS, QUESTION_TOKENS = 10_042, 320
_STEPS_IN_TEXT = 32
LONG_SECONDS, _UNSAVED_HOURS = 7 * 86400.0, 3.0
# The best checkpoint, and one that is being written.
_BESIDES_LATEST = 2
# The largest share of the rate of large matrix products that training reaches.
MAX_MFU = 0.6


def advise(
    cfg: TrainSettings,
    model: ModelSettings,
    tokens: int | None,
    held_out: int | None,
    step: int,
    *,
    are_published: bool = False,
) -> Iterator[Advice]:
    """Yield warnings about a run, before it begins or continues.

    Args:
        tokens: training tokens of the dataset; None if unknown.
        held_out: its held-out tokens; None if unknown.
        step: steps completed; what can no longer be changed is left out.
        are_published: True if the initial weights were trained elsewhere; those of a run here can
            go on at its rate.
    """
    if tokens:
        yield from _text(cfg, model, tokens, step)
    usual, kind = _RATE_TIMES_WIDTH.get(cfg.optimizer, 1.4) / model.embd_size, ""
    if are_published:
        usual, kind = _FINE_TUNING_SHARE * usual, " and trained weights"
    rate, fix = cfg.learning_rate, f"set TRAIN_LEARNING_RATE={usual:.1e}, or try factors of 2 of it"
    if rate > _FAR_ABOVE * usual:
        works = f"what works with {cfg.optimizer} at width {model.embd_size}{kind}"
        yield f"TRAIN_LEARNING_RATE={rate:g} is far above {works}", fix
    if rate < _USELESS_RATE:
        yield f"TRAIN_LEARNING_RATE={rate:g} is too low to change the model", fix
    if cfg.max_steps >= _FEWEST_STEPS:
        yield from _schedule(cfg, step)
    yield from _evaluations(cfg, held_out or 0)


def _text(cfg: TrainSettings, model: ModelSettings, tokens: int, step: int) -> Iterator[Advice]:
    text, more = f"{tokens:,} tokens of text", "or prepare more text"
    epochs = cfg.max_steps * cfg.tokens_per_step / tokens
    enough = _EPOCHS * tokens // cfg.tokens_per_step
    weights, fitting = block_weights(model), sizes(tokens, model.context_length, {}, on_gpu=False)
    if cfg.tokens_per_step > tokens and not step:
        in_text = max(1, tokens // (_STEPS_IN_TEXT * model.context_length)) * model.context_length
        fewer = min(fitting["TRAIN_TOKENS_PER_STEP"], in_text)
        problem = f"a step of {cfg.tokens_per_step:,} tokens is more than the {text}"
        yield problem, f"set TRAIN_TOKENS_PER_STEP={fewer}, {more}"
    elif epochs > _MANY_EPOCHS and step < enough and not cfg.max_hours:
        times = f"{epochs:.1f} times; beyond about {_EPOCHS}, repeated text adds little"
        problem = f"{plural(cfg.max_steps, 'step')} read the {text} {times}"
        yield problem, f"set TRAIN_MAX_STEPS={enough}, {more}"
    if tokens < _MIN_TOKENS_PER_WEIGHT * weights and not step and not cfg.init_from:
        layers, width = fitting["MODEL_NUM_LAYERS"], fitting["MODEL_EMBD_SIZE"]
        size = f"MODEL_NUM_LAYERS={layers} MODEL_EMBD_SIZE={width}"
        size = f"set {size} MODEL_NUM_HEADS={fitting['MODEL_NUM_HEADS']} as RECIPE=own-text does, "
        is_smaller = 12 * layers * width**2 < weights
        problem = f"{format_count(weights)} weights in the model's blocks will memorize the {text}"
        yield problem, f"{size}{more}" if is_smaller else more.removeprefix("or ")


def _schedule(cfg: TrainSettings, step: int) -> Iterator[Advice]:
    steps, cooldown = cfg.max_steps, round(cfg.cooldown * cfg.max_steps)
    if cfg.warmup_steps != "auto" and max(steps / 2, step) < cfg.warmup_steps:
        fix = f"set TRAIN_WARMUP_STEPS=auto, which takes {round(0.01 * steps)}"
        yield f"the warm-up takes {cfg.warmup_steps:,} of {steps:,} steps", fix
    if cfg.lr_schedule == "wsd" and cfg.cooldown and cooldown < _FEWEST_COOLDOWN_STEPS:
        problem = f"the cool-down takes {plural(cooldown, 'step')} of {steps:,}"
        yield problem, "set TRAIN_COOLDOWN=0.2 or more"


def _evaluations(cfg: TrainSettings, held_out: int) -> Iterator[Advice]:
    hellaswag_every = 0 if cfg.hellaswag_file else cfg.hellaswag_every
    hellaswag_tokens = HELLASWAG_QUESTIONS * QUESTION_TOKENS
    for what, variable, every, tokens in (
        ("held-out losses", "VAL_EVERY", cfg.val_every, min(cfg.val_tokens, held_out)),
        ("scores on HellaSwag", "HELLASWAG_EVERY", hellaswag_every, hellaswag_tokens),
    ):
        steps_worth = EVALUATION_SHARE * tokens / cfg.tokens_per_step
        times = steps_worth * math.ceil(cfg.max_steps / every) / cfg.max_steps if every else 0
        if times > _MOST_EVALUATION:
            enough = min(math.ceil(10 * steps_worth), cfg.max_steps)
            fix = f"set TRAIN_{variable}={enough if steps_worth <= enough else 0}"
            yield f"{what} take {times:.1f} times as long as the training", fix


def advise_on_duration(
    cfg: TrainSettings, seconds: float, steps: int, *, on_cpu: bool
) -> Iterator[Advice]:
    """Yield warnings about a run whose remaining steps take at least `seconds`."""
    here = "on this CPU" if on_cpu else "on this GPU"
    if seconds > LONG_SECONDS and not cfg.max_hours:
        problem = f"{plural(steps, 'step')} take at least {format_duration(seconds)} {here}"
        yield problem, shorter_run(seconds, steps, on_cpu=on_cpu)
    yield from advise_on_speed(cfg, seconds / 3600 / steps, steps)


def advise_on_speed(cfg: TrainSettings, step_hours: float, steps: int) -> Iterator[Advice]:
    """Yield warnings about the intervals and the time limit of a run, by the hours of a step."""
    if cfg.max_hours and cfg.max_hours < min(steps, _FEWEST_STEPS) * step_hours:
        most = plural(int(cfg.max_hours / step_hours), "step")
        more = f"set TRAIN_MAX_HOURS={_FEWEST_STEPS * step_hours:.2g} or more"
        problem = f"TRAIN_MAX_HOURS={cfg.max_hours:g} is enough for at most {most} here"
        yield problem, f"{more}, or a smaller TRAIN_TOKENS_PER_STEP"
    apart = min(cfg.checkpoint_every or steps, steps) * step_hours
    apart = min(apart, cfg.max_hours or apart)
    if apart > _UNSAVED_HOURS:
        lost = "if the machine is lost, so is all work since the last one"
        problem = f"checkpoints are at least {apart:.1f} hours apart, and {lost}"
        yield problem, f"set TRAIN_CHECKPOINT_EVERY={max(1, int(0.5 / step_hours))}"


def shorter_run(seconds: float, steps: int, *, on_cpu: bool) -> str:
    """Return how to train for less than a week."""
    in_a_day = int(steps * 86400 / seconds)
    fewer = f"set TRAIN_MAX_HOURS=24 for {in_a_day:,} steps" if in_a_day else "a smaller model"
    faster = "train on a GPU (docs/cloud.md)" if on_cpu else "use more or faster GPUs"
    return f"{faster}, or {fewer}{'; RECIPE=demo takes minutes' if on_cpu else ''}"


def advise_on_disk(cfg: TrainSettings, model: ModelSettings, free_bytes: int) -> Iterator[Advice]:
    """Yield a warning if a run's checkpoints, existing ones included, take more than is free."""
    needed, count = checkpoints_bytes(cfg, model), count_checkpoints(cfg)
    if needed > free_bytes:
        affordable = free_bytes // (needed // count)
        keep = affordable - (_BESIDES_LATEST + (cfg.lr_schedule == "wsd"))
        lower, missing = f"set TRAIN_KEEP_CHECKPOINTS={keep}", format_bytes(needed - free_bytes)
        take = "takes" if count == 1 else "take"
        problem = f"{plural(count, 'checkpoint')} {take} {format_bytes(needed)}"
        fix = f"{lower if keep > 0 else f'free {missing}'}, or set DATA_DIR to a larger disk"
        yield f"{problem}, and {format_bytes(max(0, free_bytes))} are free for them", fix


def checkpoints_bytes(cfg: TrainSettings, model: ModelSettings) -> int:
    """Return the bytes of all checkpoints: weights, and two moments of each, or one with Muon."""
    without = block_weights(model) if cfg.optimizer == "muon" else 0
    return count_checkpoints(cfg) * 4 * (3 * count_parameters(model) - without)


def count_checkpoints(cfg: TrainSettings) -> int:
    """Return how many checkpoints exist at once: the last, the best and others, and a new one."""
    has_cooldown = cfg.lr_schedule == "wsd"
    saved = math.ceil(cfg.max_steps / (cfg.checkpoint_every or cfg.max_steps)) + has_cooldown
    return min(saved, cfg.keep_checkpoints + _BESIDES_LATEST + has_cooldown)


def count_parameters(model: ModelSettings) -> int:
    """Return how many parameters a model has, without torch: weights and biases of its layers."""
    width, shape = model.embd_size, model.shape()
    if model.architecture == "gpt2":
        others = model.vocab_size + model.context_length + 2 + 13 * model.num_layers
        return block_weights(model) + others * width
    embeddings = 1 if shape["tie_embeddings"] else 2
    others = embeddings * model.vocab_size + 1 + 2 * model.num_layers
    return block_weights(model) + others * width + 2 * shape["head_dim"] * model.num_layers


def block_weights(model: ModelSettings) -> int:
    """Return how many weights the matrices of all blocks have."""
    rows = 12 * model.embd_size
    if model.architecture == "qwen3":
        mlp_size = qwen3_mlp_size(model.embd_size)
        rows = 4 * model.num_heads * model.shape()["head_dim"] + 3 * mlp_size
    return model.num_layers * rows * model.embd_size
