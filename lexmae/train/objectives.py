"""What is learned: pre-training and ranking, each a model, its data and its named losses.

An objective turns the micro-batches of one optimizer step into losses whose sum over micro-batches and ranks is the
loss of the step, whatever their number: means are taken over the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from lexmae.config import BottleneckConfig, LossConfig
from lexmae.data.batches import PretrainBatch, RankingBatch, TextBatch
from lexmae.model import lexicon
from lexmae.model.layers import recomputed
from lexmae.train import losses
from lexmae.train.sparsity import Lambdas

Metrics = dict[str, torch.Tensor]  # scalars; summed over micro-batches and ranks they are the value to report


class Objective(Protocol):
    """What the loop needs of an objective."""

    def micro_batches(self, step_data: Any) -> list[Any]:
        """The micro-batches of this rank for one optimizer step."""

    def counts(self, step_data: Any) -> list[int]:
        """Numbers whose sum over the ranks ``loss`` needs; the same length on every rank."""

    def loss(self, forward: Callable[..., Any], batch: Any, totals: list[float], step: int,
             total_steps: int) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the step's loss, and its shares of the metrics."""

    def encode(self, forward: Callable[..., Any], text: TextBatch, side: str) -> torch.Tensor:
        """Lexicon vectors [B, V] of texts, by a call of the model."""

    def sizes(self, batch: Any) -> tuple[int, int]:
        """Tokens of a micro-batch, without and with padding."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""


class Stateless:
    """An objective that has nothing to keep."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class PretrainObjective(Stateless):
    """Masked-LM losses of encoder and decoder (SPEC §1), means over the labelled positions of the global batch, and
    where it has a weight the bag-of-words loss, a mean over its texts.

    Args:
        packed: the model computes texts without padding.
    """

    def __init__(self, config: BottleneckConfig, packed: bool = False):
        self.config, self.packed = config, packed

    def micro_batches(self, step_data: list[PretrainBatch]) -> list[PretrainBatch]:
        """As they come."""
        return step_data

    def counts(self, step_data: list[PretrainBatch]) -> list[int]:
        """Labelled positions for the encoder and for the decoder; texts, where there is a bag-of-words loss."""
        texts = [sum(len(batch.enc_labels) for batch in step_data)] if self.config.bow_weight else []
        return [sum(batch.enc_count for batch in step_data), sum(batch.dec_count for batch in step_data), *texts]

    def loss(self, forward, batch: PretrainBatch, totals: list[float], step: int,
             total_steps: int) -> tuple[torch.Tensor, Metrics]:
        """``w_enc·loss_enc + w_dec·loss_dec + w_bow·loss_bow``."""
        out = forward(**batch.text.arguments(), enc_labels=batch.enc_labels, dec_input_ids=batch.dec_input_ids,
                      dec_labels=batch.dec_labels)
        encoder, decoder, *texts = (max(1.0, total) for total in totals)
        enc_loss, dec_loss = out["enc_loss_sum"] / encoder, out["dec_loss_sum"] / decoder
        loss = self.config.encoder_weight * enc_loss + self.config.decoder_weight * dec_loss
        bag = {}
        if texts:
            bow_loss = out["bow_loss_sum"] / texts[0]
            loss, bag = loss + self.config.bow_weight * bow_loss, {"loss_bow": bow_loss.detach()}
        return loss, {"loss": loss.detach(), "loss_enc": enc_loss.detach(), "loss_dec": dec_loss.detach(), **bag,
                      "accuracy_enc": out["enc_correct"] / encoder, "accuracy_dec": out["dec_correct"] / decoder}

    def encode(self, forward, text: TextBatch, side: str) -> torch.Tensor:
        """Lexicon vectors [B, V] of texts of either side."""
        return forward(**text.arguments())

    def sizes(self, batch: PretrainBatch) -> tuple[int, int]:
        """Tokens without and with the padding that is computed."""
        return _sizes([batch.text], self.packed)


