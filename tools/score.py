#!/usr/bin/env python
"""Score documents with a teacher: a file of negatives for distillation, or the top of a run ranked anew.

  deepspeed tools/score.py --model runs/rerank/model --data shards --split train --negatives N.jsonl --output S.jsonl
  python tools/score.py --model M --data shards --split dev --run run.trec --depth 200 --output reranked.trec
  python tools/score.py --vectors dense/docs dense/train --scale 20 --data shards --split train --negatives N --output S
The teacher is a cross-encoder, or a bi-encoder by its vectors, whose dot products are the scores.

The scored negatives hold the scores of the judged positives too. In a run, the documents below the depth keep their
order behind the reranked ones. A command that was stopped goes on with what is missing.
"""

from lexmae import cli, verification
from lexmae.errors import InputError


def main(argv: list[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--model", help="folder of a cross-encoder, or hub name")
    teacher.add_argument("--vectors", nargs=2, metavar=("DOCS", "QUERIES"), help="vectors made by tools/encode.py")
    parser.add_argument("--scale", type=float, help="factor of the dot products of --vectors, 1 when not given; about "
                                                    "20 for --representation mean")
    parser.add_argument("--data", required=True, help="shards made by tools/prepare.py")
    parser.add_argument("--split", required=True, help="split of the queries, such as train")
    source.add_argument("--negatives", metavar="FILE", help="negatives to score")
    source.add_argument("--run", metavar="FILE", help="TREC run to rerank")
    parser.add_argument("--output", required=True, metavar="FILE", help="scored negatives, or reranked run, to write")
    parser.add_argument("--depth", type=int, help="documents at the top of each list; all when not given")
    parser.add_argument("--max-length", type=int, help="tokens of query and document together; when not given, as the "
                                                       "model was trained")
    parser.add_argument("--batch-tokens", type=int,
                        help="padded tokens per batch; by default 2048 on a CPU, 16384 on a GPU")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="auto is bf16 on a GPU that has it, fp32 elsewhere")
    parser.add_argument("--json", metavar="FILE", help="write numbers and speed, replacing an older file")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if any(value is not None and value < 1 for value in (options.depth, options.max_length, options.batch_tokens)):
        raise InputError("--depth, --max-length and --batch-tokens must be at least 1")

    unused = ("max_length", "batch_tokens") if options.vectors else ("scale",)
    for name in unused:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with {'--model' if options.vectors else '--vectors'}")
    if options.scale is not None and not 0 < options.scale < float("inf"):
        raise InputError("--scale must be above 0")

    from lexmae.retrieval import reports, score, score_vectors  # torch, once the arguments are known to be good

    config = score.ScoreConfig(options.split, options.depth, options.max_length, options.batch_tokens,
                               options.precision)
    what = {"negatives": options.negatives, "run": options.run, "overwrite": options.overwrite}
    if not options.vectors:
        figures = score.score(options.model, options.data, options.output, config, **what)
    elif cli.is_main_rank():  # too little work to share it
        figures = score_vectors.score(*options.vectors, options.data, options.output, config, options.scale or 1.0,
                                      **what)
    if cli.is_main_rank():
        reports.write_json(options.json, score.speed(figures))


if __name__ == "__main__":
    cli.run(main)
