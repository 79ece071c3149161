"""Tiny randomly initialised backbones and batches for tests. Sizes are the config's own names, dropout is off."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lexmae.model import backbone

VOCAB = 60
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
STRUCTURAL = (0, 2, 3, 4)
_COMMON = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
_BERT = {
    **_COMMON, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
SIZES = {
    "bert": _BERT,
    "distilbert": {
        "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 24,
        "dropout": 0.0, "attention_dropout": 0.0,
    },
    "roberta": {**_BERT, "type_vocab_size": 1},
    "xlm-roberta": {**_BERT, "type_vocab_size": 1},
    "modernbert": {**_COMMON, "max_position_embeddings": 24, "local_attention": 4},
}


def tiny(architecture: str = "bert", seed: int = 0, scale: float = 0.3, special=SPECIAL, **size) -> PreTrainedModel:
    """A model in eval mode whose matrices and biases are large enough for logits far apart."""
    torch.manual_seed(seed)
    lm = backbone.create_masked_lm(architecture, VOCAB, special, {**SIZES[architecture], **size})
    for name, parameter in lm.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=scale)
    return lm.eval()


def batch(seed: int = 0, lengths: tuple[int, ...] = (12, 9, 5), pad: int = SPECIAL["pad"]) -> dict[str, torch.Tensor]:
    """`[CLS] text [SEP] text [SEP] [PAD]…` as `input_ids`, `attention_mask`, `text_mask`, `token_type_ids`."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    ids = torch.randint(5, VOCAB, size, generator=generator)
    length = torch.tensor(lengths).unsqueeze(1)
    column = torch.arange(size[1])
    ids[:, 0] = SPECIAL["cls"]
    ids[:, 2] = SPECIAL["sep"]
    ids = torch.where(column == length - 1, SPECIAL["sep"], ids)
    attention = (column < length).long()
    ids = torch.where(attention.bool(), ids, pad)
    text = attention.bool() & (column != 0) & (column != 2) & (column != length - 1)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "text_mask": text,
        "token_type_ids": ((column > 2) & attention.bool()).long(),
    }


def masked(inputs: dict[str, torch.Tensor], seed: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with a share of the text tokens (one at least) replaced by [MASK], and their labels (-100 elsewhere)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = inputs["text_mask"] & (torch.rand(inputs["input_ids"].shape, generator=generator) < share)
    chosen |= inputs["text_mask"] & (inputs["text_mask"].cumsum(1) == 1)
    ids = inputs["input_ids"]
    return torch.where(chosen, SPECIAL["mask"], ids), torch.where(chosen, ids, -100)
