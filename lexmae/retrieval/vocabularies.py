"""Whether a model reads the tokens that shards hold, and what vectors remember of both.

A model that others made has no manifest to tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexmae import artifact
from lexmae.cli import say
from lexmae.data import tokenizer as tokenizers
from lexmae.data.shards import Shards, TokenTable
from lexmae.errors import InputError
from lexmae.model import backbone, foreign

_LENGTH = {"docs": "max_length", "queries": "query_length"}


def refuse_other_vocabulary(model: str | Path, shards: Shards, side: str, representation: str = "lexicon") -> None:
    """InputError where an entry of the model's vocabulary differs from that of the shards.

    A tokenizer that gives the same entries in another way (lower-casing, say) cannot be told from one that was saved
    by another version, so that is a warning.
    """
    chosen = (foreign.plan(model, side) if representation == "lexicon"
              else foreign.dense_plan(model, side, representation)[0])
    known = foreign.tokenizer(chosen)
    where, advice = shards.manifest.path, f"prepare shards with --tokenizer {model}"
    if known is None:
        say(f"warning: {model} has no tokenizer; it is taken to have that of {where}")
        return
    if len(known) > shards.vocab_size:
        raise InputError(f"has {len(known)} tokens, {where} has {shards.vocab_size}; {advice}", model)
    ours, theirs = shards.vocabulary(), tokenizers.vocabulary(known, shards.vocab_size)
    differing = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if differing:
        index = differing[0]
        raise InputError(f"has another tokenizer than {where}: entry {index} is {theirs[index]!r} here and "
                         f"{ours[index]!r} there ({len(differing)} differ); {advice}", model)
    if tokenizers.fingerprint(known) != shards.manifest.extra["tokenizer_hash"]:
        say(f"warning: the tokenizer of {model} has the vocabulary of {where}, but other settings")


def facts(shards: Shards, side: str) -> dict[str, Any]:
    """What vectors of a side remember, so that others are refused beside them: the tokenizer, the tokens of a text."""
    extra = shards.manifest.extra
    return {"tokenizer_hash": extra["tokenizer_hash"], "max_length": extra[_LENGTH[side]]}


def warn_of_other_length(model: artifact.Manifest, shards: Shards, side: str) -> None:
    """Say where texts are cut at another length than those that the model was trained on; both may be meant."""
    name = _LENGTH[side]
    trained, here = model.extra.get(name), shards.manifest.extra.get(name)
    if trained is not None and trained != here:
        say(f"warning: {model.path} was trained with {name} {trained}, {shards.path} has {here}")


def refuse_longer_texts(encoder: Any, table: TokenTable, model: str | Path) -> None:
    """InputError where a text is longer than the positions of the encoder's backbone; a static encoder has none."""
    if hasattr(encoder, "lm"):
        reads, longest = backbone.max_length(encoder.lm), int(table.lengths.max(initial=0))
        if longest > reads:
            raise InputError(f"reads {reads} tokens, {table.folder} holds texts of up to {longest}", model)
