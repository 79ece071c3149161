"""What evaluation does beyond one run and one file of judgements: finding judgements, several runs side by side,
several collections and their average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmae import artifact
from lexmae.data.corpus import Corpus, read_qrels
from lexmae.errors import InputError
from lexmae.retrieval import metrics, reports
from lexmae.retrieval.metrics import Comparison, Qrels, Result
from lexmae.retrieval.runs import read_run


@dataclass(frozen=True)
class Settings:
    """How runs are measured.

    Attributes:
        measures: see ``metrics.evaluate``.
        relevance_level: least relevance that counts as relevant; 2 for TREC DL. nDCG takes all grades.
        exclude_self: leave out documents that bear the query's own id (ArguAna, Quora).
        split: whose judgements a folder gives.
    """

    measures: Sequence[str] = metrics.DEFAULT
    relevance_level: int = 1
    exclude_self: bool = False
    split: str = "test"


def open_qrels(path: str | Path, split: str) -> Qrels:
    """Judgements of a file (TREC or BEIR layout), or of a split of a BEIR folder, an MS MARCO folder, or shards."""
    path = Path(path)
    if not path.is_dir():
        return read_qrels(path)
    kept = path / "qrels" / f"{split}.tsv"
    if kept.is_file():
        return read_qrels(kept)
    if artifact.exists(path):
        names = ", ".join(sorted(file.stem for file in kept.parent.glob("*.tsv"))) or "none"
        raise InputError(f"has no judgements of the split '{split}'; it has {names}", path)
    found = Corpus.open(path).qrels(split)
    if found is None:
        raise InputError(f"has no judgements of the split '{split}'", path)
    return found


def evaluate_file(run: str | Path, qrels: Qrels, settings: Settings, qrels_path: str | Path = "") -> Result:
    """Measure a TREC run; InputError where it has none of the judged queries."""
    read = read_run(run)
    if settings.exclude_self:
        read = read.without_self()
    result = metrics.evaluate(read, qrels, settings.measures, settings.relevance_level)
    if result.n_without_results == result.n_judged:
        raise InputError(f"has none of the queries judged in {qrels_path}: do they belong together?", run)
    return result


def counts(result: Result) -> str:
    """What was counted and what was not, in one line."""
    text = f"{result.n_judged:,} judged queries, {result.n_without_results:,} of them without results"
    if result.n_without_relevant:
        text += f", {result.n_without_relevant:,} without a relevant document"
    if result.n_unjudged:
        text += f"; {result.n_unjudged:,} queries of the run have no judgements and are left out"
    return text


def figures(result: Result, per_query: bool = False) -> dict[str, Any]:
    """A result for JSON."""
    found = {"means": result.means, "judged": result.n_judged, "without_results": result.n_without_results,
             "without_relevant": result.n_without_relevant, "unjudged": result.n_unjudged}
    return found | ({"per_query": result.per_query} if per_query else {})


def against_first(names: Sequence[str], results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """Run → tests of its measures against the first run's, with ``p_holm``: the paired t-test's p value, corrected for
    the number of runs that are compared (Holm, for each measure of its own)."""
    if len(set(names)) != len(names):
        raise InputError(f"the runs {', '.join(names)} are not all different")
    compared = [metrics.compare(result, results[0]) for result in results[1:]]
    corrected = [metrics.holm([test.p_t for test in tests]) for tests in zip(*compared, strict=True)]
    return {name: [asdict(test) | {"p_holm": corrected[i][at]} for i, test in enumerate(tests)]
            for at, (name, tests) in enumerate(zip(names[1:], compared, strict=True))}


def side_by_side(names: Sequence[str], results: Sequence[Result], tests: Mapping[str, list[dict[str, Any]]]) -> str:
    """Two tables: the means of every run, and every run's difference from the first."""
    measures = list(results[0].means)
    means = [["", *measures]] + [[name, *(f"{result.means[m]:.4f}" for m in measures)]
                                 for name, result in zip(names, results, strict=True)]
    rows = [[f"against {names[0]}", "measure", "difference", "better/worse", "p (t-test)", "p (Holm)"]]
    rows += [[name, test["measure"], f"{test['mean_a'] - test['mean_b']:+.4f}", f"{test['better']}/{test['worse']}",
              f"{test['p_t']:.4g}", f"{test['p_holm']:.4g}"] for name, found in tests.items() for test in found]
    return f"{reports.table(means)}\n\n{reports.table(rows)}"


def comparison(tests: Sequence[Comparison]) -> str:
    """The table of two runs."""
    rows = [("", "run", "compared", "difference", "better/worse", "p (t-test)", "p (randomised)")]
    rows += [(test.measure, f"{test.mean_a:.4f}", f"{test.mean_b:.4f}", f"{test.mean_a - test.mean_b:+.4f}",
              f"{test.better}/{test.worse}", f"{test.p_t:.4g}", f"{test.p_randomisation:.4g}") for test in tests]
    return reports.table(rows)


def collections(pairs: Sequence[tuple[str, str]], settings: Settings) -> tuple[list[Result], dict[str, float]]:
    """Results of (run, judgements) pairs, and the mean of each measure over the collections, each counting once."""
    results = [evaluate_file(run, open_qrels(qrels, settings.split), settings, qrels) for run, qrels in pairs]
    return results, {name: float(np.mean([result.means[name] for result in results])) for name in results[0].means}


def collection_table(names: Sequence[str], results: Sequence[Result], average: Mapping[str, float]) -> str:
    """A line for each collection, and the average."""
    rows = [["", "queries", *average]]
    rows += [[name, f"{result.n_judged:,}", *(f"{value:.4f}" for value in result.means.values())]
             for name, result in zip(names, results, strict=True)]
    return reports.table([*rows, ["average", "", *(f"{value:.4f}" for value in average.values())]])
