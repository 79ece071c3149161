"""What the training of a cross-encoder adds: its loss, its model, and the folder it ends in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lexmae.cli import say
from lexmae.config import RerankRecipe
from lexmae.data.batches import RankingBatch
from lexmae.data.pairs import PairBatch, trained_length
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.reranker import KIND, CrossEncoder, save_scorer
from lexmae.train import losses
from lexmae.train.hardware import Hardware, refuse_budget
from lexmae.train.objectives import Metrics, Stateless


class RerankObjective(Stateless):
    """Listwise softmax over the positive and the negatives of each query, mean over the queries of the global batch."""

    def micro_batches(self, step_data: list[PairBatch]) -> list[PairBatch]:
        """As they come."""
        return step_data

    def counts(self, step_data: list[PairBatch]) -> list[int]:
        """Queries."""
        return [sum(len(batch.input_ids) // batch.n_docs for batch in step_data)]

    def loss(self, forward, batch: PairBatch, totals: list[float], step: int,
             total_steps: int) -> tuple[torch.Tensor, Metrics]:
        """The share of these queries in the mean."""
        scores = forward(**batch.arguments()).view(-1, batch.n_docs)  # [Q, N]
        summed, won = losses.listwise(scores)
        loss = summed / totals[0]
        return loss, {"loss": loss.detach(), "accuracy": won / totals[0]}

    def sizes(self, batch: PairBatch) -> tuple[int, int]:
        """Tokens without and with padding."""
        return int(batch.attention_mask.sum()), batch.attention_mask.numel()


class Teacher:
    """A finished cross-encoder that scores the pairs of a ranking batch, without gradients.

    Args:
        folder: artifact of kind ``reranker``, or another cross-encoder's folder or hub name.
        shards: what the pairs are made of; its tokenizer must be the cross-encoder's.

    Raises:
        InputError: its kind or tokenizer is another, or it has fewer tokens than the shards' vocabulary.
    """

    def __init__(self, folder: str, shards: Shards):
        made = shards.refuse_other_tokenizer(folder, KIND)
        self.scorer = CrossEncoder.load(folder).eval().requires_grad_(False)
        backbone.refuse_few_tokens(self.scorer.scorer, shards.vocab_size, folder)
        self.max_length = min(trained_length(made, shards), self.scorer.max_length)

    @torch.no_grad()
    def __call__(self, batch: RankingBatch) -> torch.Tensor:
        """Scores [Q, N] of each query's own documents, float32."""
        device = batch.doc_order.device
        self.scorer.to(device)
        gpu = device.type == "cuda"
        low = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        with torch.autocast(device.type, dtype=low, enabled=gpu):
            scores = torch.cat([self.scorer(**pairs.arguments()).float() for pairs in batch.pairs])
        return scores.view(-1, batch.n_docs)


def check_teacher(folder: str, shards: Shards, spread: Hardware) -> None:
    """Refuse a teacher of other shards, and a budget of tokens that does not hold one of its pairs.

    Raises:
        InputError: its kind or tokenizer is another, or a pair of it may be longer than a micro-batch.
    """
    longest = trained_length(shards.refuse_other_tokenizer(folder, KIND), shards)
    refuse_budget(spread, longest, f"the teacher reads pairs of up to {longest} tokens")


def check(config: RerankRecipe, shards: Shards, spread: Hardware) -> None:
    """Refuse a length that leaves no room for a document, and a budget of tokens that leaves none for a query.

    Raises:
        InputError: the longest query and one token of a document do not fit, or the pairs of a query do not.
    """
    pairs = 1 + config.negatives.per_query
    refuse_budget(spread, pairs * config.max_length, f"a query has {pairs} pairs of up to {config.max_length} tokens")
    longest = shards.manifest.extra["query_length"]
    if config.max_length < longest + 3:
        raise InputError(f"max_length {config.max_length}: queries have up to {longest} tokens, "
                         f"so at least {longest + 3} are needed for pairs", shards.path)


def build_scorer(config: RerankRecipe, shards: Shards) -> Any:
    """The sequence classifier of a recipe, checked against the shards' vocabulary and the length of pairs."""
    model = config.model
    if model.init == "scratch":
        special = {name: i for name, i in dataclasses.asdict(shards.special).items() if i is not None}
        scorer = backbone.create_scorer(model.architecture, shards.vocab_size, special, model.size)
    else:
        scorer, new = backbone.load_scorer(model.init)
        say(f"{model.init}: " + (f"new are {', '.join(new)}" if new else "a finished cross-encoder is trained on"))
    backbone.refuse_few_tokens(scorer, shards.vocab_size, model.init)
    if backbone.max_length(scorer) < config.max_length:
        raise InputError(f"reads {backbone.max_length(scorer)} tokens, max_length is {config.max_length}", model.init)
    return scorer


def save(scorer: Any, folder: Path, shards: Shards, state: dict[str, torch.Tensor],
         config: RerankRecipe) -> dict[str, int]:
    """Write the gathered weights in Hugging Face layout; returns further facts for the manifest."""
    save_scorer(scorer, folder, shards.tokenizer_dir, config.max_length, state)
    return {"pair_length": config.max_length}
