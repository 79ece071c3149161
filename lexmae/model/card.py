"""The model card: `README.md` of a model's folder, in the form of the Hugging Face hub.

Training writes it; an evaluation adds its figures between two markers, which stay where an author moves them. What
stands outside of the markers is the author's from then on. Names that come from data are escaped and cut, so that no
file name or data set can write markup. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lexmae import artifact, locks
from lexmae.errors import InputError

NAME = "README.md"
BEGIN, END = "<!-- evaluation: written by tools/evaluate.py --card -->", "<!-- end of evaluation -->"
LONGEST = 120  # characters of a name that comes from data
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_SHOWN = (("loss", "Loss"), ("loss_enc", "Loss of the encoder"), ("loss_dec", "Loss of the decoder"),
          ("loss_contrastive", "Contrastive loss"), ("accuracy", "Positive ranked first in the batch"),
          ("flops_docs", "FLOPS of documents"), ("flops_queries", "FLOPS of queries"),
          ("terms_docs", "Active terms of a document"), ("terms_queries", "Active terms of a query"),
          ("probe_mrr_10", "Probe MRR@10"), ("probe_terms_docs", "Active terms of a document (probe)"),
          ("probe_terms_queries", "Active terms of a query (probe)"))


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        title: the run's name.
        stage: `pretrain` or `finetune`.
        recipe: composed, as YAML.
        settings: the same as a tree.
        shards: the manifest of the training data.
        steps, weights: optimizer steps done, and numbers in the model.
        last: the last figures of the run's log, name → value.
        base: hub name of the model that all of it started from, where known.
    """

    title: str
    stage: str
    recipe: str
    settings: Mapping[str, Any]
    shards: artifact.Manifest
    steps: int
    weights: int
    last: Mapping[str, Any]
    base: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a split of a data set; later ones of the same replace them."""

    data: str
    split: str
    queries: int
    means: Mapping[str, float]


def render(facts: Facts) -> str:
    """The text of a new card."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", facts.recipe)), default=0))
    return f"""---
{_header(facts)}---

# {plain(facts.title)}

{_purpose(facts)}

## Use

{_usage(facts)}

## Evaluation

{_block(())}

## Training

{_training(facts)}

The last figures of the log are means over its last steps, on the training data{_probe_note(facts)}.

## Recipe

{fence}yaml
{facts.recipe.strip()}
{fence}

## License

None is stated. Whoever publishes this model chooses one that the training data and the model it started from allow, and
adds it to the header above as `license:`.
"""


def last_figures(log: Path, step: int) -> dict[str, Any]:
    """The newest figures of a run's log up to a step, by name."""
    found: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        row = json.loads(line)
        if row["step"] <= step:
            found.update(row)
    return found


def base_model(init: str) -> str | None:
    """The hub name at the beginning of a chain of models; None where it began from scratch or is no longer known."""
    for _ in range(100):  # a chain of folders that name each other does not end
        if not artifact.exists(init):
            known = init != "scratch" and not Path(init).exists() and _HUB_NAME.fullmatch(init)
            return init if known else None
        init = (artifact.read(init).config.get("model") or {}).get("init", "scratch")
    return None


def add_evaluation(model: str | Path, evaluation: Evaluation) -> None:
    """Add figures to the card of a finished model, in place of older ones of the same data set and split.

    Raises:
        InputError: not a model that training wrote.
    """
    artifact.read(model, "model")
    row = {"data": evaluation.data, "split": evaluation.split, "queries": evaluation.queries,
           "means": dict(evaluation.means)}
    with locks.writing(model):  # another evaluation may be writing too
        manifest = artifact.read(model, "model")
        file = manifest.path / NAME
        others = [old for old in manifest.extra.get("evaluations", []) if (old["data"], old["split"]) != (
            row["data"], row["split"])]
        rows = sorted([*others, row], key=lambda one: (one["data"], one["split"]))
        title = f"# {plain(manifest.path.resolve().parent.name)}\n"
        text = file.read_text(encoding="utf-8") if file.is_file() else title
        artifact.annotate(model, {"evaluations": rows}, {NAME: _replace(text, _block(rows))})


def data_set(qrels: str | Path, split: str) -> tuple[str, str]:
    """(data set, split) that judgements belong to, by their place: a folder NAME of which this split is read, or a file
    `…/NAME/qrels/SPLIT.tsv` or `…/NAME/qrels.SPLIT.tsv`; in a folder of shards NAME is that of the collection."""
    path = folder = Path(qrels).resolve()
    if not path.is_dir():
        split = re.sub(r"(\.(gz|tsv|txt|trec))+$", "", path.name).removeprefix("qrels.")
        folder = path.parent.parent if path.parent.name == "qrels" else path.parent
    if artifact.exists(folder):
        source = artifact.read(folder).inputs.get("corpus", {}).get("path")
        if source:
            return source if _HUB_NAME.fullmatch(source) else Path(source).name, split
    return folder.name, split


