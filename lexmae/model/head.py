"""Fused LM head and max-pool: the maximum over text tokens of `hidden @ weight.T + bias`.

Three forms of one function. `reference` writes the logits out. `chunked` computes them tile by tile, small
enough to stay in a cache, and keeps the maximum and the token that gave it. `triton` does the same in one kernel
on a GPU (`head_triton`). Only that token has a gradient, so the backward touches one token per (sequence, entry)
and only the entries whose gradient is not zero: a few hundred per sequence for the saturated lexicon, instead of
the whole vocabulary.

Shapes: B sequences, L tokens, H hidden size, V vocabulary, N text tokens of a group of sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmae.errors import InputError
from lexmae.model.lexicon import max_pool
from lexmae.model.packing import Packing

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")

TILES = {"cpu": (1024, 512), "cuda": (16384, 8192)}
"""Tokens and vocabulary entries of a tile: 2 MiB of float32 for a CPU's cache, large products for a GPU."""


def max_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, text_mask: Tensor, implementation: str = "auto",
    packing: Packing | None = None,
) -> Tensor:  # fmt: skip
    """Masked maximum of the logits.

    Args:
        hidden: [B, L, H] outputs of the LM-head transform, or [N, H] where there is a packing.
        weight, bias: the output matrix [V, H] and its bias [V] or None.
        text_mask: [B, L], true at text tokens (neither special nor padding).
        implementation: one of IMPLEMENTATIONS; `auto` is `triton` where that runs, and else `chunked`.
        packing: where the rows of packed `hidden` stand in the batch.

    Returns:
        [B, V] float32 (float64 for float64 input); zeros without a gradient for a sequence without text
        tokens. Of equal maxima one token gets the gradient. Products run in the autocast type where autocast
        is on.
    """
    mask, dtype = text_mask.bool(), matmul_dtype(hidden)
    form = choose_implementation(implementation, hidden.device, dtype)
    if form == "reference":
        padded = hidden if packing is None else packing.pad(hidden)
        return max_pool(F.linear(padded, weight, bias), mask)
    starts = torch.arange(len(mask), device=mask.device) * mask.shape[1] if packing is None else packing.first
    tiled_max = _tiled_max if form == "chunked" else _triton().tiled_max
    return _FusedMax.apply(hidden.flatten(0, -2), weight, bias, mask, starts, dtype, torch.is_grad_enabled(), tiled_max)


