"""The options of ``tools/evaluate.py``, and which of them go together."""

from __future__ import annotations

import argparse

from lexmae import verification
from lexmae.errors import InputError
from lexmae.model import card
from lexmae.retrieval import engines, metrics


def evaluation(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Add the options to ``parser`` and read the command line; InputError where options contradict each other."""
    _measuring(parser)
    _sweeping(parser.add_argument_group("sweep", "top-k pruning × size of the index × queries/s × effectiveness"))
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if sum([bool(options.run), bool(options.collection), options.sweep]) != 1:
        raise InputError("one of --run, --collection and --sweep is needed")
    if not options.collection and not options.qrels:
        raise InputError("--qrels is needed")
    if options.collection and options.qrels:
        raise InputError("--collection names its own judgements: leave --qrels out")
    if options.compare and len(options.run or []) != 1:
        raise InputError("--compare goes with one --run; several runs are compared without it")
    if options.card and (options.sweep or options.collection or len(options.run) != 1):
        raise InputError("--card goes with one --run")
    if options.card:
        card.check(options.card)
    elif options.data_set:
        raise InputError("--data-set goes with --card")
    if options.queries and not options.docs:
        raise InputError("--queries goes with --docs")
    if options.per_query and not options.json:
        raise InputError("--per-query goes with --json")
    if options.sweep and not (options.docs and options.queries and options.top_k_docs and options.output):
        raise InputError("--sweep needs --docs, --queries, --top-k-docs and --output")
    if not options.sweep and (options.top_k_docs or options.top_k_queries or options.output or options.overwrite):
        raise InputError("--top-k-docs, --top-k-queries, --output and --overwrite go with --sweep")
    if options.sweep and (options.json or options.exclude_self):
        raise InputError("--json and --exclude-self do not go with --sweep; it writes its figures beside --output")
    return options


def _measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", nargs="+", metavar="FILE", help="TREC runs; several are tested against the first: "
                                                                 "paired t-test, corrected by Holm's method")
    parser.add_argument("--qrels", metavar="PATH", help="judgements: a file in TREC or BEIR layout, or a folder (BEIR, "
                                                        "MS MARCO or shards), of which --split is taken")
    parser.add_argument("--split", default="test", help="split of the judgements, where they are given as a folder")
    parser.add_argument("--collection", nargs=2, action="append", metavar=("RUN", "QRELS"),
                        help="in place of --run and --qrels, and as often as there are collections: a run and its "
                             "judgements; the average is printed too")
    parser.add_argument("--compare", metavar="FILE", help="another run, tested against the first query by query")
    parser.add_argument("--measures", nargs="+", metavar="NAME",
                        help="MRR@K, nDCG@K, Recall@K, judged@K or MAP; unless given, "
                             f"{' '.join(metrics.DEFAULT)}, and MRR@10 in a sweep")
    parser.add_argument("--relevance-level", "--relevance", type=int, default=1,
                        help="least relevance that counts as relevant, 2 for TREC DL (nDCG takes all grades)")
    parser.add_argument("--exclude-self", action="store_true", help="leave out the document that bears the query's id "
                                                                     "(ArguAna's queries are documents)")
    parser.add_argument("--docs", metavar="DIR", help="document vectors: also print their sparsity")
    parser.add_argument("--queries", metavar="DIR", help="query vectors, with --docs: also print the FLOPS of the "
                                                         "pair, the mean number of terms that two of them share")
    parser.add_argument("--json", metavar="FILE", help="write the figures, replacing an older file")
    parser.add_argument("--card", metavar="MODEL", help="add the figures to the model's card, its README.md")
    parser.add_argument("--data-set", metavar="NAME", help="its name there; the folder of --qrels when not given")
    parser.add_argument("--per-query", action="store_true", help="also write every query's figures, with --json")


def _sweeping(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sweep", action="store_true", help="index --docs and search --queries with fewer terms each")
    group.add_argument("--top-k-docs", type=int, nargs="+", default=[], metavar="K", help="terms to keep per document")
    group.add_argument("--top-k-queries", type=int, nargs="+", default=[], metavar="K", help="terms to keep per query")
    group.add_argument("--engine", choices=engines.SPARSE, default="exact", help="search engine of the sweep")
    group.add_argument("--hits", type=int, default=1000, help="documents per query at most")
    group.add_argument("--threads", type=int, default=engines.default_threads(), help="threads of the search")
    group.add_argument("--output", metavar="PREFIX", help="writes PREFIX.md, PREFIX.json and PREFIX.png")
    group.add_argument("--overwrite", action="store_true", help="replace what a sweep wrote")
