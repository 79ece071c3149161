#!/usr/bin/env python
"""Encode documents or queries into vectors, sparse or dense, on one device or, through deepspeed, on all.

  python tools/encode.py --model runs/stage1/model --data shards --side docs --output vectors/docs
  deepspeed tools/encode.py --model M --data SHARDS --side queries --split dev --output VECTORS
  python tools/encode.py --model M --data SHARDS --side docs --representation cls --output dense/docs
A run that was stopped goes on with what is missing.
"""

from lexmae import cli, verification
from lexmae.errors import InputError


def main(argv: list[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--data", required=True, help="shards made by tools/prepare.py")
    parser.add_argument("--side", required=True, choices=("docs", "queries"), help="what to encode")
    parser.add_argument("--split", help="split of the queries, such as dev")
    parser.add_argument("--output", required=True, help="folder of vectors to write")
    parser.add_argument("--representation", choices=("lexicon", "bottleneck", "cls", "mean"), default="lexicon",
                        help="sparse vectors over the vocabulary, or dense ones for the engine faiss: LexMAE's "
                             "bottleneck, the last hidden state of [CLS], or the mean of all (sentence encoders)")
    parser.add_argument("--top-k", type=int, help="keep the k largest weights of each text")
    parser.add_argument("--threshold", type=float, help="leave out weights below this; the smallest weight is 0.01")
    parser.add_argument("--batch-tokens", type=int,
                        help="most tokens of a batch, padding included; by default 2048 on a CPU, 16384 on a GPU")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="auto is bf16 on a GPU that has it, fp32 elsewhere")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if options.side == "queries" and not options.split:
        raise InputError("--side queries needs --split")
    if options.side == "docs" and options.split:
        raise InputError("--split goes with --side queries: documents belong to no split")
    if options.threshold is not None and not 0 < options.threshold < float("inf"):
        raise InputError("--threshold must be above 0")
    if any(value is not None and value < 1 for value in (options.top_k, options.batch_tokens)):
        raise InputError("--top-k and --batch-tokens must be at least 1")

    from lexmae.retrieval import encode, encode_dense  # torch, once the arguments are known to be good

    config = encode.EncodeConfig(options.side, options.split, options.top_k, options.batch_tokens, options.precision,
                                 options.threshold)
    if options.representation == "lexicon":
        encode.encode(options.model, options.data, options.output, config, overwrite=options.overwrite)
    else:
        encode_dense.encode(options.model, options.data, options.output, config, options.representation,
                            overwrite=options.overwrite)


if __name__ == "__main__":
    cli.run(main)