class RankingModel(nn.Module):
    """Encodes the texts of a ranking batch with one encoder, in chunks of bounded size.

    Args:
        encoder: texts → [B, V].
        recompute: where there are several chunks, keep the vectors of a chunk alone and compute its activations again
            in the backward pass, so that the memory of one chunk is enough for a batch of any size (the effect of
            GradCache, Gao et al. 2021, in a single backward pass).
        query_encoder: texts → [B, V] of queries; they share ``encoder`` where there is none.
    """

    def __init__(self, encoder: nn.Module, recompute: bool = False, query_encoder: nn.Module | None = None):
        super().__init__()
        self.encoder, self.recompute, self.query_encoder = encoder, recompute, query_encoder

    def forward(self, batch: RankingBatch | TextBatch,
                side: str = "docs") -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Vectors of the queries [Q, V] and of the documents [Q·N, V], in the batch's order; of texts of one side
        alone, [B, V]."""
        if isinstance(batch, TextBatch):
            return self._encode(batch, False) if side == "docs" else self._encode_queries(batch, False)
        again = self.recompute and torch.is_grad_enabled() and len(batch.docs) > 1
        docs = _InOrder.apply(batch.doc_order, *(self._encode(chunk, again) for chunk in batch.docs))
        return _InOrder.apply(batch.query_order, *(self._encode_queries(chunk, again) for chunk in batch.queries)), docs

    def _encode_queries(self, text: TextBatch, again: bool) -> torch.Tensor:
        return self._encode(text, again) if self.query_encoder is None else self.query_encoder(**text.arguments())

    def _encode(self, text: TextBatch, again: bool) -> torch.Tensor:
        if not again:
            return self.encoder(**text.arguments())
        return recomputed(functools.partial(_encode_by, self.encoder, text), text.input_ids)


def _encode_by(encoder: nn.Module, text: TextBatch, input_ids: torch.Tensor) -> torch.Tensor:
    return encoder(**{**text.arguments(), "input_ids": input_ids})


class _InOrder(torch.autograd.Function):
    """``torch.cat(chunks)[order]`` with each row copied once: all vectors of a batch may be gigabytes."""

    @staticmethod
    def forward(ctx, order: torch.Tensor, *chunks: torch.Tensor) -> torch.Tensor:
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        ctx.places = places.split([len(chunk) for chunk in chunks])  # where the rows of each chunk belong
        rows = chunks[0].new_empty(len(order), *chunks[0].shape[1:])
        for where, chunk in zip(ctx.places, chunks, strict=True):
            rows[where] = chunk
        return rows

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(gradient[where] for where in ctx.places)


class RankingObjective:
    """Contrastive loss over the global batch, distillation, and sparsity of documents and queries (SPEC §3).

    Args:
        gather: rows of this rank → rows of all ranks, differentiable.
        world: number of ranks.
        teacher: batch → scores [Q, N] of each query's own documents; those that the batch brings where it is not given.
        packed: the model computes texts without padding.
    """

    def __init__(self, config: LossConfig, gather: Callable[[torch.Tensor], torch.Tensor], world: int,
                 teacher: Callable[[RankingBatch], torch.Tensor] | None = None, packed: bool = False):
        self.config, self.gather, self.world, self.packed = config, gather, world, packed
        self.teacher = teacher or (lambda batch: batch.teacher_scores)
        self.lambdas = Lambdas(config)

    def micro_batches(self, step_data: RankingBatch) -> list[RankingBatch]:
        """The one batch: every query meets every document of the global batch, so nothing is accumulated."""
        return [step_data]

    def counts(self, step_data: RankingBatch) -> list[int]:
        """None needed: all ranks compute the loss of the global batch."""
        return []

    def loss(self, forward, batch: RankingBatch, totals: list[float], step: int,
             total_steps: int) -> tuple[torch.Tensor, Metrics]:
        """Every rank computes the loss of the global batch and contributes its share of it."""
        config = self.config
        queries, docs = (self.gather(vectors) for vectors in forward(batch))  # [G, V], [G·N, V]
        queries, docs = _largest(queries, config.top_k_queries), _largest(docs, config.top_k_docs)
        scores, means_q, means_d = losses.scores_and_means(queries, docs)  # [G, G·N]
        contrastive, accuracy = losses.contrastive(scores, batch.n_docs, batch.exclude, config.temperature)
        sparsity_d = losses.REGULARISERS[config.regulariser_docs](means_d, docs)
        sparsity_q = losses.REGULARISERS[config.regulariser_queries](means_q, queries)
        lambda_d, lambda_q = self.lambdas.at(step, total_steps)
        loss = config.contrastive_weight * contrastive + lambda_d * sparsity_d + lambda_q * sparsity_q
        values = {"loss_contrastive": contrastive, f"{config.regulariser_docs}_docs": sparsity_d,
                  f"{config.regulariser_queries}_queries": sparsity_q, "accuracy": accuracy,
                  "terms_docs": losses.active_terms(docs), "terms_queries": losses.active_terms(queries),
                  "lambda_docs": loss.new_tensor(lambda_d), "lambda_queries": loss.new_tensor(lambda_q)}
        if config.distillation != "none":
            values["loss_distillation"] = self._distillation(scores, batch)
            loss = loss + config.distillation_weight * values["loss_distillation"]
        if self.lambdas.controllers and torch.isfinite(loss):  # other steps are left out
            self.lambdas.observe(step, total_steps, values["terms_docs"].item(), values["terms_queries"].item())
        values["loss"] = loss
        return loss / self.world, {name: value.detach() / self.world for name, value in values.items()}

    def _distillation(self, scores: torch.Tensor, batch: RankingBatch) -> torch.Tensor:
        """Distance of each query's own scores from the teacher's, over the global batch."""
        student = losses.own_scores(scores, batch.n_docs)  # [G, N]
        teacher = self.gather(self.teacher(batch).to(student))
        if self.config.distillation == "kl":
            return losses.distribution_gap(student, teacher, self.config.distillation_temperature)
        return losses.margin_gap(student, teacher)

    def state_dict(self) -> dict[str, Any]:
        """What the steering of λ has come to."""
        return self.lambdas.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.lambdas.load_state_dict(state)

    def encode(self, forward, text: TextBatch, side: str) -> torch.Tensor:
        """Lexicon vectors [B, V] of ``docs`` or ``queries``."""
        return forward(text, side)

    def sizes(self, batch: RankingBatch) -> tuple[int, int]:
        """Tokens without and with the padding that is computed."""
        return _sizes([*batch.queries, *batch.docs], self.packed)


def _largest(vectors: torch.Tensor, k: int | None) -> torch.Tensor:
    return vectors if k is None else lexicon.top_k(vectors, k)


def _sizes(texts: list[TextBatch], packed: bool) -> tuple[int, int]:
    tokens = sum(int(t.attention_mask.sum()) for t in texts)
    return tokens, tokens if packed else sum(t.attention_mask.numel() for t in texts)
