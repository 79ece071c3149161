"""Sparse encoders that others made: what their folder says about how texts become vectors.

| folder or hub name | documents | queries |
|---|---|---|
| masked language model alone (naver/splade) | max over all tokens | the same |
| with `idf.json` beside it (OpenSearch, doc-only) | max over all tokens | a weight for each token, from `idf.json` |
| sentence-transformers' `modules.json` | as its modules say | as its modules say |

Of sentence-transformers' modules these are known: `Transformer` and `MLMTransformer`, `MultiVectorMask`,
`SpladePooling`, `SparseStaticEmbedding`, and `Router` with one way for queries and one for documents. What would
give other vectors than the folder's own package is refused. Special tokens take part unless the folder says
otherwise; in models of this project they do not.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from lexmae import artifact
from lexmae.checked import LOADING_ERRORS
from lexmae.errors import InputError, one_line
from lexmae.model import backbone, lexicon
from lexmae.model.pooling import Pooling

SIDES = {"docs": "document", "queries": "query"}
"""Our name of a side → the task of sentence-transformers."""

QUERY_WEIGHTS = "query_weights.safetensors"
"""A table of token weights in a folder of this project: its queries need no model."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MODULES = "modules.json"
_IDF = "idf.json"
_TRANSFORMERS = ("Transformer", "MLMTransformer")
_PROMPTS = {"docs": ("document", "passage", "corpus"), "queries": ("query",)}


@dataclass(frozen=True)
class Plan:
    """How a folder's texts of one side become vectors.

    Attributes:
        init: the folder or hub name.
        subfolder: of the masked language model, or of the table of weights; "" is the folder itself.
        pooling: what the masked language model's logits go through.
        table: the file of token weights, where there is no model to run.
        top_k: of a table: only so many of the largest entries are kept.
    """

    init: str
    subfolder: str = ""
    pooling: Pooling = Pooling()
    table: Path | None = None
    top_k: int | None = None


class StaticEncoder(nn.Module):
    """A text as the set of its tokens, each with a weight that does not depend on the text.

    Args:
        weights: float [V], not negative.
        top_k: only so many of the largest entries of a vector are kept.
    """

    def __init__(self, weights: Tensor, top_k: int | None = None):
        super().__init__()
        self.register_buffer("weights", weights.float())
        self.top_k = top_k

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        text_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Vectors [B, V] float32 of a padded batch, whose arguments are all [B, L]; as `SparseEncoder`'s."""
        present = input_ids.new_zeros(len(input_ids), len(self.weights))
        present.scatter_reduce_(1, input_ids, text_mask.to(present.dtype), "amax")
        values = present * self.weights
        return values if self.top_k is None else lexicon.top_k(values, self.top_k)


def plan(init: str | Path, side: str) -> Plan:
    """What a folder or hub name says about `docs` or `queries`.

    Raises:
        InputError: its vectors cannot be computed here as its own package computes them.
    """
    if side not in SIDES:
        raise InputError(f"unknown side {side!r}; known are {', '.join(SIDES)}")
    init = str(init)
    if artifact.exists(init):
        artifact.read(init, "model")
        return Plan(init, table=_file(init, QUERY_WEIGHTS) if side == "queries" else None)
    modules = _read_json(init, _MODULES)
    if modules is None:
        table = _file(init, _IDF) if side == "queries" else None
        return Plan(init, pooling=Pooling(skipped=()), table=table)
    _refuse_prompt(init, side)
    top_k = (_read_json(init, "config_sentence_transformers.json") or {}).get("max_active_dims")
    if top_k is not None and not (type(top_k) is int and top_k >= 1):
        raise InputError(f"max_active_dims: a number of entries is needed, not {top_k!r}", init)
    return _from_modules(init, side, _route(init, modules, side), top_k)


