#!/usr/bin/env python
"""Search an index with query vectors and write a TREC run.

  python tools/search.py --index index --queries vectors/dev --hits 1000 --output run.trec
"""

from __future__ import annotations

from lexmae import cli
from lexmae.errors import InputError
from lexmae.retrieval import engines, reports
from lexmae.retrieval.runs import DEFAULT_TAG, write_run
from lexmae.retrieval.vectors import SparseVectors


def main(argv: list[str] | None = None) -> None:
    """Parse, search, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--index", required=True, metavar="DIR", help="index made by tools/index.py")
    parser.add_argument("--queries", required=True, metavar="DIR", help="query vectors made by tools/encode.py")
    parser.add_argument("--hits", type=int, default=1000, help="documents per query at most")
    parser.add_argument("--output", required=True, metavar="FILE", help="TREC run to write")
    parser.add_argument("--threads", type=int, default=engines.default_threads(), help="threads of the search")
    parser.add_argument("--device", default="cpu", help="cuda searches an exact index on a GPU, with the same result")
    parser.add_argument("--top-k", type=int, help="keep only the k largest weights of each query")
    parser.add_argument("--exclude-self", action="store_true", help="leave out the document that bears the query's id "
                                                                     "(ArguAna's queries are documents)")
    parser.add_argument("--tag", default=DEFAULT_TAG, help="last column of the run")
    parser.add_argument("--json", metavar="FILE", help="write the figures, replacing an older file")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run")
    options = parser.parse_args(argv)
    if min(options.hits, options.threads) < 1:
        raise InputError("--hits and --threads must be at least 1")
    reports.refuse_existing(options.output, overwrite=options.overwrite)
    index = engines.open_index(options.index)
    queries = SparseVectors.open(options.queries, side="queries")
    if options.top_k is not None:
        queries = queries.pruned(options.top_k)
    run = index.search(queries, options.hits + options.exclude_self, options.threads, options.device)
    if options.exclude_self:
        run = run.without_self().cut(options.hits)
    figures = {"engine": index.engine, "queries": len(run), "threads": options.threads, "device": options.device,
               "hits": options.hits, "seconds": round(run.seconds, 4),
               "queries_per_second": round(len(run) / max(run.seconds, 1e-9), 1),
               "without_results": sum(not len(run.scores(query)) for query in run),
               "terms_queries": round(queries.mean_active, 3)}
    where = f"{options.threads} threads" if options.device == "cpu" else options.device
    reports.write_json(options.json, figures)
    write_run(options.output, run, tag=options.tag)
    cli.say(f"{options.output}: {len(run):,} queries of {queries.mean_active:.1f} terms each, "
            f"{run.n_entries / max(len(run), 1):.1f} documents each ({figures['without_results']:,} without any); "
            f"{figures['queries_per_second']:,} queries/s on {where} ({index.engine})")


if __name__ == "__main__":
    cli.run(main)
