"""Attention among the tokens of each text of a packed batch.

Three forms of one function. Flash attention reads packed texts as they are: without dropout through torch's
`varlen_attn`, which knows windows, and with dropout through nested tensors, which do not. Both need a GPU and half
precision. Else queries, keys and values alone are padded for the usual attention, on any device and in any precision;
everything around it stays packed.

Backbones call it through transformers' table of attention functions, under the name `PACKED`.

Shapes: N tokens of all texts, A heads, D their size, B texts, L tokens of the longest.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lexmae.model.packing import Packing

PACKED = "lexmae_packed"
_FLASH_SINCE = (8, 0)  # compute capability
_FLASH_HEAD = 256  # largest D


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None = None,
           dropout: float = 0.0, window: int | None = None) -> Tensor:
    """Softmax attention within each text, [N, A, D] of each kind -> [N, A, D].

    Args:
        packing: where texts begin.
        scale: of the products; 1/sqrt(D) where it is None.
        dropout: share of the weights that are dropped.
        window: a token sees others at most this far away; all of its text where it is None.
    """
    form = choose(query, dropout, window)
    if form == "varlen":
        return _varlen(query, key, value, packing, scale, window)
    return (_nested if form == "nested" else _padded)(query, key, value, packing, scale, dropout, window)


def choose(query: Tensor, dropout: float, window: int | None) -> str:
    """`varlen`, `nested` or `padded`, for queries [N, A, D] on their device and in their type."""
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= _FLASH_HEAD and not query.shape[-1] % 8
    if not (query.is_cuda and fits and torch.cuda.get_device_capability(query.device) >= _FLASH_SINCE):
        return "padded"
    if not dropout and _find_varlen() is not None:
        return "varlen"
    return "nested" if window is None else "padded"


def windows(lm: nn.Module) -> list[int | None]:
    """How far a token sees in each layer of a transformers model, None for all of its text; in no order."""
    reaches = [getattr(module, "sliding_window", None) for module in lm.base_model.modules()]
    limited = [reach - 1 for reach in reaches if reach is not None]  # layers count the token itself
    return [*limited, *[None] * (lm.config.num_hidden_layers - len(limited))]


def _find_varlen():
    """torch's variable-length attention, which is newer than the oldest torch that this project takes."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None,
            window: int | None) -> Tensor:
    longest, reach = packing.mask.shape[1], -1 if window is None else window
    return _find_varlen()(query, key, value, packing.starts, packing.starts, longest, longest, scale=scale,
                          window_size=(reach, reach))


def _nested(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, dropout: float,
            window: None = None) -> Tensor:
    jagged = [torch.nested.nested_tensor_from_jagged(each.contiguous(), packing.starts.long(), min_seqlen=1,
                                                     max_seqlen=packing.mask.shape[1]).transpose(1, 2)
              for each in (query, key, value)]
    return F.scaled_dot_product_attention(*jagged, dropout_p=dropout, scale=scale).transpose(1, 2).values()


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
