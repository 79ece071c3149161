"""The only file that knows one backbone from another.

Every other module sees a masked language model through the functions below: its embeddings, its last hidden
states, the transform and the output matrix of its LM head, and a weak decoder made of its own kind of
layers. A new family is one row of `FAMILIES`.

Shapes: B sequences, L tokens, N tokens of all sequences without padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from lexmae.checked import LOADING_ERRORS
from lexmae.errors import InputError, one_line
from lexmae.model.attention import run_packed
from lexmae.model.packing import Packing


@dataclass(frozen=True)
class Family:
    """How one family differs: the LM-head transform, and whether its embeddings read segment ids."""

    transform: Callable[[PreTrainedModel, Tensor], Tensor]
    segments: bool
    offset_positions: bool = False
    """Positions start after the padding id, so that fewer of them are left for tokens."""
    positions: bool = True  # read by the embeddings


def _bert(lm: Any, hidden: Tensor) -> Tensor:
    return lm.cls.predictions.transform(hidden)


def _distilbert(lm: Any, hidden: Tensor) -> Tensor:
    return lm.vocab_layer_norm(lm.activation(lm.vocab_transform(hidden)))


def _roberta(lm: Any, hidden: Tensor) -> Tensor:
    return lm.lm_head.layer_norm(F.gelu(lm.lm_head.dense(hidden)))


def _modernbert(lm: Any, hidden: Tensor) -> Tensor:
    return lm.head(hidden)


FAMILIES: dict[str, Family] = {
    "bert": Family(_bert, segments=True),
    "distilbert": Family(_distilbert, segments=False),
    "roberta": Family(_roberta, segments=True, offset_positions=True),
    "xlm-roberta": Family(_roberta, segments=True, offset_positions=True),
    "modernbert": Family(_modernbert, segments=False, positions=False),
}


PEER_CONFIGS = tuple(f"sentence_{name}_config.json" for name in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"))  # fmt: skip
"""Names under which sentence-transformers has stored how a backbone is read; new folders have the first."""

_TO_RESIDUAL = re.compile(r"(output\.dense|out_lin|lin2|Wo)$")


def writes_to_residual(name: str) -> bool:
    """Whether the linear layer of this name within a backbone adds to the residual stream."""
    return _TO_RESIDUAL.search(name) is not None


def _family(lm: PreTrainedModel) -> Family:
    return FAMILIES[lm.config.model_type]


# ---------------------------------------------------------------------------------------------- making one


def load_masked_lm(init: str, subfolder: str = "", **kw: Any) -> PreTrainedModel:
    """A masked language model from a folder or a hub name, in float32 unless `dtype` says otherwise.

    `subfolder` names the part of the folder that holds it. Keywords go to `AutoModelForMaskedLM.from_pretrained`.
    Raises InputError when the folder or name holds no such model, or one without its LM head.
    """
    lm, new = load_masked_lm_with_new(init, subfolder, **kw)
    if new:
        raise InputError(f"has no LM head (it lacks {new[0]}), so it has no lexicon vectors: train one from it first, "
                         "with launch/pretrain.py or launch/finetune.py", path=init)
    return lm


def load_masked_lm_with_new(init: str, subfolder: str = "", **kw: Any) -> tuple[PreTrainedModel, list[str]]:
    """`load_masked_lm`, and the names of the weights of the LM head that are new: none for a masked language model.

    A backbone without an LM head (a sentence encoder) gets a new one, a function of torch's generator.
    """
    lm, new = _load_with_new(AutoModelForMaskedLM, "a masked language model", init, subfolder, **kw)
    return _settle(lm), [name for name in new if not name.endswith("bias")]  # the output bias often has no other name


def load_scorer(init: str, **kw: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model of one score per text (pair) from a folder or a hub name, and the names of its weights that are new.

    None is new where a finished scorer is loaded. Of another model, such as a masked language model, the encoder is
    taken; what stands above it is new, a function of torch's generator. Keywords and errors as in `load_masked_lm`.
    """
    return _load_with_new(AutoModelForSequenceClassification, "a model of one score", init, num_labels=1, **kw)


def _load_with_new(
    kind: Any, what: str, init: str, subfolder: str = "", **kw: Any
) -> tuple[PreTrainedModel, list[str]]:
    """What `_load` gives, and the names of its weights that the folder does not have, all above the encoder."""
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of what is new and what is left out, once for each rank
    try:
        model, found = _load(kind, what, init, subfolder, output_loading_info=True, **kw)
    finally:
        logging.set_verbosity(shown)
    new = sorted(found["missing_keys"])
    inside = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if inside:
        raise InputError(f"lacks weights of the encoder, such as {inside[0]}", path=init)
    return model, new


