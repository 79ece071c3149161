"""How the logits of a text's tokens become one vector: this project's rule, and the rules of other sparse encoders.

Shapes: B sequences, L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lexmae.errors import InputError
from lexmae.model import lexicon
from lexmae.model.head import max_logits
from lexmae.model.packing import Packing

STRATEGIES = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
_TILE = 1 << 24  # logits that `sum` holds at a time


@dataclass(frozen=True)
class Pooling:
    """A rule; the default is SPEC §2.

    Attributes:
        strategy: `max` over the tokens, or the `sum` of the first SPLADE (Formal et al., SIGIR 2021).
        activation: of each logit: `relu` is log(1 + relu(x)); `log1p_relu` takes log(1 + …) of that once more
            (arXiv 2504.14839).
        skipped: ids of tokens that take no part; every other token that is not padding does. None: text tokens alone
            take part, as `text_mask` says.
        top_k: only so many of the largest entries of a vector are kept.
    """

    strategy: str = "max"
    activation: str = "relu"
    skipped: tuple[int, ...] | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.strategy, STRATEGIES), (self.activation, ACTIVATIONS)):
            if value not in known:
                raise InputError(f"unknown pooling {value!r}; known are {', '.join(known)}")

    def mask(self, input_ids: Tensor, attention_mask: Tensor, text_mask: Tensor) -> Tensor:
        """Which tokens take part, bool [B, L]."""
        if self.skipped is None:
            return text_mask.bool()
        skipped = torch.tensor(self.skipped, dtype=input_ids.dtype, device=input_ids.device)
        return attention_mask.bool() & ~torch.isin(input_ids, skipped)

    def __call__(self, features: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, head: str,
                 packing: Packing | None = None) -> Tensor:
        """Vectors [B, V] float32.

        Args:
            features: [B, L, H] outputs of the LM-head transform, or [N, H] where there is a packing.
            weight, bias: the output matrix [V, H] and its bias [V] or None.
            mask: [B, L], true at the tokens that take part.
            head: form of the pooled head, see `head.max_logits`.
        """
        if self.strategy == "max":  # monotone activations may follow the max
            values = self._activate(max_logits(features, weight, bias, mask, head, packing))
        else:
            values = self._sum(features if packing is None else packing.pad(features), weight, bias, mask)
        return values if self.top_k is None else lexicon.top_k(values, self.top_k)

    def _activate(self, logits: Tensor) -> Tensor:
        values = lexicon.saturate(logits)
        return values if self.activation == "relu" else torch.log1p(values)

    def _sum(self, features: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
        """Sum of the activated logits over the tokens, in tiles of the vocabulary."""
        entries = max(1, _TILE // max(1, mask.numel()))
        kept = mask.unsqueeze(-1)
        tiles = []
        for start in range(0, weight.shape[0], entries):
            part = slice(start, start + entries)
            logits = F.linear(features, weight[part], None if bias is None else bias[part])  # [B, L, entries]
            tiles.append((self._activate(logits) * kept).sum(1))
        return torch.cat(tiles, dim=1)
