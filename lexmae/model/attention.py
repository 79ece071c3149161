"""Attention among the tokens of each text of a packed batch.

Two forms of one function. Flash attention reads packed texts as they are, with dropout and windows; it needs a GPU and
half precision. Else queries, keys and values alone are padded for the usual attention, on any device and in any
precision; everything around it stays packed.

Flash attention is the operator of torch that stands behind its `varlen_attn` and behind attention of nested tensors.
The first of these knows no dropout, the second no windows, and both cost the host milliseconds for each layer.

Backbones call it through transformers' table of attention functions, under the name `PACKED`.

Shapes: N tokens of all texts, A heads, D their size, H hidden size, B texts, L tokens of the longest.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lexmae.model.packing import Packing

PACKED = "lexmae_packed"  # what a model that computes packed batches has for its attention
HALF = (torch.float16, torch.bfloat16)
_FLASH_SINCE = (8, 0)  # compute capability
_FLASH_HEAD = 256  # largest D


_failed: set[torch.dtype] = set()  # in which `try_out` has found flash attention not to work here


def use_packing(lm: PreTrainedModel) -> None:
    """Let a model compute batches without their padding, where `packing` says how."""
    if torch.cuda.is_available():
        config, gpu = lm.config, torch.device("cuda", torch.cuda.current_device())
        size = config.hidden_size // config.num_attention_heads
        if _has_flash(gpu, size):
            try_out(gpu, size, any(windows(lm)))
    lm.set_attn_implementation(PACKED)


def packing(lm: PreTrainedModel, attention_mask: Tensor) -> Packing | None:
    """The packed form of a batch with this mask [B, L], if the model computes packed batches."""
    return Packing.of(attention_mask) if lm.config._attn_implementation == PACKED else None


def run_packed(lm: PreTrainedModel, packing: Packing, **inputs: Tensor) -> Tensor:
    """Last hidden states [N, H] of a model's packed inputs, all [1, N, …]."""
    return lm.base_model(**inputs, attention_mask=None, packing=packing).last_hidden_state.squeeze(0)


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None = None,
           dropout: float = 0.0, window: int | None = None) -> Tensor:
    """Softmax attention within each text, [N, A, D] of each kind -> [N, A, D].

    Args:
        packing: where texts begin.
        scale: of the products; 1/sqrt(D) where it is None.
        dropout: share of the weights that are dropped.
        window: a token sees others at most this far away; all of its text where it is None.
    """
    return _FORMS[choose(query)](query, key, value, packing, scale, dropout, window)


def choose(query: Tensor) -> str:
    """`flash` or `padded`, for queries [N, A, D] on their device and in their type."""
    usable = query.dtype in HALF and query.dtype not in _failed
    return "flash" if usable and _has_flash(query.device, query.shape[-1]) else "padded"


def _has_flash(device: torch.device, size: int) -> bool:
    """Whether torch has flash attention for heads of this size on a device."""
    fits = size <= _FLASH_HEAD and not size % 8
    return device.type == "cuda" and fits and torch.cuda.get_device_capability(device) >= _FLASH_SINCE


def try_out(device: torch.device, size: int, limited: bool, dtypes: tuple[torch.dtype, ...] = HALF) -> None:
    """Compute a small batch with flash attention, forward and backward; where that fails or differs it is not chosen
    from then on, and a warning says so: its operator is not part of what torch promises, and kernels depend on the GPU.

    Args:
        size: of a head.
        limited: whether some layers have windows.
    """
    for dtype in dtypes:
        try:
            agree = all(_agrees(device, size, dtype, reach) for reach in ((None, 2) if limited else (None,)))
            reason = "" if agree and _drops_alike(device, size, dtype) else "other values"
        except Exception as error:  # of a missing operator, kernel or driver: whatever keeps it from running
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if reason:
            _failed.add(dtype)
            warnings.warn(f"packed texts are computed without flash attention in {dtype}: {reason}", stacklevel=2)


