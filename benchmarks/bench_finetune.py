"""A fine-tuning step: lexmae against sentence-transformers' SparseEncoderTrainer, on the same weights and texts.

    python benchmarks/bench_finetune.py [--input FOLDER] [--size base|mini] [--batch 2] [--negatives 15]
        [--padded]

A step is one optimizer update over `--batch` queries with a positive and `--negatives` negatives each: reading
tokenised texts for lexmae, the trainer's data loader and collator for the peer, contrastive loss over all documents,
FLOPS on both sides (`SpladeLoss` around `SparseMultipleNegativesRankingLoss`), gradients clipped at 1, AdamW. The
trainer runs one training; after each of its steps it waits while lexmae makes one. Losses of the first step are
compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import common
from transformers import PrinterCallback, Trainer, TrainerCallback

from lexmae.config import LossConfig, NegativesConfig, OptimizationConfig
from lexmae.data import draws, negative_rows
from lexmae.data.batches import RankingData
from lexmae.data.corpus import Passage, Query, write_beir
from lexmae.data.negatives import write_negatives
from lexmae.data.prepare import prepare
from lexmae.data.shards import Shards
from lexmae.model import attention, backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.train import hardware
from lexmae.train.objectives import RankingModel, RankingObjective

LAMBDA_DOCS, LAMBDA_QUERIES, LR = 0.002, 0.0015, 1e-7


def main() -> None:
    """One step of each side to warm up, compared, then timed in turn."""
    args = common.training_parser(__doc__, batch=2, negatives=15, chunk=32).parse_args()
    if find_spec("accelerate") is None:
        raise SystemExit("the trainer of sentence-transformers needs accelerate: pip install accelerate")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample, model = common.inputs(args, args.batch * (1 + args.negatives), folder)
        questions = [" ".join(sample[i * (1 + args.negatives)].split()[3:12]) for i in range(args.batch)]
        shards = write_shards(folder, sample, questions, model, args)
        turns = Turns(args)  # before our engine joins its group of ranks, which the trainer would take for its own
        trainer = peer(model, sample, questions, folder, turns, args)
        turns.own.run = ours(folder, model, shards, args)
        trainer.train()
        first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
        losses = [round(turns.loss, 4), round(first, 4)]
    difference = abs(losses[0] - losses[1]) / losses[0]
    common.refuse_difference("losses", difference, 0.02 if args.bf16 else 1e-4)
    common.report("fine-tuning", turns.clock.figures(), args, size=args.size, queries=args.batch, documents=len(sample),
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


def ours(folder: Path, model: Path, shards: Shards, args: argparse.Namespace) -> Callable[[], float]:
    """The ranking objective behind the DeepSpeed engine; documents in chunks of similar length."""
    from lexmae.train import engine as engines

    lm, packed = backbone.load_masked_lm(str(model)), not args.padded
    if packed:
        attention.use_packing(lm)
    encoder = SparseEncoder(lm)
    path = hardware.find("ds_configs/bf16_zero0.json" if args.bf16 else "ds_configs/fp32_zero0.json")
    optimization = OptimizationConfig(lr=LR, batch=args.batch, clip=1.0)
    engine = engines.Engine(RankingModel(encoder), hardware.compose(path, optimization, 1, accumulate=False),
                            optimization, engines.start_processes())
    negatives = NegativesConfig(str(folder / "negatives.jsonl"), per_query=args.negatives)
    negative_rows.build(shards, "train", negatives, folder / "drawn")
    chunk = args.chunk if args.device == "cpu" else args.batch * (1 + args.negatives)
    data = RankingData(shards, "train", draws.NegativeLists(folder / "drawn"), negatives, seed=0, batch=args.batch,
                       micro_batch=chunk, packed=packed)
    objective = RankingObjective(LossConfig(lambda_docs=LAMBDA_DOCS, lambda_queries=LAMBDA_QUERIES), engines.gather, 1,
                                 packed=packed)

    def run() -> float:
        loss, _ = objective.loss(engine, data(0).to(engine.device), [], 0, 1)
        engine.expect(1)
        engine.backward(loss)
        engine.step(LR)
        return float(loss.detach())

    return run


def peer(model: Path, sample: list[str], questions: list[str], folder: Path, turns: TrainerCallback,
         args: argparse.Namespace) -> Trainer:
    """The trainer with its data, whose full weight of FLOPS holds from the first step; it needs accelerate."""
    from datasets import Dataset
    from sentence_transformers import SparseEncoder as Peer
    from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    group = 1 + args.negatives
    # A passage without a title has a `-` in its place in our shards.
    names = ["positive", *(f"negative_{j}" for j in range(1, group))]
    columns = {"query": questions} | {column: [f"- [SEP] {sample[i * group + j]}" for i in range(args.batch)]
                                      for j, column in enumerate(names)}
    encoder = Peer(str(model), device=args.device)
    loss = SpladeLoss(encoder, SparseMultipleNegativesRankingLoss(encoder), document_regularizer_weight=LAMBDA_DOCS,
                      query_regularizer_weight=LAMBDA_QUERIES)
    settings = SparseEncoderTrainingArguments(
        str(folder / "peer"), num_train_epochs=args.rounds + 1, per_device_train_batch_size=args.batch,
        learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused", weight_decay=0.01,
        bf16=args.bf16,
        use_cpu=args.device == "cpu", logging_steps=1, disable_tqdm=True, save_strategy="no", report_to="none")
    trainer = SparseEncoderTrainer(model=encoder, args=settings, train_dataset=Dataset.from_dict(columns), loss=loss,
                                   callbacks=[turns])
    for callback in (PrinterCallback, SpladeRegularizerWeightSchedulerCallback):
        trainer.remove_callback(callback)
    return trainer


class Turns(TrainerCallback):
    """The trainer's steps by the clock, each from the end of our step before it, the reading of its batch included."""

    def __init__(self, args: argparse.Namespace):
        self.own, self.peer = (common.Side(name, lambda: None, args.batch, "queries/s")
                               for name in ("lexmae", "SparseEncoderTrainer"))
        self.clock, self.last, self.loss = common.Clock([self.own, self.peer], args.device), args.rounds, 0.0
        self._running = ExitStack()

    def on_train_begin(self, args, state, control, **_):
        self._running.enter_context(self.clock.run(self.peer, counts=False))

    def on_step_end(self, args, state, control, **_):
        self._running.close()
        warm = state.global_step > 1
        with self.clock.run(self.own, counts=warm):
            loss = self.own.run()
        self.loss = self.loss if warm else loss
        if state.global_step <= self.last:
            self._running.enter_context(self.clock.run(self.peer))


if __name__ == "__main__":
    main()
