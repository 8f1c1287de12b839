"""Evaluation of a checkpoint: loss, perplexity and bits per byte, with their standard error."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from app.data.dataset import open_dataset
from app.errors import UserError
from app.files import AppendOnlyFile
from app.locks import WAIT_SECONDS, locked
from app.progress import TokenProgress
from app.runs.checkpoints import latest_checkpoint
from app.runs.metrics import bits_per_byte, perplexity
from app.settings.settings import Settings
from app.tools.dataset import dataset_of, recorded
from app.tools.latest_run import with_latest_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from app.data.token_stream import TokenStream
    from app.hardware.device import Device
    from app.inference.loss import HeldOutText
    from app.model.language_model import LanguageModel, ModelConfig

# The first tokens of sample-10BT, on which modded-nanogpt, llm.c and others evaluate.
PUBLISHED_TOKENS = 10_485_760
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Evaluation:
    """The loss on a number of sequences.

    Attributes:
        loss: mean over all sequences, and so over all tokens; nats per token
        standard_error: standard error of `loss` over other text of this kind; None with a single
            sequence. It does not cover other training runs, and the difference of two models on
            the same sequences is more certain.
        bits_per_byte: bits per byte of text in the targets; None without a byte. `<|endoftext|>`
            costs bits, but has no byte.
        sequences, tokens, bytes: what was measured
    """

    loss: float
    standard_error: float | None
    bits_per_byte: float | None
    sequences: int
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return perplexity(self.loss)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval: exp(loss ± 1.96 standard errors)."""
        if self.standard_error is None:
            return None
        margin = _NORMAL_95 * self.standard_error
        return perplexity(self.loss - margin), perplexity(self.loss + margin)

    def to_json(self) -> dict[str, Any]:
        """Return its entry in evaluations.jsonl."""
        values = {"perplexity": self.perplexity, "perplexity_interval": self.perplexity_interval}
        return {("windows" if k == "sequences" else k): v for k, v in asdict(self).items()} | values


def summarize(losses: npt.NDArray[np.float64], context_length: int, num_bytes: int) -> Evaluation:
    """Return the evaluation of sequences of `context_length` targets.

    Args:
        losses: the loss of each sequence, in the order of the stream; nats per token, [sequences].
        num_bytes: bytes of text in all targets.
    """
    loss = float(losses.mean())
    return Evaluation(
        loss=loss,
        standard_error=standard_error(losses) if losses.size > 1 else None,
        bits_per_byte=bits_per_byte(loss, losses.size * context_length, num_bytes),
        sequences=losses.size,
        tokens=losses.size * context_length,
        bytes=num_bytes,
    )


def standard_error(losses: npt.NDArray[np.float64]) -> float:
    """Return the standard error of the mean of two or more losses, in the order of the stream.

    A long document fills many sequences, which are alike: treating them as independent would give
    about half the true error. So it is estimated from the means of √W blocks of √W consecutive
    sequences (Flegal and Jones, "Batch means and spectral variance estimators in Markov chain Monte
    Carlo", 2010).
    """
    length = math.isqrt(losses.size)
    blocks = losses.size // length
    means = losses[: blocks * length].reshape(blocks, length).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(blocks))


def evaluate(settings: Settings) -> None:
    """Print how well a checkpoint predicts a split, and append it to the run's evaluations.jsonl.

    Raises:
        UserError: there is no such checkpoint, dataset or split, or it has too few tokens.
    """
    cfg, settings = settings.evaluate, with_latest_run(settings)
    checkpoint = latest_checkpoint(settings.run_dir, cfg.step, use_best=settings.train.use_best)
    dataset = open_dataset(dataset_of(settings), settings.general.data_dir)

    # Imported after these checks, because torch takes seconds.
    from app.data.token_stream import TokenStream
    from app.hardware.device import select_device
    from app.inference.loss import HeldOutText
    from app.runs.load import load_model

    # Only training multiplies in 8-bit floats.
    precision = "auto" if settings.train.precision == "fp8" else settings.train.precision
    device = select_device(settings.train.device, precision, settings.train.deterministic)
    is_same_device = recorded(settings, "device", "name") == device.name
    if is_same_device and "precision" not in settings.train.model_fields_set:
        # auto chooses the precision by a measurement, which may come out otherwise now.
        before = recorded(settings, "device", "precision")
        device = replace(device, precision="bf16" if before == "fp8" else before)
    model = load_model(checkpoint, device)
    length = model.config.context_length
    stream = TokenStream(dataset.val if cfg.split == "val" else dataset.train)
    is_own = dataset.fingerprint == checkpoint.state.identity["dataset_fingerprint"]
    tokens = cfg.tokens
    if tokens == "auto":
        measured = checkpoint.state.settings["train"]["val_tokens"]
        tokens = measured if cfg.split == "val" and is_own else "all"
    text = HeldOutText(stream, length, _max_tokens(tokens, stream, dataset.folder))
    if text.num_sequences == 0:
        if lack := cfg.split == "val" and dataset.lack_of_held_out_text(length):
            raise UserError(lack[0], f"{lack[1]}; or set EVALUATE_SPLIT=train")
        dataset.num_sequences(length)
    if cfg.split == "val" and not is_own:
        message = (
            f"warning: {settings.run_dir} was not trained on {dataset.folder}; it may have been "
            "trained on text that is held out there"
        )
        print(message, file=sys.stderr, flush=True)
    batch_size = min(checkpoint.state.micro_batch_size, _batch_size(model.config, device))
    evaluation = _measure(model, text, device, batch_size)
    print(f"{checkpoint.folder} on {cfg.split} tokens of {dataset.folder}:")
    print("\n".join(_lines(evaluation, length, len(stream))), flush=True)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": checkpoint.step,
        "dataset": dataset.folder.name,
        "dataset_fingerprint": dataset.fingerprint,
        "trained_on_this_dataset": is_own,
        "split": cfg.split,
        "context_length": length,
        "precision": device.precision,
        "device": device.name,
        **evaluation.to_json(),
    }
    line = json.dumps(record, allow_nan=False) + "\n"
    path, lock = (settings.run_dir / name for name in ("evaluations.jsonl", ".evaluations.lock"))
    with locked(path, "evaluate", wait_seconds=WAIT_SECONDS, file=lock):
        AppendOnlyFile(path).append(line.encode())


