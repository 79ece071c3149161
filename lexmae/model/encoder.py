"""The lexicon encoder: texts to sparse vectors over the vocabulary (SPEC §2), saved as a Hugging Face folder.

The folder loads with `AutoModelForMaskedLM`, and with sentence-transformers' `SparseEncoder`, which gives
the same vectors: a mask module between its transformer and its SPLADE pooling keeps special tokens out of
the maximum.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lexmae.checked import LOADING_ERRORS
from lexmae.errors import InputError
from lexmae.model import attention, backbone, foreign
from lexmae.model.pooling import Pooling

_MASK, _POOLING = "1_MultiVectorMask", "2_SpladePooling"
MODULES = {
    "": "base.modules.transformer.Transformer",
    _MASK: "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    _POOLING: "sparse_encoder.modules.splade_pooling.SpladePooling",
}
"""Folder of each of sentence-transformers' modules, in order, and its class."""


class SparseEncoder(nn.Module):
    """v = log(1 + max over text tokens of relu(logits)), one encoder for queries and documents.

    Args:
        lm: the masked language model; its LM head gives the logits.
        head: implementation of the pooled head, see `head.max_logits`.
        pooling: the rule of a model that others made; the default is the one above.
    """

    def __init__(self, lm: PreTrainedModel, head: str = "auto", pooling: Pooling | None = None):
        super().__init__()
        self.lm = lm
        self.head = head
        self.pooling = pooling or Pooling()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Vectors [B, V] float32 of a padded batch, whose arguments are all [B, L].

        `text_mask` is true at text tokens, neither special nor padding; a text without any gives zeros.
        """
        packing = attention.packing(self.lm, attention_mask)
        hidden = backbone.hidden_states(self.lm, input_ids, attention_mask, token_type_ids, packing)
        features = backbone.transform(self.lm, hidden)  # [B, L, H] or [N, H]
        weight, bias = backbone.output_matrix(self.lm)
        mask = self.pooling.mask(input_ids, attention_mask, text_mask)
        return self.pooling(features, weight, bias, mask, self.head, packing)

    def save(self, folder: str | Path, tokenizer_dir: str | Path | None = None) -> None:
        """Write the model as `save_masked_lm` does."""
        save_masked_lm(self.lm, folder, tokenizer_dir)

    @classmethod
    def load(cls, init: str | Path, head: str = "auto", side: str = "docs", **kw: Any) -> nn.Module:
        """The encoder of a folder or a hub name: one of ours, or what `foreign` says it is.

        Args:
            side: `docs` or `queries`; it matters to folders that encode the two in different ways. The queries of some
                need no model: then this gives a `StaticEncoder`, called in the same way.
            kw: see `backbone.load_masked_lm`, there also for errors.
        """
        chosen = foreign.plan(init, side)
        if chosen.table is not None:
            return foreign.load_static(chosen)
        return cls(backbone.load_masked_lm(chosen.init, chosen.subfolder, **kw), head, chosen.pooling)


def save_masked_lm(
    lm: PreTrainedModel,
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder with safetensors.

    Args:
        lm: the masked language model.
        folder: where to; made when missing.
        tokenizer_dir: a tokenizer's folder, which is copied; sentence-transformers' files are added with it.
        state_dict: replaces `lm`'s own, for weights gathered from several ranks; same keys.
    """
    folder = Path(folder)
    backbone.save_weights(lm, folder, state_dict)
    if tokenizer_dir is not None:
        tokenizer = load_tokenizer(tokenizer_dir)
        tokenizer.save_pretrained(folder)
        _write_peer_files(folder, tokenizer, lm.config.vocab_size)


def _write_peer_files(folder: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """`modules.json` and what it names: transformer, mask of special tokens, SPLADE max pooling."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "6.2.0", "transformers": transformers.__version__},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    )
    write_json(folder / "sentence_bert_config.json", {"transformer_task": "fill-mask"})
    write_json(
        folder / _MASK / "config.json",
        {
            "skiplist_words": structural_tokens(tokenizer),
            "skiplist_tasks": ["query", "document"],
            "keep_only_token_ids": None,
        },
    )
    write_json(
        folder / _POOLING / "config.json",
        {"pooling_strategy": "max", "activation_function": "relu", "embedding_dimension": vocabulary},
    )


def structural_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's special tokens that are never text: all but the unknown token."""
    return sorted(set(tokenizer.all_special_tokens) - {tokenizer.unk_token})


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from its folder; InputError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise InputError("cannot load a tokenizer from here", path=folder) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