def dense_plan(init: str | Path, side: str, representation: str) -> tuple[Plan, bool]:
    """What a folder or hub name says about dense vectors, and whether they are scaled to length 1.

    A sentence encoder (`Transformer`, `Pooling`, perhaps `Normalize`) has to be pooled by its own way; of other
    folders only `mean` is scaled.

    Args:
        representation: `bottleneck`, `cls` or `mean`.

    Raises:
        InputError: as `plan`; or the folder pools its texts in another way.
    """
    init = str(init)
    modules = None if artifact.exists(init) else _read_json(init, _MODULES)
    route = [] if modules is None else _route(init, modules, side)
    kinds = [kind for kind, _ in route]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        return plan(init, side), representation == "mean"
    _refuse_prompt(init, side)
    config = _read_json(init, _join(route[1][1], "config.json")) or {}
    ways = {name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
            for name, on in config.items() if name.startswith("pooling_mode_") and on is True}
    if isinstance(config.get("pooling_mode"), str):
        ways = {config["pooling_mode"]}
    if ways and ways != {representation}:
        raise InputError(f"is a sentence encoder that pools its tokens by {' and '.join(sorted(ways))}, not by "
                         f"{representation}", init)
    return Plan(init, route[0][1]), len(kinds) == 3


def load_static(chosen: Plan) -> StaticEncoder:
    """The encoder of a plan with a table."""
    assert chosen.table is not None
    weights = _idf(chosen) if chosen.table.suffix == ".json" else stored_weights(chosen.table)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise InputError("holds a weight that is negative or no number", chosen.table)
    return StaticEncoder(weights, chosen.top_k)


def tokenizer(chosen: Plan) -> Any | None:
    """The tokenizer of a plan's folder; None where it has none."""
    subfolders = dict.fromkeys((chosen.subfolder, ""))
    found = [sub for sub in subfolders if any(_file(chosen.init, _join(sub, name)) for name in
                                              ("tokenizer.json", "tokenizer_config.json", "vocab.txt"))]
    if not found:
        return None
    try:
        return AutoTokenizer.from_pretrained(chosen.init, subfolder=found[0])
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load its tokenizer: {one_line(error)}", chosen.init) from error


# ---------------------------------------------------------------------------------------------- what modules say


def _route(init: str, modules: Any, side: str) -> list[tuple[str, str]]:
    """(kind, subfolder) of the modules that texts of a side go through, in their order."""
    found: list[tuple[str, str]] = []
    try:
        for module in sorted(modules, key=lambda module: module["idx"]):
            kind = module["type"].rpartition(".")[2]
            found += _branch(init, module["path"], side) if kind in ("Router", "Asym") else [(kind, module["path"])]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"is not a list of sentence-transformers' modules ({error!r})"
        raise InputError(reason, f"{init}/modules.json") from None
    return found


def _branch(init: str, path: str, side: str) -> list[tuple[str, str]]:
    """The modules of a router's way for a side."""
    config = _read_json(init, _join(path, "router_config.json")) or _read_json(init, _join(path, "config.json"))
    if not config or not config.get("structure"):
        raise InputError("its router has no router_config.json", init)
    ways, parameters, task = config["structure"], config.get("parameters", {}), SIDES[side]
    try:
        mapped = {ast.literal_eval(key): way for key, way in (parameters.get("route_mappings") or {}).items()}
    except LOADING_ERRORS as error:
        raise InputError(f"its router has route_mappings that cannot be read ({error})", init) from None
    asked = [mapped.get(key) for key in ((task, "text"), (task, None), (None, "text"), (None, None))]
    asked += [name if name in ways else None for name in (task, "text")]
    way = next((name for name in asked if name is not None), None)
    if way not in ways:
        raise InputError(f"its router has no way for the task {task!r}; it has {', '.join(ways)}", init)
    return [(config["types"][name].rpartition(".")[2], _join(path, name)) for name in ways[way]]


def _from_modules(init: str, side: str, modules: list[tuple[str, str]], top_k: int | None) -> Plan:
    kinds, paths = [kind for kind, _ in modules], [path for _, path in modules]
    if kinds == ["SparseStaticEmbedding"]:
        return Plan(init, paths[0], table=_table(init, paths[0]), top_k=top_k)
    if not kinds or kinds[0] not in _TRANSFORMERS or kinds[1:] not in (["SpladePooling"],
                                                                      ["MultiVectorMask", "SpladePooling"]):
        raise InputError(f"its {side} go through {' → '.join(kinds) or 'no module'}, which is not computed here; known "
                         "are Transformer → SpladePooling, and SparseStaticEmbedding", init)
    _check_transformer(init, side, *modules[0])
    config = _read_json(init, _join(paths[-1], "config.json")) or {}
    pooling = Pooling(config.get("pooling_strategy", "max"), config.get("activation_function", "relu"), (), top_k)
    found = Plan(init, paths[0], pooling)
    if len(modules) == 2:
        return found
    return replace(found, pooling=replace(pooling, skipped=_skipped(found, side, paths[1])))