def _max_tokens(
    tokens: int | Literal["all", "published"], stream: TokenStream, folder: Path
) -> int | None:
    """Return EVALUATE_TOKENS as a number; None for all."""
    if tokens == "published" and len(stream) <= PUBLISHED_TOKENS:
        raise UserError(
            f"{folder} has {len(stream):,} held-out tokens; published results take "
            f"{PUBLISHED_TOKENS:,}, and one more as the last target",
            f"prepare it with PREPARE_VAL_TOKENS={PUBLISHED_TOKENS} and train on that, or set "
            "EVALUATE_TOKENS=all",
        )
    if tokens == "published":
        return PUBLISHED_TOKENS
    return None if tokens == "all" else tokens


def _measure(
    model: LanguageModel, text: HeldOutText, device: Device, batch_size: int
) -> Evaluation:
    from app.data.tokenizer import token_byte_lengths

    losses, num_bytes, bytes_per_token = np.empty(text.num_sequences), 0, token_byte_lengths()
    measured = 0
    with TokenProgress(text.num_tokens) as progress:
        for batch, targets in text.losses(model, device, batch_size):
            losses[measured : measured + len(batch)] = batch.cpu()
            num_bytes += int(bytes_per_token[targets.numpy()].sum())
            measured += len(batch)
            progress.show(measured * text.context_length, None)
    return summarize(losses, text.context_length, num_bytes)


def _batch_size(config: ModelConfig, device: Device) -> int:
    """Return the largest useful batch size that fits into the device's memory."""
    from app.hardware.memory import MemoryEstimate, available_bytes, largest_batch_that_fits

    length, vocab_size = config.context_length, config.vocab_size
    # Attention may be wider than the residual stream.
    width = max(config.embd_size, config.num_heads * config.head_dim)
    estimate = MemoryEstimate(
        # One sequence's logits, their float32 copy and its softmax; and the embedding in bf16.
        fixed_bytes=12 * length * vocab_size + 2 * vocab_size * width,
        # A block at its peak: residual stream, its norm, the MLP's two tensors, attention's parts.
        bytes_per_sequence=64 * length * width,
    )
    sizes = [1 << power for power in range(17)]
    available = available_bytes(device.torch_device)
    return largest_batch_that_fits(sizes, length, estimate, device.torch_device.type, available)


def _lines(evaluation: Evaluation, length: int, available: int) -> Iterator[str]:
    error, interval = evaluation.standard_error, evaluation.perplexity_interval
    error_bar = f" ± {error:.4f} (standard error)" if error is not None else ""
    limits = f" (95 %: {interval[0]:,.2f} to {interval[1]:,.2f})" if interval else ""
    yield f"  loss           {evaluation.loss:.4f}{error_bar} nats per token"
    yield f"  perplexity     {evaluation.perplexity:,.2f}{limits}"
    if evaluation.bits_per_byte is not None:
        yield f"  bits per byte  {evaluation.bits_per_byte:.4f}"
    # The last tokens may not fill a sequence.
    is_part = available - evaluation.tokens > length
    more = f"; the split has {available:,}, --tokens all takes them" if is_part else ""
    yield (
        f"  measured on    {evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes, "
        f"in {evaluation.sequences:,} sequences of {length:,}{more}"
    )
    if error_bar:
        yield "The error is over other text of this kind, not over other training runs."
