"""Matrix products in 8-bit floats (Micikevicius et al., "FP8 formats for deep learning", 2022)."""

import torch
from torch import Tensor

_VALUES = torch.float8_e4m3fn
# Gradients need range more than precision.
_GRADIENTS = torch.float8_e5m2


def matmul_fp8(a: Tensor, b: Tensor, *, a_is_gradient: bool = False) -> Tensor:
    """Return `a @ b`, computed in 8-bit floats with one scale per matrix.

    Args:
        a: bfloat16 [M, K].
        b: bfloat16 [K, N].
        a_is_gradient: `a` is softmax minus one-hot, so all its values are in [-1, 1].

    Returns:
        bfloat16 [M, N].
    """
    a8, scale_a = _quantized(a, _GRADIENTS, 1.0) if a_is_gradient else _quantized(a, _VALUES)
    b8, scale_b = _quantized(b, _VALUES)
    return torch._scaled_mm(
        a8.contiguous(),
        b8.t().contiguous().t(),
        scale_a,
        scale_b,
        out_dtype=torch.bfloat16,
        # Faster sums in fewer bits, which suffice for logits, but not for gradients.
        use_fast_accum=not a_is_gradient,
    )


def _quantized(
    x: Tensor, dtype: torch.dtype, largest: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return x / scale as 8-bit floats that use their whole range, and the float32 scale."""
    if largest is None:
        scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    else:
        scale = torch.full((), largest / torch.finfo(dtype).max, device=x.device)
    return (x.float() / scale).to(dtype), scale
