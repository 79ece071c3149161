"""Fused LM head and cross entropy: the masked-LM loss of labelled rows, without all their logits at once.

`chunked` makes the logits of a few rows at a time and turns them into their own gradient at once, while they are in a
cache: it needs neither the [M, V] logits nor a second pass over them. `reference` writes the logits out.

Shapes: M labelled rows, H hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmae.model.head import choose_implementation, matmul_dtype, without_autocast

ROWS = {"cpu": 256, "cuda": 4096}
"""Rows of a chunk: few for a CPU's cache, many for a GPU, enough to pay for adding up the matrix's gradient."""
_LOGITS = 1 << 27
"""Most logits of a chunk, about 1 GB with their copies: a vocabulary of 250,000 would take eight times that."""


def cross_entropy_sum(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of `rows @ weight.T + bias`.

    Args:
        rows: [M, H] outputs of the LM-head transform.
        weight, bias: the output matrix [V, H] and its bias [V] or None.
        targets: [M] ids.
        implementation: as in `head.max_logits`; every form but `reference` is `chunked` here.

    Returns:
        The sum, and the number of rows whose target has the largest logit: float32 scalars (float64 for float64
        input), 0 for no rows. Products run in the autocast type where autocast is on, the rest in float32.
    """
    if choose_implementation(implementation, rows.device, matmul_dtype(rows)) == "reference":
        logits = F.linear(rows, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        correct = _hits(logits.detach(), targets.unsqueeze(1)).sum().to(logits.dtype)
        return F.cross_entropy(logits, targets, reduction="sum"), correct
    return _ChunkedLoss.apply(rows, weight, bias, targets, matmul_dtype(rows), torch.is_grad_enabled())


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Where the target's logit is the largest: [C, V], [C, 1] -> [C, 1]."""
    return logits.gather(1, targets) >= logits.amax(1, keepdim=True)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, rows, weight, bias, targets, dtype, grad_enabled):
        real = torch.promote_types(dtype, torch.float32)
        loss, correct = rows.new_zeros((), dtype=real), rows.new_zeros((), dtype=real)
        gradients = None
        if grad_enabled and any(ctx.needs_input_grad):
            shapes = (rows.shape, weight.shape, weight.shape[:1])
            gradients = [rows.new_zeros(shape, dtype=real) for shape in shapes]
        low, matrix = rows.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(real)
        size = max(1, min(ROWS["cpu" if rows.device.type == "cpu" else "cuda"], _LOGITS // matrix.shape[0]))
        for start in range(0, rows.shape[0], size):
            chunk = slice(start, start + size)
            logits = (low[chunk] @ matrix.t()).to(real)  # [C, V]
            if offset is not None:
                logits += offset
            target = targets[chunk].unsqueeze(1)
            correct += _hits(logits, target).sum()
            loss += _to_gradient(logits, target)
            if gradients is not None:
                _accumulate(gradients, chunk, logits, low[chunk], matrix)
        if gradients is not None:
            ctx.save_for_backward(*gradients)
            ctx.dtypes = [rows.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @without_autocast
    def backward(ctx, grad, _):
        wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *[(saved * grad).to(dtype) if need else None for saved, dtype, need in wanted], None, None, None


def _to_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of the cross entropies of logits [C, V] with ids [C, 1]; the logits become its gradient, in place."""
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, target) - largest
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.div_(total).scatter_add_(1, target, torch.full_like(chosen, -1.0))
    return (total.log() - chosen).sum()


def _accumulate(gradients: list[Tensor], chunk: slice, slope: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add what `slope` [C, V], the gradient of the logits, gives for rows, weight and bias.

    It lies within [-1, 1] whatever the loss is scaled by later, which half precision can hold.
    """
    d_rows, d_weight, d_bias = gradients
    d_bias += slope.sum(0)
    low = slope.to(rows.dtype)
    d_rows[chunk] = low @ weight
    if low.dtype == d_weight.dtype:
        d_weight.addmm_(low.t(), rows)
    else:
        d_weight += low.t() @ rows
