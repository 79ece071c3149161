#!/usr/bin/env python
"""Search an index with query vectors and write a TREC run; or fuse runs into one (hybrid search).

  python tools/search.py --index index --queries vectors/dev --hits 1000 --output run.trec
  python tools/search.py --index index --queries vectors/dev --hits 100 --max-passage --output run.trec
  python tools/search.py --fuse sparse.trec dense.trec --fusion rrf --output hybrid.trec
What another program printed while it searched (Anserini) is kept beside the run, as OUTPUT.log.
"""

from __future__ import annotations

import argparse

from lexmae import artifact, cli, verification
from lexmae.errors import InputError
from lexmae.retrieval import engines, fusion, maxp, reports
from lexmae.retrieval.runs import DEFAULT_TAG, Run, check_tag, read_run, write_run


def main(argv: list[str] | None = None) -> None:
    """Parse, search or fuse, report."""
    options = _parse(argv)
    check_tag(options.tag)
    reports.refuse_existing(options.output, overwrite=options.overwrite)
    found, figures, told = _fuse(options) if options.fuse else _search(options)
    if options.exclude_self:
        found = found.without_self().cut(options.hits)
    figures |= {"queries": len(found), "hits": options.hits,
                "without_results": sum(not len(found.scores(query)) for query in found)}
    reports.write_json(options.json, figures)
    write_run(options.output, found, tag=options.tag)
    cli.say(f"{options.output}: {len(found):,} queries, {found.n_entries / max(len(found), 1):.1f} documents each "
            f"({figures['without_results']:,} without any); {told}")


def _search(options: argparse.Namespace) -> tuple[Run, dict, str]:
    index = engines.open_index(options.index)
    if options.effort is not None:
        index.set_effort(options.effort)
    queries = index.open_queries(options.queries)
    if options.top_k is not None:
        if index.engine in engines.DENSE:
            raise InputError("--top-k is for sparse vectors")
        queries = queries.pruned(options.top_k)
    hits = options.hits + options.exclude_self
    if options.max_passage:
        run = maxp.search(index, queries, hits, options.threads)
    else:
        run = index.search(queries, hits, options.threads, options.device)
    if index.log:
        with artifact.atomic_file(f"{options.output}.log") as out:
            out.write(index.log)
    where = f"{options.threads} threads" if options.device == "cpu" else options.device
    rate = round(len(run) / max(run.seconds, 1e-9), 1)
    figures = {"engine": index.engine, "threads": options.threads, "device": options.device,
               "max_passage": options.max_passage, "effort": options.effort, "seconds": round(run.seconds, 4),
               "queries_per_second": rate}
    long = f"{queries.dimensions} dimensions" if index.engine in engines.DENSE else f"{queries.mean_active:.1f} terms"
    if index.engine not in engines.DENSE:
        figures["terms_queries"] = round(queries.mean_active, 3)
    return run, figures, f"{long} a query, {rate:,} queries/s on {where} ({index.engine})"


def _fuse(options: argparse.Namespace) -> tuple[Run, dict, str]:
    method, k = options.fusion or "rrf", fusion.RRF_K if options.rrf_k is None else options.rrf_k
    run = fusion.fuse([read_run(path) for path in options.fuse], method, weights=options.weights, k=k,
                      hits=options.hits + options.exclude_self)
    figures = {"fused": options.fuse, "fusion": method, "weights": options.weights}
    return run, figures, f"{len(options.fuse)} runs fused ({method})"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--index", metavar="DIR", help="index made by tools/index.py")
    parser.add_argument("--queries", metavar="DIR", help="query vectors made by tools/encode.py")
    parser.add_argument("--fuse", nargs="+", metavar="RUN", help="in place of the two: runs to fuse into one")
    parser.add_argument("--fusion", choices=tuple(fusion.METHODS),
                        help="rrf, the default, adds reciprocal ranks; min-max and z-score add scores, normalised per "
                             "query")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of the fused runs; all 1 otherwise")
    parser.add_argument("--rrf-k", type=int, help=f"of rrf: added to every rank; {fusion.RRF_K} unless given")
    parser.add_argument("--hits", type=int, default=1000, help="documents per query at most")
    parser.add_argument("--output", required=True, metavar="FILE", help="TREC run to write")
    parser.add_argument("--threads", type=int, default=engines.default_threads(), help="threads of the search")
    parser.add_argument("--device", default="cpu", help="cuda searches an exact index on a GPU, with the same result")
    parser.add_argument("--top-k", type=int, help="keep only the k largest weights of each query")
    parser.add_argument("--effort", type=float, help="of an approximate engine: 1 unless given; more finds more of the "
                                                     "best documents, more slowly")
    parser.add_argument("--exclude-self", action="store_true", help="leave out the document that bears the query's id "
                                                                     "(ArguAna's queries are documents)")
    parser.add_argument("--max-passage", action="store_true", help="rank documents by their best passage, where the "
                                                                   "index holds passages of split documents")
    parser.add_argument("--tag", default=DEFAULT_TAG, help="last column of the run")
    parser.add_argument("--json", metavar="FILE", help="write the figures, replacing an older file")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if min(options.hits, options.threads) < 1:
        raise InputError("--hits and --threads must be at least 1")
    if options.fuse and (options.index or options.queries):
        raise InputError("--fuse takes the place of --index and --queries")
    if not options.fuse and not (options.index and options.queries):
        raise InputError("--index and --queries are needed, or --fuse with runs")
    if options.max_passage and options.device != "cpu":
        raise InputError("--max-passage searches on the CPU: leave --device out")
    if (options.weights or options.fusion or options.rrf_k is not None) and not options.fuse:
        raise InputError("--fusion, --rrf-k and --weights go with --fuse")
    if options.fuse and (options.max_passage or options.effort is not None or options.top_k is not None):
        raise InputError("--max-passage, --effort and --top-k go with --index")
    return options


if __name__ == "__main__":
    cli.run(main)
