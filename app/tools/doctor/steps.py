"""A few real micro-batches of the configured model: whether it compiles, and how long it takes."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from app.model.gpt import GPT
from app.tools.doctor.device_checks import Examined
from app.tools.doctor.finding import Finding
from app.tools.doctor.rates import timed
from app.train.compilation import compiled_loss, missing_for_compiling
from app.train.job import optimizers_for

# More tokens at once would only take longer on a CPU.
_TOKENS_ON_CPU = 1024
_MEASURED_SECONDS = 1.0
# Of a mean loss in nats per token: compiled and plain code round otherwise, in bf16 visibly.
_TOLERANCE = 0.05


def check_compilation(case: Examined) -> Iterator[Finding]:
    """Whether what torch.compile makes of the model runs here, and gives the plain loss.

    Without a compiler the plain model is measured.
    """
    if case.type == "cuda":
        torch.cuda.empty_cache()
    missing = missing_for_compiling(case.type)
    is_wanted = case.settings.train.compile != "false"
    if not is_wanted:
        yield Finding("compile", "skip", "not needed: TRAIN_COMPILE=false")
    elif missing:
        yield Finding(
            "compile",
            "fail",
            f"torch.compile does not find {' and '.join(missing)}: training would be slower",
            "apt-get install g++ python3-dev, or set TRAIN_COMPILE=false",
        )
    compiled = is_wanted and not missing
    plain, found = _train_a_little(case, compiled=compiled)
    if not compiled:
        return
    said = (
        f"the model's blocks, in {case.trial.compile_seconds:.0f} s; loss {found:.4f}, "
        f"{plain:.4f} without compiling"
    )
    # What is not a number is within no tolerance.
    if abs(found - plain) < _TOLERANCE:
        yield Finding("compile", "pass", said)
    else:
        fix = "set TRAIN_COMPILE=false; if the losses differ then as well, take another machine"
        yield Finding("compile", "fail", said, fix)


def _train_a_little(case: Examined, *, compiled: bool) -> tuple[float, float]:
    """Losses of a batch, plain and as train computes it; measures passes and updates."""
    here, length = case.device.torch_device, case.config.context_length
    windows = case.windows
    if case.type == "cpu":
        windows = min(windows, max(1, _TOKENS_ON_CPU // length))
    torch.manual_seed(0)
    model = GPT(case.config).to(here)
    tokens = torch.randint(case.config.vocab_size, (windows, length + 1), device=here)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with torch.no_grad(), case.device.forward_pass():
        plain = float(model(inputs, targets).item())
    optimizers = optimizers_for(model, case.settings.train, case.device)
    loss_of = compiled_loss(model, "blocks") if compiled else model

    def passes() -> float:
        with case.device.forward_pass():
            loss = loss_of(inputs, targets)
        loss.backward()
        return float(loss.item())

    started = time.perf_counter()
    found = passes()
    first_seconds = time.perf_counter() - started
    # The first update also takes the memory for the moments.
    optimizers.step()
    of_passes, of_updates = [timed(passes, here)], [timed(optimizers.step, here)]
    while sum(of_passes) + sum(of_updates) < _MEASURED_SECONDS:
        of_passes.append(timed(passes, here))
        of_updates.append(timed(optimizers.step, here))
    case.trial = replace(
        case.trial,
        micro_batch_tokens=windows * length,
        micro_batch_seconds=statistics.median(of_passes),
        optimizer_seconds=statistics.median(of_updates),
        compile_seconds=first_seconds if compiled else 0.0,
    )
    return plain, found
