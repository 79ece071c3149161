"""A fine-tuning step: lexmae against sentence-transformers' model and losses, on the same weights and texts.

    python benchmarks/bench_finetune.py [--input FOLDER] [--size base|mini] [--batch 4] [--negatives 15]

A run is one optimizer step over `--batch` queries with a positive and `--negatives` negatives each: contrastive loss
over all documents, FLOPS on both sides, AdamW. The peer is what its trainer computes in a step: its collator's
tokenisation, `SpladeLoss` around `SparseMultipleNegativesRankingLoss`, backward, update. Losses are compared first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import common
import torch

from lexmae.config import LossConfig, NegativesConfig, OptimizationConfig
from lexmae.data import draws
from lexmae.data.batches import RankingData
from lexmae.data.corpus import Passage, Query, write_beir
from lexmae.data.negatives import write_negatives
from lexmae.data.prepare import prepare
from lexmae.data.shards import Shards
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.train import hardware
from lexmae.train.objectives import RankingModel, RankingObjective

LAMBDA_DOCS, LAMBDA_QUERIES = 0.002, 0.0015


def main() -> None:
    """Compare losses, then time both sides in turn."""
    args = common.make_parser(__doc__, batch=4, negatives=15, chunk=32).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = common.texts(args.input, args.batch * (1 + args.negatives), folder)
        questions = [" ".join(sample[i * (1 + args.negatives)].split()[3:12]) for i in range(args.batch)]
        model = common.model_folder(folder, args.size, sample)
        shards = write_shards(folder, sample, questions, model, args)
        sides = [ours(folder, model, shards, args), peer(model, sample, questions, args)]
        losses = [round(side.run(), 4) for side in sides]
        figures = common.in_turn(sides, args.rounds, args.device)
    common.report("fine-tuning", figures, args, size=args.size, queries=args.batch, documents=len(sample),
                  precision="bf16" if args.bf16 else "fp32", losses=losses)


def write_shards(folder: Path, sample: list[str], questions: list[str], model: Path, args) -> Shards:
    """Each query's positive and negatives as shards and a file of negatives."""
    group = 1 + args.negatives
    qrels = {f"q{i}": {f"d{i * group}": 1} for i in range(args.batch)}
    write_beir(folder / "beir", (Passage(f"d{i}", "", text) for i, text in enumerate(sample)),
               [Query(f"q{i}", text) for i, text in enumerate(questions)], {"train": qrels})
    write_negatives(folder / "negatives.jsonl", ((f"q{i}", [f"d{i * group + j}" for j in range(1, group)])
                                                 for i in range(args.batch)))
    prepare(folder / "beir", folder / "shards", tokenizer=str(model), max_length=512, workers=1)
    return Shards.open(folder / "shards")


def ours(folder: Path, model: Path, shards: Shards, args: argparse.Namespace) -> common.Side:
    """The ranking objective behind the DeepSpeed engine; documents in chunks of similar length."""
    from lexmae.train import engine as engines

    encoder = SparseEncoder(backbone.load_masked_lm(str(model)))
    path = hardware.find("ds_configs/bf16_zero0.json" if args.bf16 else "ds_configs/fp32_zero0.json")
    optimization = OptimizationConfig(lr=1e-7, batch=args.batch)
    engine = engines.Engine(RankingModel(encoder), hardware.compose(path, optimization, 1, accumulate=False),
                            optimization, engines.start_processes())
    negatives = NegativesConfig(str(folder / "negatives.jsonl"), per_query=args.negatives)
    draws.build(shards, "train", negatives, folder / "drawn")
    data = RankingData(shards, "train", draws.NegativeLists(folder / "drawn"), negatives, seed=0, batch=args.batch,
                       micro_batch=args.chunk if args.device == "cpu" else args.batch * (1 + args.negatives))
    objective = RankingObjective(LossConfig(lambda_docs=LAMBDA_DOCS, lambda_queries=LAMBDA_QUERIES), engines.gather, 1)

    def run() -> float:
        loss, _ = objective.loss(engine, data(0).to(engine.device), [], 0, 1)
        engine.expect(1)
        engine.backward(loss)
        engine.step(1e-7)
        return float(loss.detach())

    return common.Side("lexmae", run, args.batch, "queries/s")


def peer(model: Path, sample: list[str], questions: list[str], args: argparse.Namespace) -> common.Side:
    """sentence-transformers in a plain loop."""
    from sentence_transformers import SparseEncoder as Peer
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    encoder = Peer(str(model), device=args.device)
    loss = SpladeLoss(encoder, SparseMultipleNegativesRankingLoss(encoder), document_regularizer_weight=LAMBDA_DOCS,
                      query_regularizer_weight=LAMBDA_QUERIES)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-7, fused=True)
    group = 1 + args.negatives
    # A passage without a title has a `-` in its place in our shards.
    columns = [questions, *([f"- [SEP] {sample[i * group + j]}" for i in range(args.batch)] for j in range(group))]

    def run() -> float:
        encoder.train()
        features = [{name: value.to(args.device) for name, value in encoder.tokenize(texts).items()
                     if isinstance(value, torch.Tensor)} for texts in columns]
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            values = loss(features, torch.zeros(0))
        value = sum(values.values()) if isinstance(values, dict) else values
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return common.Side("sentence-transformers", run, args.batch, "queries/s")


if __name__ == "__main__":
    main()
