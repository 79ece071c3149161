"""Queries without a model: a learned weight for every token, so that encoding a query is a look-up.

    q_v = softplus(raw_v) where token v is in the query's text, else 0

Documents keep their encoder, and expand; the table is trained together with it and starts as BM25's inverse document
frequency. A weight never reaches 0 by training, so no token loses its gradient; one below 0.005 disappears when
vectors are rounded. This is the query side of SPLADE-doc (Lassance and Clinchant 2022) with learned weights.

A model folder with such a table holds `query_weights.safetensors` beside the documents' encoder, and files with which
sentence-transformers' `SparseEncoder` routes `encode_query` through the table and `encode_document` through the
encoder.

Shapes: B queries, L tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from lexmae.errors import InputError
from lexmae.model import encoder, foreign

TABLE = foreign.QUERY_WEIGHTS
_ROUTE = "0_StaticQueries"
_LEAST = 0.01  # the smallest weight to start from: one step of the rounding, and a gradient that is not lost


class StaticQueries(nn.Module):
    """A weight per token.

    Args:
        weights: [V], positive; those below 1e-6 become 1e-6.
    """

    def __init__(self, weights: Tensor):
        super().__init__()
        weights = weights.float().clamp_min(1e-6)
        self.raw = nn.Parameter(weights + torch.log(-torch.expm1(-weights)))  # softplus of it gives the weights

    def forward(self, input_ids: Tensor, text_mask: Tensor, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None) -> Tensor:
        """Vectors [B, V] float32; ids and text mask are [B, L], the rest is there for the encoders' sake.

        A token that stands in a query several times counts once.
        """
        with torch.autocast(input_ids.device.type, enabled=False):
            found = torch.zeros(len(input_ids), len(self.raw), device=input_ids.device)
            found.scatter_add_(1, input_ids, text_mask.float())
            return found.clamp(max=1) * F.softplus(self.raw.float())


def holds_table(folder: str | Path) -> bool:
    """Whether a model folder makes its queries' vectors from a table."""
    return (Path(folder) / TABLE).is_file()


def read_table(folder: str | Path) -> Tensor:
    """The weights [V] float32 of a model folder; InputError where there are none."""
    path = Path(folder) / TABLE
    if not path.is_file():
        raise InputError("no such table of query weights", path)
    return foreign.stored_weights(path)


def inverse_document_frequency(document_frequency: Tensor, documents: int, size: int) -> Tensor:
    """Weights [size] to start from: BM25's ``log(1 + (N − df + 0.5) / (df + 0.5))``, at least 0.01.

    Args:
        document_frequency: [≤ size], documents that hold each token; tokens beyond it count as unseen.
        documents: number of documents N.
    """
    df = torch.zeros(size)
    df[:len(document_frequency)] = document_frequency.float()
    return torch.log1p((documents - df + 0.5) / (df + 0.5)).clamp_min(_LEAST)


def save_table(folder: str | Path, raw: Tensor, tokenizer_dir: str | Path, query_length: int) -> bool:
    """Add a table to a model folder that `save_masked_lm` wrote, with sentence-transformers' files for it.

    Args:
        raw: parameter [V] of a `StaticQueries`.
        query_length: tokens of a query, special tokens included.

    Returns:
        whether sentence-transformers can load the folder: its table must be as long as the tokenizer's vocabulary.
        Where it is not, the folder has no `modules.json`, rather than one that encodes queries in another way.
    """
    folder = Path(folder)
    tokenizer = encoder.load_tokenizer(tokenizer_dir)
    weights = F.softplus(raw.detach().float().cpu())
    weights[tokenizer.convert_tokens_to_ids(encoder.structural_tokens(tokenizer))] = 0.0  # they are never text
    save_file({"weight": weights}, folder / TABLE)
    if len(tokenizer.get_vocab()) != len(weights):
        (folder / "modules.json").unlink()
        return False
    route = folder / _ROUTE
    route.mkdir(exist_ok=True)
    tokenizer.model_max_length = query_length - tokenizer.num_special_tokens_to_add()
    tokenizer.save_pretrained(route)
    save_file({"weight": weights}, route / "model.safetensors")
    encoder.write_json(route / "config.json", {"frozen": False})
    _write_router(folder)
    return True


def _write_router(folder: Path) -> None:
    """`modules.json` with one module that sends queries to the table and documents to the encoder's modules."""
    document = {path or ".": f"sentence_transformers.{kind}" for path, kind in encoder.MODULES.items()}
    query = {_ROUTE: "sentence_transformers.sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding"}
    encoder.write_json(folder / "router_config.json", {
        "types": query | document,
        "structure": {"query": list(query), "document": list(document)},
        "parameters": {"default_route": "document", "allow_empty_key": True, "route_mappings": {}},
    })
    encoder.write_json(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.router.Router"}])
