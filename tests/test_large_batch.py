"""Large batches in little memory: chunks that are recomputed give the gradients of the plain computation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lexmae.config import LossConfig, NegativesConfig
from lexmae.data import draws, negative_rows
from lexmae.data.batches import RankingData, read_texts
from lexmae.data.negatives import write_negatives
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.train.objectives import RankingModel, RankingObjective

ROOT = Path(__file__).parents[1]
BATCH, PER_QUERY, MICRO_BATCH = 32, 2, 4


@pytest.fixture(scope="module")
def lists(tiny_shards, tmp_path_factory) -> draws.NegativeLists:
    """Negatives with a teacher's scores."""
    folder = tmp_path_factory.mktemp("scored")
    write_negatives(folder / "n.jsonl", (
        (qid, [f"d{i}" for i in range(41)], [(i % 7) / 2 for i in range(41)], dict.fromkeys(found, 3.0))
        for qid, found in tiny_shards.qrels("train").items()))
    config = NegativesConfig(path=str(folder / "n.jsonl"), depth=30)
    negative_rows.build(tiny_shards, "train", config, folder / "lists", distil=True)
    return draws.NegativeLists(folder / "lists")


def test_gradients_are_those_of_the_plain_computation(tiny_shards, lists, model_dir):
    """A batch of 32 in chunks of 4, against one forward pass without chunks and the losses written out."""
    data = RankingData(tiny_shards, "train", lists, NegativesConfig(per_query=PER_QUERY), seed=1, batch=BATCH,
                       micro_batch=MICRO_BATCH)
    config = LossConfig(lambda_docs=0.1, contrastive_weight=0.7, distillation="kl", distillation_weight=1.3)
    lm = backbone.load_masked_lm(str(model_dir)).eval()
    objective = RankingObjective(config, lambda rows: rows, 1)
    batch = data(0)
    assert len(batch.docs) == BATCH * (1 + PER_QUERY) / MICRO_BATCH and len(batch.queries) == BATCH / MICRO_BATCH
    objective.loss(RankingModel(SparseEncoder(lm), recompute=True), batch, [], 0, 10)[0].backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    plain_loss(lm, data, batch, config).backward()
    largest = max(p.grad.abs().max() for p in lm.parameters() if p.grad is not None)
    assert found.keys() == {name for name, p in lm.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        assert (gradient - lm.get_parameter(name).grad).abs().max() < 1e-5 * largest, name


def plain_loss(lm, data: RankingData, batch, config: LossConfig) -> torch.Tensor:
    """The loss of the first step, of all texts at once with their logits in memory."""
    import numpy as np

    from lexmae.data.randomness import KeyedRandom

    positions, rows = data._stream.rows(0, BATCH)
    pairs = data.negatives.judged_pairs()[rows]
    drawn, _ = data.negatives.draw(pairs[:, 0], PER_QUERY, KeyedRandom(1, positions), 8)
    docs = np.concatenate([pairs[:, 1:], drawn], axis=1)
    encoder = SparseEncoder(lm, "reference")
    q = encoder(**read_texts(data.shards, data.queries, pairs[:, 0]).arguments())
    d = encoder(**read_texts(data.shards, data.shards.docs, docs.ravel()).arguments())
    scores = q @ d.T
    own = torch.stack([scores[g, g * 3:g * 3 + 3] for g in range(BATCH)])
    scores = scores.masked_fill(torch.zeros_like(scores, dtype=torch.bool).index_put(
        tuple(batch.exclude), torch.tensor(True)), float("-inf"))
    gap = F.kl_div(own.log_softmax(1), batch.teacher_scores.softmax(1), reduction="batchmean")
    return (config.contrastive_weight * F.cross_entropy(scores, torch.arange(BATCH) * 3)
            + config.lambda_docs * d.abs().mean(0).square().sum() + config.query_weight * q.abs().mean(0).square().sum()
            + config.distillation_weight * gap)


@pytest.mark.slow
def test_512_queries_in_the_memory_of_16():
    """Beyond the vectors, which a contrastive loss needs at once. Allocations are counted, so the figure is exact."""
    spec = importlib.util.spec_from_file_location("large_batch", ROOT / "benchmarks" / "bench_large_batch.py")
    benchmark = sys.modules["large_batch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    args = benchmark.parse([])
    encoder = benchmark.build(args)
    small, large = benchmark.example(16, args, 16 * args.docs), benchmark.example(512, args, 16 * args.docs)
    assert (len(small.docs), len(large.docs), len(large.queries)) == (1, 32, 16)
    plain, chunked = (benchmark.peak_bytes(lambda b=batch, r=recompute: benchmark.step(encoder, b, r, args), "cpu")
                      for batch, recompute in ((small, False), (large, True)))
    vectors = 512 * (1 + args.docs) * args.vocab * 4
    assert vectors < chunked <= plain + vectors