def _check_transformer(init: str, side: str, kind: str, path: str) -> None:
    """Refuse a transformer that reads other texts, or gives other than an LM head's logits."""
    names = (_join(path, name) for name in backbone.PEER_CONFIGS)
    config = next(filter(None, (_read_json(init, name) for name in names)), {})
    task = config.get("transformer_task", "fill-mask" if kind == "MLMTransformer" else "feature-extraction")
    if task != "fill-mask":
        raise InputError(f"its transformer is made for {task}, a masked language model (fill-mask) is needed", init)
    if config.get("do_lower_case"):
        raise InputError("lower-cases texts outside of its tokenizer (do_lower_case), which shards do not", init)
    if config.get("query_expansion") and side == "queries":
        raise InputError("expands its queries with [MASK] (query_expansion), which shards do not", init)


def _skipped(chosen: Plan, side: str, path: str) -> tuple[int, ...]:
    """Ids of the tokens that a mask keeps out of the pooling."""
    config = _read_json(chosen.init, _join(path, "config.json")) or {}
    if config.get("keep_only_token_ids") and side == "docs":
        raise InputError("pools the tokens of keep_only_token_ids alone, which is not computed here", chosen.init)
    tasks = config.get("skiplist_tasks")
    tasks = ["document"] if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    words = config.get("skiplist_words") or []
    if not words or SIDES[side] not in tasks:
        return ()
    known = tokenizer(chosen)
    if known is None:
        raise InputError("has no tokenizer to look up the tokens that it skips", chosen.init)
    ids = {word: known.convert_tokens_to_ids(word) for word in words}
    return tuple(sorted({i for word, i in ids.items() if i != known.unk_token_id or word == known.unk_token}))


def _refuse_prompt(init: str, side: str) -> None:
    """Refuse texts that the folder's own package would begin with a prompt."""
    config = _read_json(init, "config_sentence_transformers.json") or {}
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise InputError("prompts: an object is needed", f"{init}/config_sentence_transformers.json")
    names = [name for name in _PROMPTS[side] if prompts.get(name) is not None] or [config.get("default_prompt_name")]
    if prompt := prompts.get(names[0]):
        raise InputError(f"puts the prompt {prompt!r} before its {side}, which shards do not", init)


# ------------------------------------------------------------------------------------------------ token weights


def _table(init: str, path: str) -> Path:
    """The file of a static embedding's weights."""
    named = (_read_json(init, _join(path, "config.json")) or {}).get("path")
    names = [named] if named else ["model.safetensors", "pytorch_model.bin"]
    found = [file for name in names for sub in (path, "") if (file := _file(init, _join(sub, name)))]
    if not found:
        raise InputError(f"has no weights of its query tokens ({', '.join(names)})", _join(init, path))
    return found[0]


def _idf(chosen: Plan) -> Tensor:
    known = tokenizer(chosen)
    if known is None:
        raise InputError(f"has no tokenizer to look up the tokens of {_IDF}", chosen.init)
    table = _parse(chosen.table)
    if not isinstance(table, dict) or not all(isinstance(weight, (int, float)) for weight in table.values()):
        raise InputError("is no table of tokens and their weights", chosen.table)
    weights = torch.zeros(len(known.get_vocab()))
    for index, weight in zip(known.convert_tokens_to_ids(list(table)), table.values(), strict=True):
        weights[index] = weight
    return weights


def stored_weights(file: Path) -> Tensor:
    """A table of token weights [V], float32; InputError where the file is none."""
    try:
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise InputError(f"not a table of query weights: {error}", file) from error
    if "weight" not in stored or stored["weight"].dim() != 1:
        raise InputError("not a table of query weights: it holds no list of them", file)
    return stored["weight"].float()


# --------------------------------------------------------------------------------------------------------- files


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part not in ("", "."))


def _file(init: str, name: str) -> Path | None:
    """A file of a folder or, fetched, of a hub name; None where there is none."""
    folder = Path(init)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not _HUB_NAME.fullmatch(init):
        return None
    got = cached_file(init, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
                      _raise_exceptions_for_connection_errors=False)
    return None if got is None else Path(got)


def _read_json(init: str, name: str) -> Any:
    file = _file(init, name)
    found = None if file is None else _parse(file)
    if name != _MODULES and not isinstance(found, dict | None):
        raise InputError("a JSON object is needed", file)
    return found


def _parse(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file) from error
