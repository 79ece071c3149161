"""Encoding passages: lexmae against sentence-transformers' `SparseEncoder.encode`, same weights, texts and vectors.

    python benchmarks/bench_encode.py [--input FOLDER] [--size base|mini] [--passages 64] [--batch 32]

lexmae goes from a folder of texts to vectors on disk, loading the model on the way; its peer has the model loaded and
ends in memory. Their vectors are compared first: ours are rounded to hundredths.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import count
from pathlib import Path

import common
import numpy as np
import torch

from lexmae.data.corpus import Passage, write_beir
from lexmae.data.prepare import prepare
from lexmae.retrieval import encode, vectors


def main() -> None:
    """Compare vectors, then time both sides in turn."""
    args = common.make_parser(__doc__, passages=64, batch=32).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample, model = common.inputs(args, args.passages, folder)
        sides = [ours(folder, model, sample, args), peer(model, sample, args)]
        difference = common.refuse_difference("weights", compare(sides), 0.1 if args.bf16 else 0.0052)
        figures = common.in_turn(sides, args.rounds, args.device)
    common.report("encoding passages", figures, args, size=args.size, passages=args.passages,
                  precision="bf16" if args.bf16 else "fp32", largest_difference=f"{difference:.1e}")


def ours(folder: Path, model: Path, sample: list[str], args: argparse.Namespace) -> common.Side:
    """The two commands that a user calls: tokenise into shards, encode; loading the model and writing included."""
    beir = folder / "beir"
    write_beir(beir, (Passage(str(i), "", text) for i, text in enumerate(sample)), [], {})
    config = encode.EncodeConfig("docs", precision="bf16" if args.bf16 else "fp32")
    runs = count()

    def run() -> vectors.SparseVectors:
        shards, output = (folder / f"{what}-{next(runs)}" for what in ("shards", "vectors"))
        prepare(beir, shards, tokenizer=str(model), max_length=512, workers=1)
        encode.encode(model, shards, output, config)
        return vectors.SparseVectors.open(output)

    return common.Side("lexmae", run, len(sample), "passages/s")


def peer(model: Path, sample: list[str], args: argparse.Namespace) -> common.Side:
    """sentence-transformers, which sorts by length and makes the logits of every token."""
    from sentence_transformers import SparseEncoder as Peer

    encoder = Peer(str(model), device=args.device)

    def run() -> torch.Tensor:
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            # A passage without a title has a `-` in its place in our shards.
            return encoder.encode([f"- [SEP] {text}" for text in sample], batch_size=args.batch,
                                  show_progress_bar=False, convert_to_sparse_tensor=True)

    return common.Side("SparseEncoder.encode", run, len(sample), "passages/s")


def compare(sides: list[common.Side]) -> float:
    """The largest difference between the vectors; half of 0.01 is our rounding."""
    own, theirs = sides[0].run(), sides[1].run().cpu().to_dense().float().numpy()
    dense = np.zeros_like(theirs)
    dense[:, :own.n_terms] = own.to_scipy().toarray() / vectors.SCALE
    return float(np.abs(dense - theirs)[:, :own.n_terms].max())


if __name__ == "__main__":
    main()
