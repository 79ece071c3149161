"""What a recipe trains: model, objective and data of each kind of recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lexmae.cli import say
from lexmae.config import BottleneckConfig, FinetuneRecipe, ModelConfig, PretrainRecipe, RerankRecipe
from lexmae.data import draws, negative_rows
from lexmae.data.batches import PretrainData, RankingData, read_texts
from lexmae.data.pairs import RerankData, read_pairs
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone, layers
from lexmae.model.attention import use_packing
from lexmae.model.encoder import SparseEncoder
from lexmae.model.head_fit import TEXTS, fit_transform
from lexmae.model.lexical_start import level_bias, output_bias, penalise_frequency, start_lexical
from lexmae.model.pretrainer import Pretrainer
from lexmae.model.reranker import CrossEncoder
from lexmae.model.static_queries import StaticQueries, holds_table, inverse_document_frequency, read_table
from lexmae.train import rerank
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


def build(config: PretrainRecipe | FinetuneRecipe | RerankRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    """The parts of a recipe around the backbone ``lm``; every rank calls it."""
    if packs(config, place.hardware):
        use_packing(lm)
    makers = {PretrainRecipe: _pretraining, FinetuneRecipe: _ranking, RerankRecipe: _reranking}
    found = makers[type(config)](config, lm, shards, place)
    for each in (lm, found.model.decoder.layers) if isinstance(found.model, Pretrainer) else (lm,):
        if config.model.activation_checkpointing:
            layers.recompute_layers(each)
        if config.model.compile:
            layers.compile_layers(each)
    return found


def packs(config: PretrainRecipe | FinetuneRecipe | RerankRecipe, spread: Hardware) -> bool:
    """Whether a recipe's texts are computed without padding here."""
    if config.model.packing == "auto":
        fits = spread.precision != "fp32" or not torch.cuda.is_available()
        return fits and not isinstance(config, RerankRecipe)
    return config.model.packing == "on"


def _common(config: Any, place: Place) -> dict[str, int]:
    return {"seed": config.optimization.seed, "batch": config.optimization.batch, "rank": place.rank,
            "world": place.hardware.world, "micro_tokens": place.hardware.micro_tokens}


