#!/usr/bin/env python
"""Measure a TREC run against judgements, and compare it with another run.

  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv
  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv --compare bm25.trec --json metrics.json
  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv --card runs/stage1/model

Every judged query counts: one without results scores 0.
"""

from __future__ import annotations

import argparse
import dataclasses

from lexmae import cli
from lexmae.data.corpus import read_qrels
from lexmae.errors import InputError
from lexmae.model import card
from lexmae.retrieval import metrics, reports
from lexmae.retrieval.metrics import Comparison, Result
from lexmae.retrieval.runs import read_run
from lexmae.retrieval.vectors import SparseVectors


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print."""
    options = _parse(argv)
    qrels = read_qrels(options.qrels)
    result = _evaluate(options, options.run, qrels)
    print(f"{options.run}: {_counts(result)}")
    figures = {"run": options.run, "qrels": options.qrels, **_figures(result)}
    if options.compare:
        other = _evaluate(options, options.compare, qrels)
        print(f"{options.compare}: {_counts(other)}")
        tests = metrics.compare(result, other)
        figures["compare"] = {"run": options.compare, **_figures(other),
                              "tests": [dataclasses.asdict(test) for test in tests]}
        print("\n" + _comparison(tests))
    else:
        print("\n" + reports.table([name, f"{value:.4f}"] for name, value in result.means.items()))
    if options.docs:
        figures["sparsity"] = _sparsity(options)
        print("\n" + reports.table([name, f"{value:.2f}"] for name, value in figures["sparsity"].items()))
    if options.per_query:
        figures["per_query"] = result.per_query
    reports.write_json(options.json, figures)
    if options.card:
        name, split = card.data_set(options.qrels)
        figure = card.Evaluation(options.data_set or name, split, result.n_judged, result.means)
        card.add_evaluation(options.card, figure)
        cli.say(f"{options.card}: figures added to {card.NAME}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--run", required=True, metavar="FILE", help="TREC run")
    parser.add_argument("--qrels", required=True, metavar="FILE", help="judgements, TREC or BEIR layout")
    parser.add_argument("--compare", metavar="FILE", help="another run, tested against the first query by query")
    parser.add_argument("--measures", nargs="+", default=list(metrics.DEFAULT), metavar="NAME",
                        help="MRR@K, nDCG@K, Recall@K or MAP")
    parser.add_argument("--relevance-level", type=int, default=1,
                        help="least relevance that counts as relevant (nDCG takes all grades)")
    parser.add_argument("--docs", metavar="DIR", help="document vectors: also print their sparsity")
    parser.add_argument("--queries", metavar="DIR", help="query vectors, with --docs: also print the FLOPS of the pair")
    parser.add_argument("--json", metavar="FILE", help="write the figures, replacing an older file")
    parser.add_argument("--per-query", action="store_true", help="also write every query's figures, with --json")
    parser.add_argument("--card", metavar="MODEL", help="add the figures to the model's card, its README.md")
    parser.add_argument("--data-set", metavar="NAME", help="its name there; the folder of --qrels when not given")
    options = parser.parse_args(argv)
    if options.card:
        card.check(options.card)
    elif options.data_set:
        raise InputError("--data-set goes with --card")
    if options.queries and not options.docs:
        raise InputError("--queries goes with --docs")
    if options.per_query and not options.json:
        raise InputError("--per-query goes with --json")
    return options


def _evaluate(options: argparse.Namespace, run: str, qrels: dict) -> Result:
    result = metrics.evaluate(read_run(run), qrels, options.measures, options.relevance_level)
    if result.n_without_results == result.n_judged:
        raise InputError(f"has none of the queries judged in {options.qrels}: do they belong together?", run)
    return result


def _counts(result: Result) -> str:
    text = f"{result.n_judged:,} judged queries, {result.n_without_results:,} of them without results"
    if result.n_without_relevant:
        text += f", {result.n_without_relevant:,} without a relevant document"
    if result.n_unjudged:
        text += f"; {result.n_unjudged:,} queries of the run have no judgements and are left out"
    return text


def _figures(result: Result) -> dict:
    return {"means": result.means, "judged": result.n_judged, "without_results": result.n_without_results,
            "without_relevant": result.n_without_relevant, "unjudged": result.n_unjudged}


def _comparison(tests: list[Comparison]) -> str:
    rows = [("", "run", "compared", "difference", "better/worse", "p (t-test)", "p (randomised)")]
    rows += [(test.measure, f"{test.mean_a:.4f}", f"{test.mean_b:.4f}", f"{test.mean_a - test.mean_b:+.4f}",
              f"{test.better}/{test.worse}", f"{test.p_t:.4g}", f"{test.p_randomisation:.4g}") for test in tests]
    return reports.table(rows)


def _sparsity(options: argparse.Namespace) -> dict[str, float]:
    docs = SparseVectors.open(options.docs, side="docs")
    return metrics.sparsity(docs, SparseVectors.open(options.queries, side="queries") if options.queries else None)


if __name__ == "__main__":
    cli.run(main)