def plain(text: str, limit: int = LONGEST) -> str:
    """A name from data as Markdown that shows it: one line, cut, no markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= limit else line[:limit - 1] + "…"
    return _MARKUP.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _header(facts: Facts) -> str:
    tags = ["sentence-transformers", "sparse-encoder", "learned-sparse-retrieval", "lexmae"]
    header: dict[str, Any] = {"library_name": "sentence-transformers", "tags": tags}
    if facts.stage == "finetune":
        header["pipeline_tag"] = "feature-extraction"
    if facts.base:
        header["base_model"] = facts.base
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def _purpose(facts: Facts) -> str:
    entries = f"{facts.shards.extra['vocab_size']:,}"
    if facts.stage == "pretrain":
        return ("A masked language model pre-trained with a lexicon bottleneck (LexMAE, Shen et al., ICLR 2023): the "
                "start for fine-tuning a sparse retriever. Its vectors are not made for search yet.")
    return (f"A sparse retriever: it turns a text into weights on {entries} vocabulary entries, "
            "`log(1 + max over its tokens of relu(logits))`. The score of a query and a document is the dot product.")


def _usage(facts: Facts) -> str:
    extra = facts.shards.extra
    lengths = f"{extra['max_length']} tokens of a document, {extra['query_length']} of a query"
    return f"""With sentence-transformers, which gives the same vectors:

```python
from sentence_transformers import SparseEncoder

model = SparseEncoder("path/to/this/folder")
scores = model.similarity(model.encode_query(["a query"]), model.encode_document(["a document"]))
```

With lexmae, which also indexes and searches ({lengths}):

```python
from lexmae.model.encoder import SparseEncoder

encoder = SparseEncoder.load("path/to/this/folder").eval()
```

As a masked language model:

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

lm = AutoModelForMaskedLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""


def _training(facts: Facts) -> str:
    shards, settings = facts.shards, facts.settings
    counts = shards.counts
    rows = [("Data", plain(shards.inputs.get("corpus", {}).get("path", "not recorded"))),
            ("Documents", f"{counts['documents']:,}")]
    split = settings.get("split")
    if facts.stage == "finetune" and f"queries.{split}" in counts:
        rows += [(f"Queries ({plain(split)})", f"{counts[f'queries.{split}']:,}"),
                 ("Judgements", f"{counts.get(f'judgements.{split}', 0):,}"),
                 ("Negatives", plain(_negatives(settings["negatives"])))]
    rows += [("Started from", plain(settings["model"]["init"])), ("Weights", f"{facts.weights:,}"),
             ("Steps", f"{facts.steps:,}"), ("Batch", f"{settings['optimization']['batch']:,}")]
    rows += [(title, f"{facts.last[name]:.4g}") for name, title in _SHOWN
             if isinstance(facts.last.get(name), (int, float))]
    versions = artifact.versions()
    rows.append(("Made with", ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "deepspeed")
                                        if name in versions)))
    return _table(("", ""), rows)


def _negatives(settings: Mapping[str, Any]) -> str:
    return settings["path"] or ", ".join(source["path"] for source in settings["sources"]) or "random passages"


def _probe_note(facts: Facts) -> str:
    return "; those of a probe are measured on a few held-out queries and documents" if any(
        name.startswith("probe_") for name in facts.last) else ""


def _block(rows: Sequence[Mapping[str, Any]]) -> str:
    """The evaluations between their markers."""
    if not rows:
        return f"{BEGIN}\nNot evaluated yet.\n{END}"
    measures = list(dict.fromkeys(name for row in rows for name in row["means"]))
    cells = [(plain(row["data"]), plain(row["split"]), f"{row['queries']:,}",
              *(f"{row['means'][name]:.4f}" if name in row["means"] else "–" for name in measures)) for row in rows]
    table = _table(("Data set", "Split", "Queries", *map(plain, measures)), cells, right=2)
    return f"{BEGIN}\n{table}\n\nEvery judged query counts; one without results scores 0.\n{END}"


def _replace(text: str, block: str) -> str:
    """The text with a new block; at its end where the markers are gone."""
    lines = text.split("\n")
    if BEGIN in lines and END in lines[lines.index(BEGIN):]:
        first = lines.index(BEGIN)
        last = lines.index(END, first)
        return "\n".join([*lines[:first], *block.split("\n"), *lines[last + 1:]])
    return f"{text.rstrip()}\n\n## Evaluation\n\n{block}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 1) -> str:
    """A Markdown table; columns from `right` on are numbers."""
    rule = ["---" if column < right else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def check(model: str | Path) -> None:
    """InputError for what has no card to write to, before anything is measured."""
    if not artifact.exists(model):
        raise InputError("has no manifest: a card is written for models that training wrote", model)
    artifact.read(model, "model")
