"""Peak memory and time of a fine-tuning step: a small batch whose activations are all kept, and a large one in chunks
that are recomputed in the backward pass.

    python benchmarks/bench_large_batch.py [--queries 512 --plain-queries 16 --docs 2 --micro-batch 16]

Contrastive loss, FLOPS and distillation of a scratch BERT on texts of 1/3 to all of `--length`. Memory is what is
allocated during the step beyond the weights and their gradients: on a CPU by torch's profiler, on a GPU by its
allocator. `vectors` is the size of all vectors of the large batch, which a contrastive loss needs at once. The last
line is the largest difference between the gradients of both forms on the small batch, relative to the largest gradient.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch

from lexmae.config import LossConfig
from lexmae.data.batches import RankingBatch, TextBatch
from lexmae.model import backbone
from lexmae.model.encoder import SparseEncoder
from lexmae.train.objectives import RankingModel, RankingObjective

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
SIZES = {"queries": 512, "plain-queries": 16, "docs": 2, "micro-batch": 16, "length": 48, "layers": 2, "hidden": 64,
         "vocab": 2000}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> SparseEncoder:
    """An encoder without dropout, with gradients that exist already."""
    torch.manual_seed(0)
    size = {
        "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": max(1, args.hidden // 64),
        "intermediate_size": 4 * args.hidden, "max_position_embeddings": args.length,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    encoder = SparseEncoder(backbone.create_masked_lm("bert", args.vocab, SPECIAL, size)).to(args.device)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return encoder


def texts(lengths: torch.Tensor, args: argparse.Namespace, chunk: int) -> tuple[list[TextBatch], torch.Tensor]:
    """Random texts in chunks, longest first, and the order that undoes it."""
    order = lengths.argsort(descending=True, stable=True)
    chunks = []
    for part in order.split(chunk):
        attention = torch.arange(int(lengths[part].max())) < lengths[part].unsqueeze(1)
        words = torch.stack([torch.arange(attention.shape[1]) * 7 + row * 13 for row in part])
        ids = torch.where(attention, words % (args.vocab - 5) + 5, 0)
        text = attention & (torch.arange(attention.shape[1]) > 0)
        chunks.append(TextBatch(ids, attention.long(), text, torch.zeros_like(ids)).to(args.device))
    return chunks, order.argsort().to(args.device)


def example(queries: int, args: argparse.Namespace, chunk: int) -> RankingBatch:
    """A batch of so many queries, each with `args.docs` documents; the texts depend on the sizes alone."""
    generator = torch.Generator().manual_seed(queries)
    lengths = torch.randint(args.length // 3, args.length + 1, (queries * args.docs,), generator=generator)
    docs, doc_order = texts(lengths, args, chunk)
    asked, query_order = texts((lengths[:: args.docs] // 2).clamp_min(3), args, chunk)
    teacher = torch.randn(queries, args.docs, generator=generator).to(args.device)
    none = torch.zeros(2, 0, dtype=torch.int64, device=args.device)
    return RankingBatch(asked, query_order, docs, doc_order, args.docs, none, teacher)


def step(encoder: SparseEncoder, batch: RankingBatch, recompute: bool, args: argparse.Namespace) -> None:
    """Forward and backward; gradients are added to those of the weights."""
    model = RankingModel(encoder, recompute)
    objective = RankingObjective(LossConfig(distillation="kl"), lambda rows: rows, 1)
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
        loss, _ = objective.loss(model, batch, [], 0, 1)
    loss.backward()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that is allocated at a time during `run`, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(encoder: SparseEncoder, args: argparse.Namespace) -> float:
    """Largest difference between the gradients of a plain and of a recomputed step on the small batch, relative."""
    found = []
    for recompute, chunk in ((False, 10**9), (True, max(1, args.micro_batch // 4))):
        for parameter in encoder.parameters():
            parameter.grad.zero_()
        step(encoder, example(args.plain_queries, args, chunk), recompute, args)
        found.append(torch.cat([p.grad.flatten().double() for p in encoder.parameters()]))
    return ((found[0] - found[1]).abs().max() / found[0].abs().max()).item()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Bytes, seconds per query, and the difference of the gradients."""
    encoder = build(args)
    small, large = example(args.plain_queries, args, 10**9), example(args.queries, args, args.micro_batch)
    found = {"vectors": args.queries * (1 + args.docs) * args.vocab * 4}
    for name, batch, recompute in (("plain", small, False), ("chunked", large, True)):
        step(encoder, batch, recompute, args)  # warm up
        found[f"{name}_seconds"] = timed(lambda b=batch, r=recompute: step(encoder, b, r, args), args.device)
        found[name] = peak_bytes(lambda b=batch, r=recompute: step(encoder, b, r, args), args.device)
    return found | {"difference": difference(encoder, args)}


def main() -> None:
    """Print both sides and their ratios."""
    args = parse()
    print(f"{args} torch {torch.__version__} threads {torch.get_num_threads()}")
    found, mega = measure(args), 1e-6
    for name, queries in (("plain", args.plain_queries), ("chunked", args.queries)):
        print(f"{name:8} {queries:6} queries   peak {found[name] * mega:9.1f} MB   "
              f"{found[f'{name}_seconds'] / queries * 1e3:8.2f} ms per query")
    print(f"vectors of {args.queries} queries {found['vectors'] * mega:.1f} MB   peak beyond them / plain peak "
          f"{(found['chunked'] - found['vectors']) / found['plain']:.2f}")
    print(f"largest difference of gradients, relative: {found['difference']:.1e}")


if __name__ == "__main__":
    main()