def _pretraining(config: PretrainRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    if config.bottleneck.active_terms:
        output_bias(lm, "bottleneck.active_terms")  # which is needed at the end
    model = build_pretrainer(lm, config.bottleneck)
    packed = packs(config, place.hardware)
    data = PretrainData(shards, config.masking, micro_batch=place.hardware.micro_batch, packed=packed,
                        **_common(config, place))
    return Parts(model, PretrainObjective(config.bottleneck, packed), data)


def _ranking(config: FinetuneRecipe, lm: Any, shards: Shards, place: Place) -> Parts:
    spread = place.hardware
    texts = config.optimization.batch // spread.world * (1 + config.negatives.per_query)
    # Without a micro-batch nothing is recomputed; a CPU still gains from short texts that are not padded to long ones.
    chunk = spread.micro_batch or (texts if torch.cuda.is_available() else _CPU_CHUNK)
    teacher = rerank.Teacher(config.loss.teacher, shards) if config.loss.teacher else None
    read = teacher and functools.partial(read_pairs, shards, shards.queries(config.split),
                                         max_length=teacher.max_length)
    data = RankingData(shards, config.split, _negatives(config, shards, place), config.negatives, micro_batch=chunk,
                       exclude_judged=config.loss.exclude_judged, pairs=read, packed=packs(config, spread),
                       **_common(config, place))
    queries = _static_queries(config, lm, shards) if config.model.queries == "static" else None
    recompute = spread.micro_tokens > 0 or 0 < spread.micro_batch < texts
    model = RankingModel(SparseEncoder(lm), recompute, query_encoder=queries)
    objective = RankingObjective(config.loss, place.gather, spread.world, teacher, packs(config, spread))
    return Parts(model, objective, data)


def _static_queries(config: FinetuneRecipe, lm: Any, shards: Shards) -> StaticQueries:
    """The table of the model that training starts from, or else inverse document frequencies of the shards."""
    size = backbone.output_matrix(lm)[0].shape[0]
    if holds_table(config.model.init):
        weights = read_table(config.model.init)
        if len(weights) != size:
            raise InputError(f"has weights of {len(weights)} query tokens, the model knows {size}", config.model.init)
    else:
        frequency = torch.from_numpy(shards.docs.document_frequency(shards.vocab_size))
        weights = inverse_document_frequency(frequency, len(shards.docs), size)
    table = StaticQueries(weights)
    table.raw.lr_factor = config.optimization.query_lr / config.optimization.lr
    return table


def _reranking(config: RerankRecipe, scorer: Any, shards: Shards, place: Place) -> Parts:
    data = RerankData(shards, config.split, _negatives(config, shards, place), config.negatives,
                      micro_batch=place.hardware.micro_batch, max_length=config.max_length, **_common(config, place))
    return Parts(CrossEncoder(scorer), rerank.RerankObjective(), data)


def _negatives(config: FinetuneRecipe | RerankRecipe, shards: Shards, place: Place) -> draws.NegativeLists:
    """The recipe's lists of negatives as rows, which rank 0 makes."""
    lists = _lists(config)
    stored = isinstance(config, FinetuneRecipe) and config.loss.distillation != "none" and not config.loss.teacher
    place.on_rank_zero(lambda: negative_rows.build(shards, config.split, config.negatives, lists, config.passages,
                                                   stored))
    return draws.NegativeLists(lists)


def _lists(config: FinetuneRecipe | RerankRecipe) -> Path:
    return Path(config.output) / "negatives"


def checksums_of_negatives(config: PretrainRecipe | FinetuneRecipe | RerankRecipe) -> list[str]:
    """Of the files that the parts of a recipe were made of, in their order."""
    return [] if isinstance(config, PretrainRecipe) else negative_rows.checksums(_lists(config))


def build_pretrainer(lm: Any, config: BottleneckConfig) -> Pretrainer:
    """The backbone with the bottleneck and the decoder of a recipe."""
    return Pretrainer(lm, config.decoder_layers, config.source, bag_of_words=config.bow_weight > 0,
                      normalize=config.normalize)


def build_lm(config: ModelConfig, shards: Shards, continued: bool = False) -> Any:
    """The backbone of a recipe, checked against the shards' vocabulary and length.

    Args:
        continued: a checkpoint's weights will take the place of these, so that a head needs no start.
    """
    if config.init == "scratch":
        special = {name: i for name, i in dataclasses.asdict(shards.special).items() if i is not None}
        lm = backbone.create_masked_lm(config.architecture, shards.vocab_size, special, config.size)
        if config.lexical_start:
            start_lexical(lm)
    else:
        lm, new = backbone.load_masked_lm_with_new(config.init)
        if new and config.fit_head and not continued:
            _fit_head(lm, config.init, shards)
    backbone.refuse_few_tokens(lm, shards.vocab_size, config.init)
    longest = max(shards.manifest.extra["max_length"], shards.manifest.extra["query_length"])
    if backbone.max_length(lm) < longest:
        raise InputError(f"reads {backbone.max_length(lm)} tokens, the shards hold up to {longest}", config.init)
    if config.frequency_penalty:
        frequency = torch.from_numpy(shards.docs.document_frequency(shards.vocab_size))
        penalise_frequency(lm, frequency, len(shards.docs), config.frequency_penalty)
    if config.start_terms and not continued:
        with _on_gpu(lm):
            added = level_bias(lm, _some_texts(shards), config.start_terms)
        say(f"output biases {added:+.2f}: a document starts with {config.start_terms} active terms on average")
    return lm


def level(folder: Path, shards: Shards, terms: int) -> float:
    """Lower the output biases of a written model until documents have at most ``terms`` active terms on average.

    Returns:
        What was added: 0 where they have not more.
    """
    lm = backbone.load_masked_lm(str(folder))
    with _on_gpu(lm):
        added = level_bias(lm, _some_texts(shards), terms, only_lower=True)
    if added:
        backbone.save_weights(lm, folder)
    return added


def _fit_head(lm: Any, init: str, shards: Shards) -> None:
    """A start for the LM head of a backbone that has none; the same on every rank, which rank 0's weights replace."""
    with _on_gpu(lm):
        named = fit_transform(lm, _some_texts(shards))
    rows = min(TEXTS, len(shards.docs))
    say(f"{init} has no LM head: fitted one to {rows} texts; {named:.0%} of their tokens name themselves first")


def _some_texts(shards: Shards) -> Iterator[dict[str, torch.Tensor]]:
    """Up to `TEXTS` documents from all over the collection, as arguments of an encoder."""
    rows = np.linspace(0, len(shards.docs) - 1, min(TEXTS, len(shards.docs))).astype(np.int64)
    for i in range(0, len(rows), _CPU_CHUNK):
        yield read_texts(shards, shards.docs, rows[i:i + _CPU_CHUNK]).arguments()


@contextlib.contextmanager
def _on_gpu(lm: Any) -> Iterator[None]:
    """The model on a GPU for a while, where there is one."""
    if torch.cuda.is_available():
        lm.cuda()
    yield
    lm.cpu()
