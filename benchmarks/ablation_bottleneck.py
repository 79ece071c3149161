#!/usr/bin/env python
"""Does the lexicon bottleneck earn its place? Pre-training with it, with [CLS] and without, on several seeds.

  python benchmarks/ablation_bottleneck.py --recipes recipes/openqa-small --shards runs/openqa-small/shards \\
      --negatives runs/openqa-small/bm25/negatives.jsonl --work runs/ablation

For every seed and source: pre-training (`pretrain.yaml`), then stage 1 (`stage1.yaml`) from its weights, both ending
with a probe (MRR@10 of a few queries on a few documents, the same ones for every run of a seed): zero-shot and after
stage 1. Whether the decoder reads the bottleneck at all is said by its accuracy on masked tokens (mean of the last
tenth of pre-training) and by `use`: by how much its loss grows when it is given the bottleneck of another text. What
differs between the runs of a seed is `bottleneck.source` alone. Finished runs are kept: the same command goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from lexmae import artifact, cli, recipe
from lexmae.config import FinetuneRecipe, PretrainRecipe
from lexmae.data.batches import PretrainData
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model.attention import use_packing
from lexmae.train import checkpoint, fragments, parts, statefile

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("decoder's accuracy", "use", "zero-shot", "stage 1")
_BATCHES, _TEXTS = 15, 32  # on which the use of the bottleneck is measured


def train(script: str, file: Path, output: Path, settings: list[str]) -> list[dict[str, float]]:
    """Train unless that is done; the lines of its log. InputError where it was done with other settings."""
    if artifact.exists(output / "model"):
        kind = PretrainRecipe if script == "pretrain.py" else FinetuneRecipe
        if recipe.load(output / "config.yaml", kind) != recipe.load(file, kind, [f"output={output}", *settings]):
            raise InputError("was trained with other settings: choose another --work", output)
    else:
        done = subprocess.run([sys.executable, str(ROOT / "launch" / script), str(file), "--set", f"output={output}",
                               *settings, "--resume", "auto"], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)  # it has said why
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def last_probe(lines: list[dict[str, float]]) -> float:
    """MRR@10 of the last probe in a log."""
    return [line["probe_mrr_10"] for line in lines if "probe_mrr_10" in line][-1]


def use_of_bottleneck(run: Path) -> float:
    """By how much the decoder's loss grows, in nats a masked token, when it reads the bottleneck of another text."""
    config = recipe.load(run / "config.yaml", PretrainRecipe)
    shards = Shards.open(config.data)
    lm = parts.build_lm(config.model, shards, continued=True)
    use_packing(lm)
    model = parts.build_pretrainer(lm, config.bottleneck).eval()
    folder = run / "checkpoints"
    with statefile.Reader(folder / f"step-{checkpoint.steps(folder)[-1]}") as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, fragments.KEYS[0]).view_as(parameter))
    data = PretrainData(shards, config.masking, micro_batch=_TEXTS, packed=True, seed=config.optimization.seed + 1,
                        batch=_TEXTS, rank=0, world=1, micro_tokens=0)
    plain = model._bottleneck

    def others(*arguments):
        vector = plain(*arguments)
        return vector if vector is None else vector.roll(1, 0)

    sums = {"own": 0.0, "other": 0.0}
    count = 0.0
    with torch.no_grad():
        for batch in itertools.chain.from_iterable(map(data, range(_BATCHES))):
            for whose, source in (("own", plain), ("other", others)):
                model._bottleneck = source
                out = model(**batch.text.arguments(), enc_labels=batch.enc_labels, dec_labels=batch.dec_labels,
                            dec_input_ids=batch.dec_input_ids)
                sums[whose] += out["dec_loss_sum"].item()
            count += out["dec_count"].item()
    return (sums["other"] - sums["own"]) / count


def measure(asked: argparse.Namespace, source: str, seed: int) -> dict[str, float]:
    """The figures of one source and seed."""
    folder = Path(asked.work) / f"{source}-{seed}"
    shared = [f"data={asked.shards}", f"optimization.seed={seed}", "probe.every=1000000", f"probe.split={asked.split}",
              f"probe.queries={asked.queries}", f"probe.documents={asked.documents}"]
    before = train("pretrain.py", asked.recipes / "pretrain.yaml", folder / "pretrain",
                   [*shared, f"bottleneck.source={source}", *asked.pretrain])
    after = train("finetune.py", asked.recipes / "stage1.yaml", folder / "stage1",
                  [*shared, f"model.init={folder / 'pretrain' / 'model'}", f"negatives.path={asked.negatives}",
                   *asked.finetune])
    accuracy = [line["accuracy_dec"] for line in before if "accuracy_dec" in line]
    late = accuracy[-max(1, len(accuracy) // 10):]
    figures = statistics.mean(late), use_of_bottleneck(folder / "pretrain"), last_probe(before), last_probe(after)
    return dict(zip(FIGURES, figures, strict=True))


def table(found: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    """One row for each source: every seed, mean and standard deviation."""
    head = ["bottleneck", *(f"{name}, seed {seed}" for name in FIGURES for seed in seeds),
            *(f"{name}, mean ± sd" for name in FIGURES)]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for source, runs in found.items():
        values = {name: [run[name] for run in runs] for name in FIGURES}
        spread = {name: statistics.stdev(row) if len(row) > 1 else 0.0 for name, row in values.items()}
        rows.append([source, *(f"{value:.4f}" for name in FIGURES for value in values[name]),
                     *(f"{statistics.mean(values[name]):.4f} ± {spread[name]:.4f}" for name in FIGURES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, print the table."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--recipes", required=True, type=Path, metavar="DIR", help="with pretrain.yaml and stage1.yaml")
    parser.add_argument("--shards", required=True, help="shards with judged queries to train on and to probe")
    parser.add_argument("--negatives", required=True, help="negatives of stage 1")
    parser.add_argument("--work", required=True, help="folder of the runs")
    parser.add_argument("--sources", nargs="+", default=["logits", "cls", "off"], help="default logits cls off")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default 1 2 3")
    parser.add_argument("--split", default="dev", help="queries of the probes")
    parser.add_argument("--queries", type=int, default=500, help="at most so many, default 500")
    parser.add_argument("--documents", type=int, default=2000, help="documents of the probes, default 2000")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="for pretrain.yaml, besides")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="KEY=VALUE", help="for stage1.yaml, besides")
    parser.add_argument("--json", metavar="FILE", help="write the record there")
    asked = parser.parse_args(argv)
    found: dict[str, list[dict[str, float]]] = {source: [] for source in asked.sources}
    for seed, source in itertools.product(asked.seeds, asked.sources):
        found[source].append(measure(asked, source, seed))
        cli.say(f"{source}, seed {seed}: " + ", ".join(f"{k} {v:.4f}" for k, v in found[source][-1].items()))
    print(table(found, asked.seeds))
    if asked.json:
        with artifact.atomic_file(Path(asked.json)) as out:
            json.dump({"seeds": asked.seeds, "results": found, "versions": artifact.versions(),
                       "command": sys.argv}, out, indent=1)


if __name__ == "__main__":
    cli.run(main)
