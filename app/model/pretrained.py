"""Weights that transformers has stored, in a model of ours."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.model.gpt import GPT, Block
from app.model.huggingface import STACKED, TRANSPOSED
from app.model.language_model import LanguageModel

# Buffers that files of older versions have as well.
_BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


@torch.no_grad()
def load_pretrained(model: LanguageModel, files: Sequence[Path]) -> None:
    """Copy stored weights into a model of their shape, a tensor at a time.

    The attention's projection is divided by the scale that our forward pass multiplies it with.
    Of learned positions only those of the model's context are taken.

    Args:
        files: safetensors files with transformers' names, with or without the base model's prefix.

    Raises:
        ValueError: the files cannot be read, or do not hold the weights of such a model.
    """
    expected, prefix = dict(_destinations(model)), _prefix(model)
    missing, faults, head = set(expected), list[str](), None
    for stored, value in _tensors(files):
        name = stored if stored.startswith((prefix, "lm_head.")) else prefix + stored
        if name.endswith(_BUFFERS):
            continue
        if name == "lm_head.weight" and name not in expected:
            head = value
            continue
        if name not in expected:
            faults.append(f"{stored} is not expected")
            continue
        missing.discard(name)
        target = expected[name]
        if name.endswith(".wpe.weight"):
            value = value[: len(target)]
        if value.shape != target.shape or not value.is_floating_point():
            of = f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
            faults.append(f"{stored} is {of}, not {list(target.shape)} of floating point")
        elif not bool(value.isfinite().all()):
            faults.append(f"{stored} has values that are not finite")
        else:
            target.copy_(value)
            if isinstance(model, GPT) and ".attn.c_proj." in name:
                target.div_(cast(Block, model.transformer.h[0]).attn.output_scale)
    faults += [f"{name} is missing" for name in expected if name in missing]
    if not faults and head is not None:
        embedding = model.head_weight
        if not torch.equal(head.to(embedding), embedding):
            faults.append("lm_head.weight is not the embedding, to which it must be tied")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError("; ".join(faults[:3]) + more)


def _prefix(model: LanguageModel) -> str:
    """Return what the names of the base model's weights begin with."""
    return "transformer." if isinstance(model, GPT) else "model."


def _destinations(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield transformers' name of each weight, and the part of the model that it goes to."""
    for name, value in model.state_dict().items():
        layer = name.split(".")[-2]
        if isinstance(model, GPT):
            yield name, value.T if name.endswith(TRANSPOSED) else value
            continue
        parts = STACKED.get(layer, (layer,))
        for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
            yield name.replace(layer, part), rows


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (they cannot be iterated)
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from None
