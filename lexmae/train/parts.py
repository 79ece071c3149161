"""What a recipe trains: model, objective and data of each kind of recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lexmae.config import FinetuneRecipe, ModelConfig, PretrainRecipe
from lexmae.data import draws
from lexmae.data.batches import PretrainData, RankingData
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.model.lexical_start import penalise_frequency, start_lexical
from lexmae.model.pretrainer import Pretrainer
from lexmae.train.hardware import Hardware
from lexmae.train.objectives import Objective, PretrainObjective, RankingModel, RankingObjective

_CPU_CHUNK = 32  # documents


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands, and what crosses ranks.

    Attributes:
        gather: rows of this rank → rows of all ranks, differentiable.
        on_rank_zero: runs a function on rank 0 while the others wait (and on each host with a folder of its own).
    """

    hardware: Hardware
    rank: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    on_rank_zero: Callable[[Callable[[], Any]], None]


class Parts(NamedTuple):
    """What the loop trains: a module, its losses, and step → this rank's part of the batch."""

    model: torch.nn.Module
    objective: Objective
    data: Any


def build(config: PretrainRecipe | FinetuneRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    """The parts of a recipe around the backbone ``lm``; every rank calls it."""
    return (_pretraining if isinstance(config, PretrainRecipe) else _ranking)(config, lm, shards, place)


def _common(config: Any, place: Place) -> dict[str, int]:
    return {"seed": config.optimization.seed, "batch": config.optimization.batch, "rank": place.rank,
            "world": place.hardware.world}


def _pretraining(config: PretrainRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    model = Pretrainer(lm, config.bottleneck.decoder_layers, config.bottleneck.source,
                       bag_of_words=config.bottleneck.bow_weight > 0)
    data = PretrainData(shards, config.masking, micro_batch=place.hardware.micro_batch, **_common(config, place))
    return Parts(model, PretrainObjective(config.bottleneck), data)


def _ranking(config: FinetuneRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    spread = place.hardware
    texts = config.optimization.batch // spread.world * (1 + config.negatives.per_query)
    # Without a micro-batch nothing is recomputed; a CPU still gains from short texts that are not padded to long ones.
    chunk = spread.micro_batch or (texts if torch.cuda.is_available() else _CPU_CHUNK)
    lists = Path(config.output) / "negatives"
    place.on_rank_zero(lambda: draws.build(shards, config.split, config.negatives.path or None,
                                           config.negatives.depth, lists, config.passages))
    data = RankingData(shards, config.split, draws.NegativeLists(lists), config.negatives, micro_batch=chunk,
                       exclude_judged=config.loss.exclude_judged, **_common(config, place))
    model = RankingModel(SparseEncoder(lm), recompute=0 < spread.micro_batch < texts)
    return Parts(model, RankingObjective(config.loss, place.gather, spread.world), data)


def build_lm(config: ModelConfig, shards: Shards) -> Any:
    """The backbone of a recipe, checked against the shards' vocabulary and length."""
    if config.init == "scratch":
        special = {name: i for name, i in dataclasses.asdict(shards.special).items() if i is not None}
        lm = backbone.create_masked_lm(config.architecture, shards.vocab_size, special, config.size)
        if config.lexical_start:
            start_lexical(lm)
    else:
        lm = backbone.load_masked_lm(config.init)
    entries = backbone.word_embeddings(lm).shape[0]
    if entries < shards.vocab_size:
        raise InputError(f"knows {entries} tokens, the shards use a vocabulary of {shards.vocab_size}", config.init)
    longest = max(shards.manifest.extra["max_length"], shards.manifest.extra["query_length"])
    if backbone.max_length(lm) < longest:
        raise InputError(f"reads {backbone.max_length(lm)} tokens, the shards hold up to {longest}", config.init)
    if config.frequency_penalty:
        frequency = torch.from_numpy(shards.docs.document_frequency(shards.vocab_size))
        penalise_frequency(lm, frequency, len(shards.docs), config.frequency_penalty)
    return lm
