"""The table at the end of a pipeline: BM25 and every stage, how good, how sparse, how large, how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lexmae import artifact
from lexmae.cycle.config import BI_ENCODER, RERANKED, RERANKER, PipelineRecipe

MEASURES = ("MRR@10", "nDCG@10", "Recall@100", "Recall@1000")
_TESTED = "MRR@10"
_COSTS = ("terms/doc", "terms/query", "index MB", "queries/s")

Rows = dict[str, dict[str, Any]]


def collect(config: PipelineRecipe) -> Rows:
    """Figures of BM25, of every stage and of the cross-encoder, from what the steps wrote."""
    rows: Rows = {}
    for row, name in _folders(config).items():
        rows[row] = {**_measures(Path(config.work), f"{name}/metrics.json"), **_costs(config, name, rows)}
    return rows


def collect_further(config: PipelineRecipe) -> dict[str, Rows]:
    """Measures on the further splits and collections, by their names."""
    work, evaluation = Path(config.work), config.evaluation
    files = {split: f"metrics-{split}.json" for split in evaluation.more_splits}
    files |= {other.name: f"{other.name}/metrics.json" for other in evaluation.zero_shot}
    return {name: {row: _measures(work, f"{folder}/{file}") for row, folder in _folders(config).items()}
            for name, file in files.items()}


def _folders(config: PipelineRecipe) -> dict[str, str]:
    """The rows of a table and the folders of their figures; the cross-encoder stands behind what it reranks."""
    found = {}
    teacher = [(BI_ENCODER, BI_ENCODER)] if config.bi_encoder else []
    for row, folder in (("BM25", "bm25"), *teacher, *((stage.name, stage.name) for stage in config.stages)):
        found[row] = folder
        if config.reranker is not None and config.reranker.negatives == folder:
            found[RERANKED] = RERANKER
    return found


def _costs(config: PipelineRecipe, name: str, before: Rows) -> dict[str, Any]:
    """Terms, size and speed of a row; of a reranked run those of the pair of it and the row before.

    A command that was killed behind its output has left no figures of its own: None stands for them.
    """
    folder = Path(config.work) / name
    if name == "bm25":
        bm25 = _optional(folder / "bm25.json")
        return {key: bm25.get(key) for key in ("terms_docs", "terms_queries", "index_bytes", "queries_per_second")}
    rate = _optional(folder / "run.json").get("queries_per_second")
    if name == RERANKER:
        first = list(before.values())[-1]
        pair = 1 / (1 / first["queries_per_second"] + 1 / rate) if rate and first["queries_per_second"] else None
        return {"index_bytes": first["index_bytes"], "queries_per_second": pair}
    return {"terms_docs": artifact.read(folder / "vectors-docs").extra.get("mean_active"),  # dense ones have none
            "terms_queries": artifact.read(folder / f"vectors-{config.evaluation.split}").extra.get("mean_active"),
            "index_bytes": sum(p.stat().st_size for p in (folder / "index").rglob("*") if p.is_file()),
            "queries_per_second": rate}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _optional(path: Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _measures(work: Path, path: str) -> dict[str, Any]:
    """Means of a row, and how it differs from the row that it was tested against, where there is one."""
    found = _json(work / path)
    row = {name: found["means"][name] for name in MEASURES}
    if "compare" in found:
        test = next(test for test in found["compare"]["tests"] if test["measure"] == _TESTED)
        other = Path(found["compare"]["run"]).relative_to(work).parts[0]
        row["against"] = {"row": "BM25" if other == "bm25" else other, "difference": test["mean_a"] - test["mean_b"],
                          "p": test["p_t"]}
    return row


def doubt(config: PipelineRecipe) -> str | None:
    """What to say of a cross-encoder that orders worse than what it reranks, where stages are to learn from it."""
    taught = [stage.name for stage in config.stages if stage.teacher == RERANKER]
    if config.reranker is None or not taught:
        return None
    against = _measures(Path(config.work), f"{RERANKER}/metrics.json").get("against")
    if against is None or against["difference"] >= 0:
        return None
    return (f"warning: the cross-encoder orders the results of {against['row']} worse than {against['row']} did "
            f"({_TESTED} {against['difference']:+.4f}, p {against['p']:.2g}); {', '.join(taught)} can only lose by "
            "learning from it: train it longer, or from a stronger model")


def _test(row: dict[str, Any]) -> str:
    """The difference of a row, as the table shows it."""
    if "against" not in row:
        return "–"
    other = row["against"]
    return f"{other['difference']:+.4f} to {other['row']} (p {other['p']:.2g})"


def _figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(rows: Rows, title: str = "") -> str:
    """The figures as a Markdown table, aligned; costs where the rows have them."""
    costs = any("terms_docs" in row for row in rows.values())
    lines = [(title, *MEASURES, f"difference in {_TESTED}", *(_COSTS if costs else ()))]
    for name, row in rows.items():
        line = [name, *(f"{row[measure]:.4f}" for measure in MEASURES), _test(row)]
        if costs:
            line += [_figure(row.get("terms_docs")), _figure(row.get("terms_queries")),
                     _figure(row["index_bytes"] and row["index_bytes"] / 1e6), _figure(row["queries_per_second"], 0)]
        lines.append(tuple(line))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(line, widths, strict=True))) + " |" for line in lines]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([cells[0], rule, *cells[1:]])


def write(config: PipelineRecipe, seconds: dict[str, float]) -> str:
    """Write ``results.json`` and ``results.md`` into the work folder; returns the tables."""
    rows, further, work = collect(config), collect_further(config), Path(config.work)
    parts = [table(rows), *(table(figures, name) for name, figures in further.items()), doubt(config)]
    text = "\n\n".join(part for part in parts if part)
    with artifact.atomic_file(work / "results.json") as out:
        json.dump({"results": rows, "further": further, "seconds": seconds, "versions": artifact.versions()}, out,
                  indent=1)
    with artifact.atomic_file(work / "results.md") as out:
        out.write(f"{text}\n")
    return text
