"""The check that a text is long enough for both splits of a dataset."""

from app.errors import UserError
from app.prepare.spec import DatasetSpec


class TooLittleText(UserError):
    """The whole source has fewer tokens than the dataset needs."""


def check_enough_text(spec: DatasetSpec, val: int, train: int, between: int, bad: int) -> None:
    """Raise TooLittleText if the held-out split is not full, or the training split is empty.

    Args:
        val, train, between: tokens of the splits, and tokens left out between them.
        bad: lines and files left out.
    """
    held_out, least = spec.held_out_tokens, spec.sequence_tokens
    without = f"; {bad:,} bad lines and files were left out" if bad else ""
    possible = (val + train) // 5 // 16 * 16
    shorter = f", set MODEL_CONTEXT_LENGTH={possible}" if possible else ""
    is_ended = train != spec.total_tokens
    if held_out and is_ended and min(val, train) < least and val + train < 4 * least:
        raise TooLittleText(
            f"the text has only {val + train:,} tokens{without}: to train on some and hold some "
            f"out, about {4 * least:,} are needed (MODEL_CONTEXT_LENGTH={least - 1})",
            f"add text{shorter}, or hold nothing out: PREPARE_VAL_TOKENS=0",
        )
    if val < held_out:
        raise TooLittleText(
            f"the dataset has only {val:,} tokens, {spec.val_tokens:,} were to be held out"
            + without,
            "lower PREPARE_VAL_TOKENS (0 holds nothing out), or add text",
        )
    if train == 0:
        after = f" after the {held_out:,} held-out tokens" if held_out else ""
        raise TooLittleText(
            f"the dataset has no text to train on{after}{without}",
            "the rest of the document that they end in is not trained on: lower "
            "PREPARE_VAL_TOKENS, or set it to 0"
            if between
            else "check PREPARE_TEXT_COLUMN, lower PREPARE_VAL_TOKENS, or add text",
        )
