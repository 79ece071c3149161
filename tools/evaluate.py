#!/usr/bin/env python
"""Measure TREC runs against judgements, compare them, or sweep over pruned vectors.

  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv
  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv --compare bm25.trec --json metrics.json
  python tools/evaluate.py --run run.trec --qrels qrels/dev.tsv --card runs/stage1/model
  python tools/evaluate.py --run bm25.trec stage1.trec stage2.trec --qrels my-folder --split dev
  python tools/evaluate.py --collection nf.trec beir/nfcorpus --collection sci.trec beir/scifact --measures nDCG@10
  python tools/evaluate.py --sweep --docs vectors/docs --queries vectors/dev --qrels qrels/dev.tsv \\
      --top-k-docs 16 32 64 128 --top-k-queries 8 16 --output sweep/exact
Every judged query counts: one without results scores 0. Several runs are tested against the first of them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from lexmae import artifact, cli
from lexmae.model import card
from lexmae.retrieval import evaluation, metrics, options, plots, reports, sweep
from lexmae.retrieval.vectors import SparseVectors


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, print."""
    asked = options.evaluation(cli.make_parser(__doc__), argv)
    settings = evaluation.Settings(asked.measures or (["MRR@10"] if asked.sweep else metrics.DEFAULT),
                                   asked.relevance_level, asked.exclude_self, asked.split)
    if asked.sweep:
        _sweep(asked, settings)
        return
    figures = _collections(asked, settings) if asked.collection else _runs(asked, settings)
    if asked.docs:
        docs = SparseVectors.open(asked.docs, side="docs")
        queries = SparseVectors.open(asked.queries, side="queries") if asked.queries else None
        figures["sparsity"] = metrics.sparsity(docs, queries)
        print("\n" + reports.table([name, f"{value:.2f}"] for name, value in figures["sparsity"].items()))
    reports.write_json(asked.json, figures)


def _runs(asked: argparse.Namespace, settings: evaluation.Settings) -> dict:
    qrels = evaluation.open_qrels(asked.qrels, settings.split)
    names = [*asked.run, *([asked.compare] if asked.compare else [])]
    results = [evaluation.evaluate_file(name, qrels, settings, asked.qrels) for name in names]
    for name, result in zip(names, results, strict=True):
        print(f"{name}: {evaluation.counts(result)}")
    found = [evaluation.figures(result, asked.per_query) for result in results]
    figures = {"run": names[0], "qrels": asked.qrels, **found[0]}
    if asked.compare:
        tests = metrics.compare(*results)
        figures["compare"] = {"run": asked.compare, **found[1], "tests": [dataclasses.asdict(t) for t in tests]}
        print("\n" + evaluation.comparison(tests))
    elif len(names) > 1:
        tested = evaluation.against_first(names, results)
        figures["others"] = [{"run": name, **one, "tests": tested[name]}
                             for name, one in zip(names[1:], found[1:], strict=True)]
        print("\n" + evaluation.side_by_side(names, results, tested))
    else:
        print("\n" + reports.table([name, f"{value:.4f}"] for name, value in results[0].means.items()))
    if asked.card:
        name, split = card.data_set(asked.qrels, settings.split)
        figure = card.Evaluation(asked.data_set or name, split, results[0].n_judged, results[0].means)
        card.add_evaluation(asked.card, figure)
        cli.say(f"{asked.card}: figures added to {card.NAME}")
    return figures


def _collections(asked: argparse.Namespace, settings: evaluation.Settings) -> dict:
    results, average = evaluation.collections(asked.collection, settings)
    names = [qrels for _, qrels in asked.collection]
    print(evaluation.collection_table(names, results, average))
    return {"average": average, "collections": [
        {"run": run, "qrels": qrels, **evaluation.figures(result, asked.per_query)}
        for (run, qrels), result in zip(asked.collection, results, strict=True)]}


def _sweep(asked: argparse.Namespace, settings: evaluation.Settings) -> None:
    outputs = {kind: Path(f"{asked.output}.{kind}") for kind in ("md", "json", "png")}
    reports.refuse_existing(*outputs.values(), overwrite=asked.overwrite)
    qrels = evaluation.open_qrels(asked.qrels, settings.split)
    points = sweep.sweep(SparseVectors.open(asked.docs, side="docs"),
                         SparseVectors.open(asked.queries, side="queries"), qrels, engine=asked.engine,
                         top_k_docs=asked.top_k_docs, top_k_queries=asked.top_k_queries, hits=asked.hits,
                         measures=settings.measures, threads=asked.threads, relevance_level=settings.relevance_level)
    table = sweep.markdown(points)
    print(table, end="")
    with artifact.atomic_file(outputs["md"]) as out:
        out.write(table)
    reports.write_json(outputs["json"], {"engine": asked.engine, "hits": asked.hits, "threads": asked.threads,
                                         "docs": asked.docs, "queries": asked.queries, "qrels": asked.qrels,
                                         "versions": artifact.versions(), "points": sweep.figures(points)})
    if plots.available():
        plots.trade_off(points, outputs["png"], asked.engine)
    cli.say(f"wrote {', '.join(str(path) for path in outputs.values() if path.exists())}"
            + ("" if plots.available() else f"; {plots.HINT}"))


if __name__ == "__main__":
    cli.run(main)
