"""How well a checkpoint predicts a split: loss, perplexity, bits per byte, and how sure that is."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from app.data.dataset import open_dataset
from app.errors import UserError
from app.files import AppendOnlyFile
from app.progress import TokenProgress
from app.runs.checkpoint import latest_checkpoint
from app.runs.metrics import perplexity
from app.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.data.token_stream import TokenStream
    from app.hardware.device import Device
    from app.model.gpt import GPTConfig

# modded-nanogpt, llm.c and others measure on these: the first tokens of sample-10BT.
PUBLISHED_TOKENS = 10_485_760
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Measurement:
    """The loss on a number of windows.

    Attributes:
        loss: mean over all windows, and so over all tokens; nats per token
        standard_error: of `loss`, for other text of this kind. It says nothing of another
            training; and of two models, measured on the same windows, the difference is much surer
            than this. None with a single window.
        bits_per_byte: all bits over all bytes of text that the targets stand for; predicting
            `<|endoftext|>` costs bits, and the token has no byte. None without a byte.
    """

    loss: float
    standard_error: float | None
    bits_per_byte: float | None
    windows: int
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """The interval of 95 %: exp(loss ± 1.96 standard errors)."""
        if self.standard_error is None:
            return None
        reach = _NORMAL_95 * self.standard_error
        return perplexity(self.loss - reach), perplexity(self.loss + reach)


def measured(losses: npt.NDArray[np.float64], context_length: int, num_bytes: int) -> Measurement:
    """Put together what the windows say.

    Args:
        losses: of each window, nats per token, [windows], in the order of the stream.
        num_bytes: of text in all their targets.
    """
    windows, loss = losses.size, float(losses.mean())
    bits = loss * windows * context_length / math.log(2)
    return Measurement(
        loss=loss,
        standard_error=standard_error(losses) if windows > 1 else None,
        bits_per_byte=bits / num_bytes if num_bytes else None,
        windows=windows,
        tokens=windows * context_length,
        bytes=num_bytes,
    )


def standard_error(losses: npt.NDArray[np.float64]) -> float:
    """Standard error of the mean of two or more windows' losses, in the order of the stream.

    A long document fills many windows, which are alike: as if they were independent, the error
    would come out at half of what it is. So it is taken from the means of √W blocks of √W
    consecutive windows (Flegal and Jones, "Batch means and spectral variance estimators in Markov
    chain Monte Carlo", 2010).
    """
    length = math.isqrt(losses.size)
    blocks = losses.size // length
    means = losses[: blocks * length].reshape(blocks, length).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(blocks))


def evaluate(settings: Settings) -> None:
    """Print how well a checkpoint predicts a split, and add it to the run's evaluations.jsonl.

    Raises:
        UserError: there is no such checkpoint, dataset or split, or too little of it.
    """
    chosen = settings.evaluate
    checkpoint = latest_checkpoint(settings.run_dir, chosen.step)
    dataset = open_dataset(settings.train_dataset_dir)

    # Torch takes seconds to import: what can be wrong without it has been told by now.
    from app.data.token_stream import TokenStream
    from app.data.tokenizer import bytes_of_tokens
    from app.hardware.device import select_device
    from app.inference.loss import HeldOutText
    from app.runs.load import load_gpt

    # Only the loss of training multiplies in 8-bit floats.
    precision = "auto" if settings.train.precision == "fp8" else settings.train.precision
    device = select_device(settings.train.device, precision, settings.train.deterministic)
    model = load_gpt(checkpoint, device)
    stream = TokenStream(dataset.val if chosen.split == "val" else dataset.train)
    length = model.config.context_length
    text = HeldOutText(stream, length, _tokens_to_measure(chosen.tokens, stream, settings))
    windows = text.num_sequences
    if windows == 0:
        raise UserError(
            f"{dataset.folder} has no {chosen.split} tokens to measure on",
            "prepare it with PREPARE_VAL_TOKENS above 0, or set EVALUATE_SPLIT=train",
        )
    is_own = dataset.fingerprint == checkpoint.state.identity["dataset_fingerprint"]
    if chosen.split == "val" and not is_own:
        print(
            f"warning: {settings.run_dir} was not trained on {dataset.folder}; what is held out "
            "there may be text that it was trained on",
            file=sys.stderr,
            flush=True,
        )
    batch_size = _batch_size(model.config, device)
    losses, num_bytes, table = np.empty(windows), 0, bytes_of_tokens()
    done = 0
    with TokenProgress(windows * length) as progress:
        for of_batch, targets in text.losses(model, device, batch_size):
            losses[done : done + len(of_batch)] = of_batch.cpu()
            num_bytes += int(table[targets.numpy()].sum())
            done += len(of_batch)
            progress.show(done * length, None)
    found = measured(losses, length, num_bytes)
    print(f"{checkpoint.folder} on {chosen.split} tokens of {dataset.folder}:")
    print("\n".join(_lines(found, length)), flush=True)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": checkpoint.step,
        "dataset": dataset.folder.name,
        "dataset_fingerprint": dataset.fingerprint,
        "trained_on_this_dataset": is_own,
        "split": chosen.split,
        "context_length": length,
        "precision": device.precision,
        "device": device.name,
        **asdict(found),
        "perplexity": found.perplexity,
        "perplexity_interval": found.perplexity_interval,
    }
    line = json.dumps(record, allow_nan=False) + "\n"
    AppendOnlyFile(settings.run_dir / "evaluations.jsonl").append(line.encode())


def _tokens_to_measure(
    chosen: int | Literal["all", "published"], stream: TokenStream, settings: Settings
) -> int | None:
    if chosen == "all":
        return None
    if chosen != "published":
        return chosen
    if len(stream) <= PUBLISHED_TOKENS:
        raise UserError(
            f"{settings.train_dataset_dir} has {len(stream):,} held-out tokens; published figures "
            f"take {PUBLISHED_TOKENS:,}, and one more as the last target",
            f"prepare it with PREPARE_VAL_TOKENS={PUBLISHED_TOKENS} and train on that, or set "
            "EVALUATE_TOKENS=all",
        )
    return PUBLISHED_TOKENS


def _batch_size(config: GPTConfig, device: Device) -> int:
    """As many windows as help this device and fit into its memory."""
    from app.hardware.memory import MemoryEstimate, available_bytes, largest_batch_that_fits

    length, width, vocabulary = config.context_length, config.embd_size, config.vocab_size
    need = MemoryEstimate(
        # The logits of one window, their float32 copy and its softmax; and the embedding in bf16.
        fixed_bytes=12 * length * vocabulary + 2 * vocabulary * width,
        # In a block at most: the residual stream, its norm, the MLP's two, and attention's parts.
        bytes_per_sequence=64 * length * width,
    )
    sizes = [1 << power for power in range(17)]
    available = available_bytes(device.torch_device)
    return largest_batch_that_fits(sizes, length, need, device.torch_device.type, available)


def _lines(found: Measurement, length: int) -> Iterator[str]:
    error, interval = found.standard_error, found.perplexity_interval
    bar = f" ± {error:.4f} (standard error)" if error is not None else ""
    between = f" (95 %: {interval[0]:,.2f} to {interval[1]:,.2f})" if interval else ""
    yield f"  loss           {found.loss:.4f}{bar} nats per token"
    yield f"  perplexity     {found.perplexity:,.2f}{between}"
    if found.bits_per_byte is not None:
        yield f"  bits per byte  {found.bits_per_byte:.4f}"
    yield (
        f"  measured on    {found.tokens:,} tokens, {found.bytes:,} bytes, "
        f"in {found.windows:,} windows of {length:,}"
    )
    if bar:
        yield "The error is for other text of this kind; it says nothing of another training."