def _load(kind: Any, what: str, init: str, subfolder: str = "", **kw: Any) -> Any:
    """What an auto class of transformers makes of a folder or hub name, in float32 unless `dtype` says otherwise."""
    if not init:
        raise InputError("a model folder or hub name is needed")
    folder = Path(init)
    if folder.is_dir():
        folder, subfolder, init = folder / subfolder, "", str(folder / subfolder)
        if not (folder / "config.json").is_file():
            raise InputError("no config.json: not a Hugging Face model folder", path=init)
    elif folder.is_absolute() or init.startswith((".", "~")) or init.count("/") > 1:
        raise InputError("no such model folder", path=init)
    try:
        given = {name: kw.pop(name) for name in ("num_labels",) if name in kw}
        config = AutoConfig.from_pretrained(init, subfolder=subfolder, trust_remote_code=False, **given)
        _check_family(config.model_type, init)
        with quiet() if folder.is_dir() else nullcontext():  # a download keeps its progress bar
            kw = {"dtype": torch.float32, **kw}
            return kind.from_pretrained(init, config=config, subfolder=subfolder, trust_remote_code=False, **kw)
    except InputError:
        raise
    except (*LOADING_ERRORS, StrictDataclassError) as error:
        raise InputError(f"cannot load {what}: {one_line(error)}", path=init) from error


def create_masked_lm(
    architecture: str, vocab_size: int, special: Mapping[str, int], size: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A randomly initialised masked language model.

    `architecture` is one of FAMILIES. `special` maps "pad", "cls", "sep" (and others, which are ignored) to
    ids. `size` holds the architecture's own config names (`hidden_size`, `num_hidden_layers`, dropout rates,
    …). The weights are a function of torch's generator. Raises InputError for an unknown architecture, size
    key or impossible value.
    """
    return _settle(_create(AutoModelForMaskedLM, architecture, vocab_size, special, size))


def create_scorer(
    architecture: str, vocab_size: int, special: Mapping[str, int], size: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """A randomly initialised model of one score per text (pair); arguments and errors as in `create_masked_lm`."""
    return _create(AutoModelForSequenceClassification, architecture, vocab_size, special, size, num_labels=1)


def _create(kind: Any, architecture: str, vocab_size: int, special: Mapping[str, int],
            size: Mapping[str, Any] | None, **kw: Any) -> PreTrainedModel:
    _check_family(architecture)
    size = dict(size or {})
    known = size_keys(architecture)
    if unknown := sorted(set(size) - set(known)):
        raise InputError(f"unknown size {', '.join(unknown)} for {architecture}; known: {', '.join(known)}")
    ids = _special_ids(special, vocab_size)
    try:
        config = AutoConfig.for_model(architecture, **{"vocab_size": vocab_size, **ids, **size, **kw})
        if config.num_hidden_layers < 1:
            raise ValueError("num_hidden_layers must be at least 1")
        return kind.from_config(config, dtype=torch.float32)
    except (*LOADING_ERRORS, StrictDataclassError) as error:
        raise InputError(f"cannot build a {architecture} of this size: {one_line(error)}") from error


def size_keys(architecture: str) -> list[str]:
    """The config names of an architecture that `create_masked_lm` takes as sizes, sorted."""
    _check_family(architecture)
    cls = type(AutoConfig.for_model(architecture))
    names = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)}
    names |= {alias for alias, name in cls.attribute_map.items() if name in names}
    return sorted(n for n in names if not n.endswith("_token_id") and n != "vocab_size")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars transformers shows for reading and writing weights on disk."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_weights(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write config.json and safetensors.

    Args:
        state_dict: replaces the model's own, for weights gathered from several ranks; same keys.
    """
    with quiet():  # saving empties the dict it is given
        model.save_pretrained(folder, state_dict=None if state_dict is None else dict(state_dict))
    if state_dict is not None:  # the config names the type of what was written, not of what was trained
        config = copy.deepcopy(model.config)
        config.dtype = next(value.dtype for value in state_dict.values() if value.is_floating_point())
        config.save_pretrained(folder)


def _special_ids(special: Mapping[str, int], vocab_size: int) -> dict[str, int]:
    if "pad" not in special:
        raise InputError("the padding token's id is missing from the special ids")
    for name, token in special.items():
        if not 0 <= token < vocab_size:
            raise InputError(f"special id {name}={token} lies outside the vocabulary of {vocab_size}")
    ids = {"pad_token_id": special["pad"]}
    for name, alias in (("cls", "bos"), ("sep", "eos")):
        if name in special:
            ids[f"{name}_token_id"] = ids[f"{alias}_token_id"] = special[name]
    return ids


