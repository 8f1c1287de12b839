"""The output layer and its loss. Logits are by far the largest tensor of training."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from app.model.fp8 import matmul_fp8

# Part of the compile cache's key: change it with the operator's backward pass, matmul_fp8 included.
VERSION = "2"
# Tensor cores multiply matrices at full speed if their sides are multiples of 64; 50257 is odd.
VOCAB_MULTIPLE = 64


def output_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, fp8: bool = False) -> Tensor:
    """Return the mean cross-entropy of the logits `hidden @ weight.T`.

    Code compiled for a GPU keeps the logits once, and overwrites them with their gradient.
    Otherwise torch's cross-entropy computes the loss from a float32 copy of them, also in fp16:
    the gradient comes there before the loss scale, too small for fp16.

    Args:
        hidden: [..., C], in autocast's dtype or float32.
        weight: float32 [vocabulary, C].
        targets: int64 [...], each below the vocabulary's size (not checked on a GPU).
        fp8: multiply in 8-bit floats if the code is compiled for a GPU.

    Returns:
        float32 scalar, nats per target.
    """
    # Inductor emits Triton for GPUs, so compiled code there can launch a Triton kernel.
    is_fp16 = _dtype_of_products(hidden) == torch.float16
    if hidden.is_cuda and torch.compiler.is_compiling() and not is_fp16:
        return fused_output_loss(hidden, weight, targets, fp8=fp8)
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits.float(), targets.flatten())


def fused_output_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, fp8: bool = False
) -> Tensor:
    """Compute output_loss with linear_cross_entropy, on any device."""
    dtype = _dtype_of_products(hidden)
    vocab_size = len(weight)
    padded = F.pad(weight, (0, 0, 0, -vocab_size % VOCAB_MULTIPLE)).to(dtype)
    rows = hidden.flatten(0, -2).to(dtype)
    loss, _ = linear_cross_entropy(rows, padded, targets.flatten(), vocab_size, fp8)
    return loss


def _dtype_of_products(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast else hidden.dtype


@torch.library.custom_op("gpt_compose::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, fp8: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of `x @ weight.T`, and the gradient of each row's logits.

    Args:
        x: [N, C].
        weight: [padded vocabulary, C], of x's dtype; rows from `vocab_size` on are ignored.
        targets: int64 [N].
        vocab_size: size of the vocabulary without padding.
        fp8: multiply in 8-bit floats.

    Returns:
        loss: float32 scalar, softmax and sum in float32.
        gradient: softmax minus one-hot [N, padded vocabulary], of x's dtype, in the logits' memory;
            divide by N for the gradient of the mean.
    """
    # Imported here, because Triton comes only with torch's CUDA builds.
    from app.model.cross_entropy_kernel import softmax_gradient_

    logits = matmul_fp8(x, weight.t()) if fp8 else x @ weight.t()
    return softmax_gradient_(logits, targets, vocab_size).mean(), logits


@linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, fp8: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), x.new_empty(len(x), len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, ctx.fp8 = inputs
    ctx.save_for_backward(x, weight, output[1])
    # The second output needs no gradient, and zeros for it would be as large as the logits.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gradient = ctx.saved_tensors
    scale = grad_loss / len(x)
    if ctx.fp8:
        grad_x = matmul_fp8(gradient, weight, a_is_gradient=True)
        grad_weight = matmul_fp8(gradient.t(), x, a_is_gradient=True)
    else:
        grad_x, grad_weight = gradient @ weight, gradient.t() @ x
    # In float32, because bf16 would round a factor that is not a power of two.
    grad_x, grad_weight = grad_x.float() * scale, grad_weight.float() * scale
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_save)
