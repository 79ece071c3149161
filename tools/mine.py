#!/usr/bin/env python
"""Mine negatives: the best ranked documents of each query that are not judged relevant.

  python tools/mine.py --run run.trec --qrels qrels/train.tsv --depth 512 --output negatives.jsonl
  python tools/mine.py --bm25 DIR --split train --qrels qrels/train.tsv --output negatives.jsonl
  python tools/mine.py --bm25 DIR --split dev --run-output bm25.trec

With --bm25 the ranking is BM25's over the text of a folder (BEIR or MS MARCO layout), and may itself be kept as
the baseline's run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from lexmae import cli, verification
from lexmae.data.corpus import read_qrels, write_negatives
from lexmae.data.negatives import Row
from lexmae.errors import InputError
from lexmae.retrieval import engines, mining, reports
from lexmae.retrieval.bm25 import TOKENS
from lexmae.retrieval.runs import Run, read_run, write_run


def main(argv: list[str] | None = None) -> None:
    """Parse, rank or read, mine, report."""
    options = _parse(argv)
    qrels = read_qrels(options.qrels) if options.output else {}
    run = _rank(options, qrels) if options.bm25 else read_run(options.run)
    if options.exclude_self:
        run = run.without_self(options.passages)
    if options.run_output:
        write_run(options.run_output, run, tag="bm25")
        cli.say(f"{options.run_output}: {len(run):,} queries, {run.n_entries / max(len(run), 1):.1f} documents each")
    if options.output:
        _mine(options, run, qrels)


def _mine(options: argparse.Namespace, run: Run, qrels: dict) -> None:
    if not any(query in run and max(judged.values(), default=0) > 0 for query, judged in qrels.items()):
        raise InputError("has no relevant document for any query of the run: do they belong together?", options.qrels)
    if not options.passages:
        mining.refuse_passages(run, qrels, options.run or options.bm25)
    counts = mining.Statistics()
    write_negatives(options.output, _rows(options, run, qrels, counts))
    cli.say(f"{options.output}: {counts.queries:,} queries, {counts.mean_negatives:.1f} negatives each; "
            f"{counts.dropped_positives:,} positives dropped; {counts.without_negatives:,} judged queries without "
            f"negatives; {counts.unjudged:,} queries of the run without positives")


def _rows(options: argparse.Namespace, run: Run, qrels: dict, counts: mining.Statistics) -> Iterator[Row]:
    yield from mining.mine_run(run, qrels, options.depth, counts, options.passages)
    if not counts.queries:
        raise InputError("no judged query has a document that is not judged relevant", options.run or options.bm25)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="FILE", help="TREC run to mine")
    source.add_argument("--bm25", metavar="DIR", help="collection (or shards) to rank with BM25")
    parser.add_argument("--split", help="queries to rank, with --bm25")
    parser.add_argument("--qrels", metavar="FILE", help="judgements, TREC or BEIR layout; needed with --output")
    parser.add_argument("--depth", type=int, default=mining.DEPTH, help="negatives per query at most")
    parser.add_argument("--output", metavar="FILE", help="negatives to write, JSON lines")
    parser.add_argument("--run-output", metavar="FILE", help="BM25's run to write")
    parser.add_argument("--hits", type=int, help="documents BM25 ranks per query; without it 1000 for a run, else as "
                                                 "many as the depth needs")
    parser.add_argument("--tokens", choices=("auto", *TOKENS), default="auto",
                        help="how BM25 breaks words: as Lucene does, or also inside program names; auto looks at "
                             "the text")
    parser.add_argument("--threads", type=int, default=engines.default_threads(), help="threads of the search")
    parser.add_argument("--exclude-self", action="store_true", help="leave out documents that bear the query's id")
    parser.add_argument("--passages", action="store_true", help="the run ranks passages of split documents: leave out "
                                                                "every passage of a judged document, and note the "
                                                                "best of each")
    parser.add_argument("--json", metavar="FILE", help="write BM25's figures, replacing an older file")
    parser.add_argument("--overwrite", action="store_true", help="replace finished outputs")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.bm25 and not options.split:
        raise InputError("--bm25 needs --split, such as train")
    if not options.bm25 and (options.run_output or options.json):
        raise InputError("--run-output and --json go with --bm25")
    split = bool(options.bm25) and mining.ranks_passages(options.bm25)
    if options.bm25 and options.passages and not split:
        raise InputError("--passages goes with --run, or with shards of split documents: BM25 ranks whole documents of "
                         "a collection")
    if options.output and not options.passages and split:
        raise InputError("holds split documents, whose passages BM25 ranks: --passages is needed", options.bm25)
    if not (options.output or options.run_output):
        raise InputError("nothing to write: give --output, or --run-output with --bm25")
    if options.output and not options.qrels:
        raise InputError("--output needs --qrels: positives must not become negatives")
    if min(options.depth, options.threads, options.hits or 1) < 1:
        raise InputError("--depth, --hits and --threads must be at least 1")
    reports.refuse_existing(options.output, options.run_output, overwrite=options.overwrite)


def _rank(options: argparse.Namespace, qrels: dict) -> Run:
    most = max((sum(r > 0 for r in judged.values()) for judged in qrels.values()), default=0)
    needed = options.depth + most + options.exclude_self if options.output else 0
    hits = options.hits or max(needed, 1000 if options.run_output else 1)
    ranked = mining.bm25_run(options.bm25, options.split, hits, options.threads, options.tokens)
    figures = ranked.figures()
    cli.say(f"BM25 ({ranked.tokens}): {figures['queries_per_second']:,} queries/s on {options.threads} threads, "
            f"{ranked.terms_docs:.1f} terms per document, {ranked.index_bytes / 1e6:.1f} MB of postings")
    reports.write_json(options.json, figures)
    return ranked.run


if __name__ == "__main__":
    cli.run(main)
