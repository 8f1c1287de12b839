"""What might make a step shorter, and is in the program only once a GPU has shown that it does.

Each gives the program's numbers (tests/test_benchmarks.py, by Triton's interpreter on a CPU);
gpu_variants.py measures them beside it.
"""

import copy
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from app.model.gpt import GPT, MLP, Block, CausalSelfAttention
from app.model.kv_cache import LayerCache

# Rows that one Triton program adds up.
_ROWS = 128


class OnePassMLP(MLP):
    """GELU's backward pass and the sum that is the bias's gradient read what they need once."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _dtype(x)
        parameters = (one.to(dtype) for one in (*self.c_fc.parameters(), *self.c_proj.parameters()))
        return cast(Tensor, _OnePassMLP.apply(x.to(dtype), *parameters))


class _OnePassMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        before = F.linear(x, w1, b1)
        ctx.save_for_backward(x, w1, before, w2)
        return F.linear(F.gelu(before), w2, b2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, w1, before, w2 = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        after, grad_before, sums = gelu_backward(rows @ w2, before.flatten(0, -2))
        return (
            (grad_before @ w1).view_as(x),
            grad_before.t() @ x.flatten(0, -2),
            sums.sum(0).to(x.dtype),
            rows.t() @ after,
            rows.sum(0),
        )


@torch.library.custom_op("gpt_compose_prototypes::gelu_backward", mutates_args=())
def gelu_backward(gradient: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU and its gradient at `before`, both [rows, columns], and sums of the latter by column.

    Returns:
        gelu(before), the gradient for it, its sums over 128 rows each, float32 [n, columns].
    """
    rows, columns = before.shape
    after, result = torch.empty_like(before), torch.empty_like(before)
    programs = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, 256))
    sums = before.new_empty(programs[0], columns, dtype=torch.float32)
    _gelu_backward_kernel[programs](
        gradient, before, after, result, sums, rows, columns, _ROWS, 8, 256, num_warps=4
    )
    return after, result, sums


@gelu_backward.register_fake
def _(gradient: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = before.new_empty(-(-before.shape[0] // _ROWS), before.shape[1], dtype=torch.float32)
    return torch.empty_like(before), torch.empty_like(before), sums


@triton.jit
def _gelu_backward_kernel(
    gradients, befores, afters, results, sums, rows,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, ROWS, AT_ONCE):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, AT_ONCE)
        at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < COLUMNS)
        x = tl.load(befores + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32)
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = gradient * (below + x * density)
        tl.store(afters + at, (x * below).to(afters.dtype.element_ty), mask=inside)
        tl.store(results + at, result.to(results.dtype.element_ty), mask=inside)
        total += tl.sum(result, 0)
    tl.store(sums + tl.program_id(0) * COLUMNS + column, total, mask=column < COLUMNS)


class OnePassAttention(CausalSelfAttention):
    """The gradients of q, k and v are put beside each other and summed for the bias in one pass."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        # The bias gets its gradient with the heads.
        beside = F.linear(x, self.c_attn.weight, self.c_attn.bias.detach())
        q, k, v = _SplitHeads.apply(beside, self.c_attn.bias, self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        weight, bias = (self.output_scale * part for part in self.c_proj.parameters())
        return F.linear(y.transpose(1, 2).reshape(x.shape), weight, bias)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, beside: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        B, T, C = beside.shape
        heads = beside.view(B, T, 3, num_heads, C // 3 // num_heads)
        return tuple(part.transpose(1, 2) for part in heads.unbind(2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        beside, sums = join_heads(*gradients)
        return beside, sums.sum(0), None


@torch.library.custom_op("gpt_compose_prototypes::join_heads", mutates_args=())
def join_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Put q, k, v, each [B, heads, T, width], beside each other, and sum them by column.

    Returns:
        [B, T, 3·heads·width], and its sums over 128 rows each, float32 [n, 3·heads·width].
    """
    B, heads, T, width = q.shape
    columns = 3 * heads * width
    beside = q.new_empty(B, T, columns)
    programs = (triton.cdiv(B * T, _ROWS), heads)
    sums = q.new_empty(programs[0], columns, dtype=torch.float32)
    for number, part in enumerate((q, k, v)):
        assert part.stride(3) == 1
        _join_heads_kernel[programs](
            part, beside, sums, B * T, *part.stride()[:3], number * heads * width,
            T, columns, width, _ROWS, 32, num_warps=4,
        )  # fmt: skip
    return beside, sums


@join_heads.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, heads, T, width = q.shape
    sums = q.new_empty(-(-B * T // _ROWS), 3 * heads * width, dtype=torch.float32)
    return q.new_empty(B, T, 3 * heads * width), sums


@triton.jit
def _join_heads_kernel(
    part, beside, sums, rows, of_batch, of_head, of_token, first_column,
    T: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    within = tl.arange(0, WIDTH)
    column = first_column + head * WIDTH + within
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, ROWS, AT_ONCE):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, AT_ONCE)
        inside = (row < rows)[:, None]
        token = (row // T).to(tl.int64) * of_batch + (row % T) * of_token + head * of_head
        x = tl.load(part + token[:, None] + within[None, :], mask=inside, other=0.0)
        at = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        tl.store(beside + at, x, mask=inside)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(sums + tl.program_id(0) * COLUMNS + column, total)


class CastOnce:
    """Weights of the blocks in the dtype they multiply in, cast once a step.

    Their gradients are added up in float32. The projection of the attention's output stays as it
    is: it is scaled before it is cast.

    Attributes:
        model: computes with these; everything else it shares with the model it was made of.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.model = copy.copy(model)
        self.model._modules = model._modules.copy()
        self.model.transformer = copy.copy(model.transformer)
        self.model.transformer._modules = model.transformer._modules.copy()
        blocks = [copy.deepcopy(block) for block in model.transformer.h]
        self.model.transformer.h = nn.ModuleList(blocks)
        self._own: list[Tensor] = []
        self._masters: list[Tensor] = []
        for block, master in zip(blocks, model.transformer.h, strict=True):
            assert isinstance(block, Block)
            for name, parameter in master.named_parameters():
                place, _, last = name.rpartition(".")
                if place in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj"):
                    own = nn.Parameter(parameter.detach().to(dtype))
                    self._own.append(own)
                    self._masters.append(parameter)
                else:
                    own = parameter
                setattr(block.get_submodule(place), last, own)

    @torch.no_grad()
    def cast(self) -> None:
        """Take the weights over, before a step."""
        torch._foreach_copy_(self._own, self._masters)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Give the gradients over, after each micro-batch."""
        for own, master in zip(self._own, self._masters, strict=True):
            assert own.grad is not None
            if master.grad is None:
                master.grad = own.grad.float()
            else:
                master.grad += own.grad
            own.grad = None


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
