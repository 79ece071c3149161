"""A LexMAE pre-training step: lexmae against two usual ways of computing it, on the same weights, texts and masks.

    python benchmarks/bench_pretrain.py [--input FOLDER] [--size base|mini] [--batch 8] [--steps 1] [--no-compile]
        [--padded]

- research: eager attention that returns its weights, logits of all tokens for both losses and the bottleneck, batches
  in random order padded to the longest text;
- sdpa: the same with PyTorch's fused attention, and `torch.compile` where it works.

A run is `--steps` optimizer steps: forward, backward, AdamW. The losses of the first step are compared before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexmae.config import BottleneckConfig, MaskingConfig, OptimizationConfig
from lexmae.data.batches import PretrainBatch, PretrainData
from lexmae.data.corpus import Passage, write_beir
from lexmae.data.prepare import prepare
from lexmae.data.shards import Shards
from lexmae.model import attention, backbone, lexicon
from lexmae.model.decoder import new_decoder
from lexmae.model.pretrainer import Pretrainer
from lexmae.train import hardware
from lexmae.train.objectives import PretrainObjective


class Usual(nn.Module):
    """The pre-training losses by their definition, with the logits of all tokens."""

    def __init__(self, lm: Any, attention: str):
        super().__init__()
        lm.set_attn_implementation(attention)
        self.lm, self.decoder, self.weights = lm, new_decoder(lm, 2), attention == "eager"

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text_mask: Tensor, token_type_ids: Tensor,
                enc_labels: Tensor, dec_input_ids: Tensor, dec_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of both cross entropies."""
        out = self.lm(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
                      output_attentions=self.weights)
        embeddings = backbone.word_embeddings(self.lm)
        vector = lexicon.bottleneck(lexicon.max_pool(out.logits, text_mask), embeddings)
        embedded = backbone.embed(self.lm, dec_input_ids, token_type_ids)
        embedded = torch.cat([vector.to(embedded.dtype).unsqueeze(1), embedded[:, 1:]], dim=1)
        hidden = self.decoder.transform(self.decoder(embedded, attention_mask))
        logits = F.linear(hidden, embeddings, self.decoder.bias)
        return tuple(F.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), reduction="sum")
                     for scores, labels in ((out.logits, enc_labels), (logits, dec_labels)))


def main() -> None:
    """Compare losses, then time the sides in turn."""
    parser = common.training_parser(__doc__, batch=8, steps=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample, model = common.inputs(args, args.batch * args.steps, folder)
        write_beir(folder / "beir", (Passage(str(i), "", text) for i, text in enumerate(sample)), [], {})
        prepare(folder / "beir", folder / "shards", tokenizer=str(model), max_length=144, workers=1)
        shards = Shards.open(folder / "shards")
        tokens = int(shards.docs.lengths.sum())
        sides = [ours(model, shards, args), usual("research", "eager", False, model, shards, args),
                 usual("sdpa" + " + compile" * (not args.no_compile), "sdpa", not args.no_compile, model, shards, args)]
        losses = [side.run() for side in sides]
        common.refuse_difference("losses", (max(losses) - min(losses)) / losses[0], 0.02 if args.bf16 else 1e-4)
        figures = common.in_turn([common.Side(s.name, s.run, tokens, "tokens/s") for s in sides], args.rounds,
                                 args.device)
    common.report("pre-training", figures, args, size=args.size, batch=args.batch, tokens=tokens,
                  precision="bf16" if args.bf16 else "fp32", losses=[round(loss, 4) for loss in losses])


def batches(shards: Shards, args: argparse.Namespace, micro: int) -> list[list[PretrainBatch]]:
    """The steps' micro-batches, with the same masks whatever their size."""
    data = PretrainData(shards, MaskingConfig(), seed=1, batch=args.batch, micro_batch=micro)
    return [data(step) for step in range(args.steps)]


def arguments(batch: PretrainBatch) -> dict[str, Tensor]:
    """Arguments of both models' forward."""
    return {**batch.text.arguments(), "enc_labels": batch.enc_labels, "dec_input_ids": batch.dec_input_ids,
            "dec_labels": batch.dec_labels}


def ours(model: Path, shards: Shards, args: argparse.Namespace) -> common.Side:
    """The Pretrainer behind the DeepSpeed engine, micro-batches sorted by length."""
    from lexmae.train import engine as engines

    torch.manual_seed(0)
    lm = backbone.load_masked_lm(str(model))
    if not args.padded:
        attention.use_packing(lm)
    pretrainer = Pretrainer(lm)
    micro = max(1, args.batch // 2) if args.device == "cpu" else args.batch
    path = hardware.find("ds_configs/bf16_zero0.json" if args.bf16 else "ds_configs/fp32_zero0.json")
    optimization = OptimizationConfig(batch=args.batch, micro_batch=micro)
    engine = engines.Engine(pretrainer, hardware.compose(path, optimization, 1, accumulate=True), optimization,
                            engines.start_processes())
    objective, steps = PretrainObjective(BottleneckConfig()), batches(shards, args, micro)

    def run() -> float:
        first = 0.0
        for number, micro_batches in enumerate(steps):
            totals = [float(n) for n in objective.counts(micro_batches)]
            engine.expect(len(micro_batches))
            for i, batch in enumerate(micro_batches):
                loss, _ = objective.loss(engine, batch.to(engine.device), totals, 0, 1)
                engine.backward(loss)
                first += float(loss.detach()) if number == 0 else 0.0
                if i < len(micro_batches) - 1:
                    engine.end_micro_batch()
            engine.step(1e-5)
        return first

    return common.Side("lexmae", run, 0, "")


def usual(name: str, attention: str, compiled: bool, model: Path, shards: Shards,
          args: argparse.Namespace) -> common.Side:
    """A plain loop over whole batches."""
    torch.manual_seed(0)
    module = Usual(backbone.load_masked_lm(str(model)), attention).to(args.device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    call = torch.compile(module, dynamic=True) if compiled else module
    steps = batches(shards, args, args.batch)

    def run() -> float:
        first = 0.0
        for number, (batch,) in enumerate(steps):
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
                encoder, decoder = call(**arguments(batch.to(torch.device(args.device))))
            loss = encoder / batch.enc_count + decoder / batch.dec_count
            loss.backward()
            first += float(loss.detach()) if number == 0 else 0.0
            optimizer.step()
            optimizer.zero_grad()
        return first

    return common.Side(name, run, 0, "")


if __name__ == "__main__":
    main()
