"""Texts one behind the other, without padding: where the tokens of a padded batch stand in its packed form.

Everything that works on one token at a time (linear layers, norms, the LM head) computes N tokens in place of B·L.
Attention alone needs to know where a text ends.

Shapes: B sequences, L tokens of the longest, N tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The packed form of a padded batch.

    Attributes:
        index: int64 [N], position of each token in the flattened padded batch, in ascending order.
        starts: int32 [B + 1], where each text begins in the packed form; its last entry is N.
        mask: bool [B, L], true at tokens.
    """

    index: Tensor
    starts: Tensor
    mask: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor) -> Packing:
        """From a mask [B, L], true or 1 at tokens; the tokens of a text stand first, padding behind them."""
        mask = attention_mask.bool()
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        return cls(mask.flatten().nonzero().squeeze(1), starts, mask)

    @property
    def positions(self) -> Tensor:
        """Place of each token within its text, int64 [N]."""
        return self.index % self.mask.shape[1]

    @property
    def first(self) -> Tensor:
        """Where the first token of each text stands, int64 [B]; every text has one."""
        return self.starts[:-1].long()

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, …] -> [N, …]."""
        return padded.flatten(0, 1)[self.index]

    def pad(self, packed: Tensor) -> Tensor:
        """[N, …] -> [B, L, …], zeros at the padding."""
        rows = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return rows.index_copy(0, self.index, packed).unflatten(0, self.mask.shape)
