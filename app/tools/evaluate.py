"""The loss of a checkpoint on a split."""

import math

from app.data.loader import TokenStream
from app.data.shards import open_dataset
from app.errors import UserError
from app.settings import Settings
from app.tools.checkpoints import load_gpt
from app.train.device import choose_device
from app.train.evaluate import held_out_windows, summed_loss


def evaluate(settings: Settings) -> None:
    """Print a checkpoint's mean loss and perplexity on a split.

    Raises:
        UserError: there is no such checkpoint, dataset or split.
    """
    chosen = settings.evaluate
    device = choose_device(
        settings.train.device, settings.train.precision, settings.train.deterministic
    )
    model, checkpoint = load_gpt(settings.run_dir, chosen.step, device)
    dataset = open_dataset(settings.train_dataset_dir)
    stream = TokenStream(dataset.val if chosen.split == "val" else dataset.train)
    length = model.config.context_length
    windows = held_out_windows(stream, length, None if chosen.tokens == "all" else chosen.tokens)
    if windows == 0:
        raise UserError(
            f"{dataset.folder} has no {chosen.split} tokens to measure on",
            "prepare it with PREPARE_VAL_TOKENS above 0, or set EVALUATE_SPLIT=train",
        )
    batch_size = int(checkpoint.state["micro_batch_size"])
    total = summed_loss(model, stream, windows, batch_size=batch_size, device=device)
    loss = total.item() / windows
    print(
        f"{checkpoint.folder}: loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, "
        f"on {windows * length:,} {chosen.split} tokens of {dataset.folder}"
    )
