"""The maximum of `head.py` as one Triton kernel: logits live in registers and never reach memory.

A program takes one sequence and one tile of the vocabulary. It goes through the sequence's text tokens a block at a
time, multiplies them with the tile, adding in float32, and keeps the maximum and which token gave it. Programs are
independent of each other, so the result is the same every time. Programs that run side by side share a tile of the
matrix, which then comes from the cache.

Imported where it is asked for alone: Triton comes with torch on Linux with CUDA, and not everywhere else. With
`TRITON_INTERPRET=1` in the environment it computes on a CPU, slowly, for tests.

Shapes: B sequences, L text tokens of the longest, H hidden size, V vocabulary, R rows of tokens.
"""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = (torch.float16, torch.bfloat16, torch.float32)
_ENTRIES = 128  # of the vocabulary, in a tile
_SINCE = {torch.bfloat16: (8, 0)}  # compute capability; 7.0 for other types


@functools.cache
def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes products of this type in the kernel, which a small trial finds out; a warning says
    what went wrong."""
    if device.type != "cuda" or dtype not in TYPES:
        return False
    if torch.cuda.get_device_capability(device) < _SINCE.get(dtype, (7, 0)):
        return False
    try:
        return agrees(device, dtype)
    except Exception as error:  # of a compiler, a driver, a missing header: whatever keeps the kernel from running
        warnings.warn(f"the head's Triton form does not run on this GPU, torch's does its work: {error}", stacklevel=2)
        return False


def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel gives torch's maxima for a small batch."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 72, generator=generator).to(device, dtype) for n in (50, 150))
    source = torch.arange(50, device=device).view(2, 25)
    counts = torch.tensor([25, 7], device=device)
    best, where = tiled_max(hidden, weight, source, counts, dtype, True)
    logits = hidden.float() @ weight.float().t()
    expected = torch.stack([logits[:25].amax(0), logits[25:32].amax(0)])
    chosen = logits[source.gather(1, where.long()), torch.arange(150, device=device)]
    return all(torch.allclose(values, expected, atol=0.05, rtol=0.02) for values in (best, chosen))


def tiled_max(
    hidden: Tensor, weight: Tensor, source: Tensor, counts: Tensor, dtype: torch.dtype, needs_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Maximum over rows of `hidden @ weight.T`, products in `dtype`.

    Args:
        hidden: [R, H].
        weight: [V, H].
        source: int64 [B, L], the rows of each sequence, of which the first `counts` [B] take part.
        dtype: one of TYPES.
        needs_argmax: also find where each maximum comes from.

    Returns:
        [B, V] float32, -inf for a sequence without rows, NaN where a product is NaN; and the place in `source` of the
        first maximum, int16 or int32 [B, V], or None.
    """
    batch, length = source.shape
    vocabulary, width = weight.shape
    best = torch.empty(batch, vocabulary, dtype=torch.float32, device=hidden.device)
    index_type = torch.int16 if length < 2**15 else torch.int32
    where = torch.zeros(batch, vocabulary, dtype=index_type, device=hidden.device) if needs_argmax else None
    if batch and vocabulary:
        tokens = min(64, max(16, triton.next_power_of_2(length)))
        matrices = [tensor.to(dtype).contiguous() for tensor in (hidden, weight)]
        if not hidden.is_cuda and dtype == torch.bfloat16:  # the interpreter multiplies its bits; exact in float32
            matrices = [matrix.float() for matrix in matrices]
        modern = hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        _max_over_tokens[(batch, triton.cdiv(vocabulary, _ENTRIES))](
            *matrices, source.contiguous(), counts, best, best if where is None else where, vocabulary, width, length,
            tokens, _ENTRIES, 32 if dtype == torch.float32 else 64, needs_argmax, num_warps=4,
            num_stages=3 if modern else 2)
    return best, where


@triton.jit
def _max_over_tokens(hidden, weight, source, counts, best_out, where_out, vocabulary, width, length,
                     TOKENS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, FIND: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    known = entry < vocabulary
    count = tl.load(counts + sequence).to(tl.int32)
    best = tl.full([ENTRIES], float("-inf"), tl.float32)
    where = tl.zeros([ENTRIES], tl.int32)
    for start in range(0, count, TOKENS):
        place = start + tl.arange(0, TOKENS)
        text = place < count
        row = tl.load(source + sequence * length + place, mask=text, other=0)
        logits = tl.zeros([TOKENS, ENTRIES], tl.float32)
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            inside = column < width
            left = tl.load(hidden + row[:, None] * width + column[None, :], mask=text[:, None] & inside[None, :],
                           other=0.0)
            right = tl.load(weight + entry[None, :].to(tl.int64) * width + column[:, None],
                            mask=known[None, :] & inside[:, None], other=0.0)
            logits = tl.dot(left, right, logits, input_precision="ieee")
        logits = tl.where(text[:, None], logits, float("-inf"))
        broken = tl.max((logits != logits).to(tl.int32), axis=0) > 0
        largest, index = tl.max(logits, axis=0, return_indices=True)
        largest = tl.where(broken, float("nan"), largest)
        better = (largest > best) | broken
        best = tl.where(better, largest, best)
        where = tl.where(better, start + index, where)
    target = sequence * vocabulary + entry
    tl.store(best_out + target, best, mask=known)
    if FIND:
        tl.store(where_out + target, where.to(where_out.dtype.element_ty), mask=known)