def _check_family(name: str, path: str | None = None) -> None:
    if name not in FAMILIES:
        raise InputError(f"unknown backbone {name!r}; known: {', '.join(FAMILIES)}", path=path)


def _settle(lm: PreTrainedModel) -> PreTrainedModel:
    """Options under which every family's forward returns plain dense logits."""
    if getattr(lm.config, "sparse_prediction", False):
        lm.config.sparse_prediction = lm.sparse_prediction = False
    return lm


# ------------------------------------------------------------------------------------------ looking into one


def word_embeddings(lm: PreTrainedModel) -> nn.Parameter:
    """The word-embedding table [V, H]."""
    return lm.get_input_embeddings().weight


def refuse_few_tokens(lm: PreTrainedModel, needed: int, name: str | Path) -> None:
    """InputError where the model, of this name, has fewer word embeddings than the vocabulary of shards needs."""
    if (entries := len(word_embeddings(lm))) < needed:
        raise InputError(f"knows {entries} tokens, the shards use a vocabulary of {needed}", name)


def output_matrix(lm: PreTrainedModel) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The LM head's output matrix [V, H] and bias [V] (None where the backbone has none)."""
    head = lm.get_output_embeddings()
    return head.weight, head.bias


def head_layers(lm: PreTrainedModel) -> tuple[nn.Linear, nn.LayerNorm]:
    """The dense layer and the LayerNorm of the LM head's transform."""
    inside = set(lm.base_model.modules()) | {lm.get_output_embeddings()}
    outside = [module for module in lm.modules() if module not in inside]
    return (next(module for module in outside if isinstance(module, nn.Linear)),
            next(module for module in outside if isinstance(module, nn.LayerNorm)))


def max_length(lm: PreTrainedModel) -> int:
    """The longest sequence, in tokens, that the position embeddings reach."""
    config = lm.config
    return config.max_position_embeddings - (config.pad_token_id + 1 if _family(lm).offset_positions else 0)


def embed(lm: PreTrainedModel, input_ids: Tensor, token_type_ids: Tensor | None = None,
          packing: Packing | None = None) -> Tensor:
    """What the first layer reads: word, position and segment embeddings, LayerNorm and dropout.

    Ids are [B, L]; the result is [B, L, H], or [N, H] where there is a packing.
    """
    if packing is None:
        return lm.base_model.embeddings(input_ids=input_ids, **_segments(lm, token_type_ids))
    flat = _packed_inputs(lm, input_ids, token_type_ids, packing)
    read = flat if _family(lm).positions else {"input_ids": flat["input_ids"]}
    return lm.base_model.embeddings(**read).squeeze(0)


def hidden_states(
    lm: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:  # fmt: skip
    """Last hidden states [B, L, H] of ids [B, L], or [N, H] where there is a packing; segments where they are known."""
    if packing is not None:
        return run_packed(lm, packing, **_packed_inputs(lm, input_ids, token_type_ids, packing))
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **_segments(lm, token_type_ids)}
    return lm.base_model(**inputs).last_hidden_state


def positions(lm: PreTrainedModel, packing: Packing) -> Tensor:
    """The position ids [1, N] of packed tokens, as the family counts them."""
    offset = lm.config.pad_token_id + 1 if _family(lm).offset_positions else 0
    return (packing.positions + offset).unsqueeze(0)


def _packed_inputs(lm: PreTrainedModel, input_ids: Tensor, token_type_ids: Tensor | None,
                   packing: Packing) -> dict[str, Tensor]:
    """ids, segments and positions [1, N] of padded ones [B, L]."""
    flat = {name: packing.pack(value)[None] for name, value in _segments(lm, token_type_ids).items()}
    return {"input_ids": packing.pack(input_ids)[None], **flat, "position_ids": positions(lm, packing)}


def scores(scorer: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor,
           token_type_ids: Tensor | None = None) -> Tensor:
    """The scores [B] of a scorer; segment ids are used only where the backbone has them."""
    segments = _segments(scorer, token_type_ids)
    return scorer(input_ids=input_ids, attention_mask=attention_mask, **segments).logits.squeeze(-1)


def transform(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The LM head up to its output matrix (dense, activation, LayerNorm): [..., H] -> [..., H]."""
    return _family(lm).transform(lm, hidden)


def _segments(lm: PreTrainedModel, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    if token_type_ids is None or not _family(lm).segments or lm.config.type_vocab_size < 2:
        return {}
    return {"token_type_ids": token_type_ids}
