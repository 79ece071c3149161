#!/usr/bin/env python
"""Tokenise a collection once, into shards that training and encoding read.

The input is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/), an MS MARCO folder (collection.tsv or
fullpsgs.tsv, *.query.txt, qrels.*.tsv), or the name of a dataset on the Hugging Face hub (owner/name).
"""

from __future__ import annotations

from lexmae import artifact, cli
from lexmae.data.prepare import prepare


def main(argv: list[str] | None = None) -> None:
    """Parse, prepare, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--input", required=True, metavar="DIR", help="the collection: a folder, or owner/name"
    )
    parser.add_argument("--output", required=True, metavar="SHARDS", help="the directory to write")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--tokenizer", metavar="NAME_OR_DIR", help="a tokenizer of the hub, or its folder")
    choice.add_argument(
        "--train-tokenizer", type=int, metavar="N", help="train a WordPiece of N entries instead"
    )
    parser.add_argument(
        "--max-length", type=int, default=144, help="tokens of a document, special tokens included"
    )
    parser.add_argument(
        "--query-length", type=int, default=32, help="tokens of a query, special tokens included"
    )
    parser.add_argument(
        "--split-documents", action="store_true", help="cut documents longer than that into overlapping passages"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="tokens from the beginning of a passage to the next one's; half of --max-length when not given",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="threads that tokenise; all cores when not given")
    args = parser.parse_args(argv)
    prepare(
        args.input,
        args.output,
        tokenizer=args.tokenizer,
        train_tokenizer=args.train_tokenizer,
        max_length=args.max_length,
        query_length=args.query_length,
        split_documents=args.split_documents,
        stride=args.stride,
        workers=args.workers,
    )
    report(artifact.read(args.output))


def report(manifest: artifact.Manifest) -> None:
    """Print what the shards hold."""
    print(
        f"{manifest.path}: vocabulary {manifest.extra['vocab_size']}, {manifest.extra['token_dtype']} tokens"
    )
    for name, row in manifest.extra["lengths"].items():
        tokens = f"mean {row['mean']}, median {row['p50']:g}, 95% {row['p95']:g}, max {row['max']}"
        print(f"  {name}: {row['rows']:,} rows; tokens {tokens}; cut {row['truncated']:.1%}")
    if "passages" in manifest.counts:
        documents, rows, stride = manifest.counts["documents"], manifest.counts["passages"], manifest.config["stride"]
        print(f"  {documents:,} documents in {rows:,} passages, stride {stride}")
    for name, count in manifest.counts.items():
        if name.startswith("judgements."):
            print(f"  {name}: {count:,}")


if __name__ == "__main__":
    cli.run(main)
