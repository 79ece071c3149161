"""Whether a model that others made reads the tokens that shards hold: it has no manifest to tell."""

from __future__ import annotations

from pathlib import Path

from lexmae.cli import say
from lexmae.data import tokenizer as tokenizers
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import foreign


def refuse_other_vocabulary(model: str | Path, shards: Shards, side: str) -> None:
    """InputError where an entry of the model's vocabulary differs from that of the shards.

    A tokenizer that gives the same entries in another way (lower-casing, say) cannot be told from one that was saved
    by another version, so that is a warning.
    """
    known = foreign.tokenizer(foreign.plan(model, side))
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