def _trial(device: torch.device, size: int, dtype: torch.dtype) -> tuple[list[Tensor], Packing]:
    generator = torch.Generator().manual_seed(0)
    packing = Packing.of((torch.arange(24) < torch.tensor([[24], [5], [17]])).to(device))
    return [torch.randn(len(packing.index), 2, size, generator=generator).to(device, dtype).requires_grad_()
            for _ in range(3)], packing


def _agrees(device: torch.device, size: int, dtype: torch.dtype, window: int | None) -> bool:
    """Whether flash attention gives the values and gradients of the padded form."""
    leaves, packing = _trial(device, size, dtype)
    results = []
    with torch.enable_grad():
        for form in ("flash", "padded"):
            out = _FORMS[form](*leaves, packing, None, 0.0, window)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    return all(torch.allclose(one.float(), other.float(), atol=0.1, rtol=0.05)
               for one, other in zip(*results, strict=True))


def _drops_alike(device: torch.device, size: int, dtype: torch.dtype) -> bool:
    """Whether the backward pass of flash attention drops the weights that the forward pass has dropped.

    Its result is linear in the values V, so that the sum of V · gradient is twice that of result², whatever is dropped.
    """
    leaves, packing = _trial(device, size, dtype)
    with torch.enable_grad():
        out = _FORMS["flash"](*leaves, packing, None, 0.5, None).float()
        gradient, = torch.autograd.grad(out.square().sum(), leaves[2:])
    found, expected = (leaves[2].detach().float() * gradient.float()).sum(), 2 * out.detach().square().sum()
    return torch.allclose(found, expected, rtol=0.05)


def windows(lm: PreTrainedModel) -> list[int | None]:
    """How far a token sees in each layer of a transformers model, None for all of its text; in no order."""
    reaches = [getattr(module, "sliding_window", None) for module in lm.base_model.modules()]
    limited = [reach - 1 for reach in reaches if reach is not None]  # layers count the token itself
    return [*limited, *[None] * (lm.config.num_hidden_layers - len(limited))]


def _flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, dropout: float,
           window: int | None) -> Tensor:
    longest = packing.mask.shape[1]
    return torch.ops.aten._flash_attention_forward(
        query, key, value, packing.starts, packing.starts, longest, longest, dropout, False, False, scale=scale,
        window_size_left=window, window_size_right=window)[0]


def _padded(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, dropout: float,
            window: int | None) -> Tensor:
    seen = packing.mask[:, None, None, :]  # [B, 1, 1, L]
    if window is not None:
        place = torch.arange(packing.mask.shape[1], device=query.device)
        near = (place[:, None] - place[None, :]).abs() <= window
        seen = (seen & near) | torch.eye(len(place), dtype=torch.bool, device=query.device)  # no row sees nothing
    padded = [packing.pad(each).transpose(1, 2) for each in (query, key, value)]  # [B, A, L, D]
    out = F.scaled_dot_product_attention(*padded, attn_mask=seen, dropout_p=dropout, scale=scale)
    return packing.pack(out.transpose(1, 2))


_FORMS = {"flash": _flash, "padded": _padded}


def _layer_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
                     packing: Packing | None = None, **kw: Any) -> tuple[Tensor, None]:
    """What a layer calls, with heads [B, A, L, D], or [1, A, N, D] where there is a packing: a result [B, L, A, D]."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw)
    heads = (each.squeeze(0).transpose(0, 1) for each in (query, key, value))
    window = None if sliding_window is None else sliding_window - 1  # layers count the token itself
    return attend(*heads, packing, scaling, dropout, window).unsqueeze(0), None


def _layer_mask(attention_mask: Tensor | None = None, **kw: Any) -> Tensor | None:
    """The mask of a padded batch; a packed one has none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kw)


AttentionInterface.register(PACKED, _layer_attention)
AttentionMaskInterface.register(PACKED, _layer_mask)