def choose_implementation(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """One of IMPLEMENTATIONS -> `reference`, `chunked` or `triton`, for products of this type on this device.

    Raises:
        InputError: an unknown name, or `triton` where it is not installed or does not know the type.
    """
    if name not in IMPLEMENTATIONS:
        raise InputError(f"unknown head {name!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if name == "auto":
        usable = device.type == "cuda" and _triton() is not None and _triton().runs_on(device, dtype)
        return "triton" if usable else "chunked"
    if name == "triton" and (_triton() is None or dtype not in _triton().TYPES):
        reason = "Triton is not installed" if _triton() is None else f"Triton's form does not compute {dtype}"
        raise InputError(f"head 'triton': {reason}")
    return name


@functools.cache
def _triton() -> Any:
    """The module with the Triton form, None where Triton is missing."""
    try:
        from lexmae.model import head_triton
    except ImportError:
        return None
    return head_triton


def matmul_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which a product of `tensor` runs here: autocast's, where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def without_autocast(method: Any) -> Any:
    """For the methods of an autograd function that chooses its own types, in the backward too."""

    @functools.wraps(method)
    def wrapped(ctx: Any, first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapped


class _FusedMax(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, hidden, weight, bias, text_mask, starts, dtype, grad_enabled, tiled_max):
        source, counts = _text_tokens(text_mask, starts)
        needs_argmax = grad_enabled and any(ctx.needs_input_grad)
        pooled, winner = tiled_max(hidden, weight, source, counts, dtype, needs_argmax)
        if bias is not None:
            pooled += bias.to(pooled.dtype)
        empty = (counts == 0).unsqueeze(1)
        pooled.masked_fill_(empty, 0.0)
        if needs_argmax:
            ctx.save_for_backward(hidden, weight, winner, source, empty)
            ctx.bias_dtype = None if bias is None else bias.dtype
        return pooled

    @staticmethod
    @without_autocast
    def backward(ctx, grad):
        hidden, weight, winner, source, empty = ctx.saved_tensors
        grad = grad.masked_fill(empty, 0.0)  # [B, V]
        entry, sequence = grad.t().nonzero(as_tuple=True)  # in the order of the vocabulary
        value = grad[sequence, entry]
        token = source[sequence, winner[sequence, entry].long()]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = d_weight = d_bias = None
        if need_weight:
            d_weight = _weighted_sums(hidden, token, value, entry, weight.shape[0])
            d_weight = d_weight.to(weight.dtype)
        if need_hidden:
            order = token.argsort(stable=True)
            d_hidden = _weighted_sums(weight, entry[order], value[order], token[order], len(hidden))
            d_hidden = d_hidden.to(hidden.dtype)
        if need_bias:
            d_bias = grad.sum(0).to(ctx.bias_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _text_tokens(text_mask: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of each sequence's text tokens, first ones first, and their counts: [B, L], [B].

    Sequences begin at the rows `starts` [B]. What is left over is filled up with a sequence's own first text token,
    which leaves a maximum as it is and needs no mask.
    """
    counts = text_mask.sum(1)
    order = text_mask.int().argsort(dim=1, descending=True, stable=True)
    filler = torch.arange(order.shape[1], device=order.device) >= counts.unsqueeze(1)
    return starts.unsqueeze(1) + torch.where(filler, order[:, :1], order), counts


def _groups(counts: Tensor, tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Sequences of similar length, as (row indices, longest text), about `tokens` tokens in each group."""
    order = counts.argsort(descending=True)
    lengths = counts[order].tolist()
    start = 0
    while start < len(lengths) and lengths[start] > 0:
        size = max(1, tokens // lengths[start])
        rows = order[start : start + size]
        yield rows, lengths[start]
        start += size


def _tiled_max(
    hidden: Tensor, weight: Tensor, source: Tensor, counts: Tensor, dtype: torch.dtype, needs_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Maximum over the rows `source` [B, L] of hidden, [B, V], and the place in `source` that gave it (int16 or int32,
    [B, V])."""
    batch, length = source.shape
    width, vocabulary = hidden.shape[1], weight.shape[0]
    tokens, entries = TILES["cpu" if hidden.device.type == "cpu" else "cuda"]
    pooled = hidden.new_zeros(batch, vocabulary, dtype=torch.promote_types(dtype, torch.float32))
    index_type = torch.int16 if length < 2**15 else torch.int32
    winner = hidden.new_zeros(batch, vocabulary, dtype=index_type) if needs_argmax else None
    for rows, longest in _groups(counts, tokens):
        text = hidden[source[rows, :longest]].to(dtype).view(-1, width)  # [N, H]
        best = text.new_empty(len(rows), vocabulary)
        where = best.new_empty(best.shape, dtype=index_type) if needs_argmax else None
        for start in range(0, vocabulary, entries):
            tile = slice(start, start + entries)
            logits = (text @ weight[tile].to(dtype).t()).view(len(rows), longest, -1)
            _max_of_tile(logits, best[:, tile], None if where is None else where[:, tile])
        pooled[rows] = best.to(pooled.dtype)
        if winner is not None:
            winner[rows] = where
    return pooled, winner


def _max_of_tile(logits: Tensor, best: Tensor, where: Tensor | None) -> None:
    """Write the maximum of [n, l, v] over l into `best` and its index into `where`, both [n, v]."""
    if where is None:
        torch.amax(logits, dim=1, out=best)
    elif logits.is_cuda:
        values, index = logits.max(dim=1)
        best.copy_(values)
        where.copy_(index)
    else:  # a CPU computes amax, comparison and product in vector instructions, max with indices not
        torch.amax(logits, dim=1, out=best)
        positions = torch.arange(logits.shape[1], dtype=where.dtype).view(1, -1, 1)
        hits = torch.empty(logits.shape, dtype=where.dtype)
        torch.eq(logits, best.unsqueeze(1), out=hits)
        torch.amax(hits.mul_(positions), dim=1, out=where)


def _weighted_sums(table: Tensor, index: Tensor, value: Tensor, bag: Tensor, n_bags: int) -> Tensor:
    """Row n: the sum of value[i] · table[index[i]] over all i with bag[i] = n, in the type of `value`.

    `bag` is sorted; [n_bags, H].
    """
    offsets = torch.searchsorted(bag, torch.arange(n_bags, device=bag.device))
    return F.embedding_bag(index, table.to(value.dtype), offsets, mode="sum", per_sample_weights=value)
