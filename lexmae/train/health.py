"""Numbers that tell a sick run: losses and gradients that are not finite, a loss scale at its end, a collapsed lexicon.

Every rank keeps the same counts, since what they are made of crosses ranks before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmae import artifact
from lexmae.cli import is_main_rank, say
from lexmae.config import FinetuneRecipe
from lexmae.data.batches import Stream
from lexmae.errors import RunError
from lexmae.train.engine import StepReport

BAD_BATCH = "bad_batch.json"
_SHOWN = 8  # examples in a message
_INTERVAL = 50  # steps between two looks at the lexicon
_SIDES = {"terms_docs": ("document", "loss.lambda_docs"), "terms_queries": ("query", "loss.lambda_queries")}


class Skips:
    """Counts optimizer steps that were left out because loss or gradient was not finite.

    What fp16's loss scaling leaves out while it looks for its scale counts, but not as one of several in a row.

    Args:
        limit: so many in a row end the run.
        precision: ``fp16``, ``bf16`` or ``fp32``.
        lowest: the smallest loss scale of fp16.
        examples: 0-based step → ids of its examples.
        folder: where the ids of all examples of a fatal step go.
        total: steps that an earlier part of the run left out.
    """

    def __init__(self, limit: int, precision: str, lowest: float, examples: Callable[[int], list[str]], folder: Path,
                 total: int = 0):
        self.limit, self.precision, self.lowest = limit, precision, lowest
        self.examples, self.folder, self.total = examples, folder, total
        self.in_a_row = 0
        self._said = False

    def judge(self, done: int, report: StepReport, bad_loss: bool) -> None:
        """Take the outcome of the step that made ``done`` steps.

        Args:
            bad_loss: whether the loss was not finite on any rank.

        Raises:
            RunError: one too many in a row.
        """
        if report.applied:
            self.in_a_row = 0
            return
        at_end = self.precision == "fp16" and report.loss_scale <= self.lowest
        if at_end and not self._said:
            self._said = True
            say(f"warning: the loss scale of fp16 has fallen to its minimum, {self.lowest:g}, at step {done}: "
                "gradients overflow whatever the scale. bf16, or a lower optimization.lr, helps")
        if self.precision != "fp16" or bad_loss or at_end:
            self.in_a_row += 1
        if self.in_a_row >= self.limit:
            self._stop(done, "loss" if bad_loss else "gradient", at_end)

    def refuse_nothing(self, steps: int) -> None:
        """RunError where all ``steps`` of a run were left out, so that its weights are those of its start."""
        if self.total >= steps:
            raise RunError(f"none of the {steps} steps changed the weights: loss or gradient was never finite")

    def _stop(self, done: int, what: str, at_end: bool) -> None:
        ids = self.examples(done - 1)
        if is_main_rank() and ids:
            with artifact.atomic_file(self.folder / BAD_BATCH) as out:
                json.dump({"step": done, "examples": ids}, out, indent=1)
        shown = ", ".join(ids[:_SHOWN])
        more = f" and {len(ids) - _SHOWN} more, see {self.folder / BAD_BATCH}" if len(ids) > _SHOWN else ""
        scale = f" with the loss scale of fp16 at its minimum, {self.lowest:g}" if at_end else ""
        batch = f" ({shown}{more})" if ids else ""
        raise RunError(f"the {what} was not finite {self.in_a_row} steps in a row{scale}, the last of them step {done}"
                       f"{batch}; none of these steps changed the weights, and the last checkpoint is intact")


def example_ids(data: Any) -> Callable[[int], list[str]]:
    """A function of the 0-based step: the ids of its examples on all ranks, in the order of the global batch.

    Args:
        data: what ``parts.build`` gives: documents, or judged (query, document) pairs of a split.
    """
    def ids(step: int) -> list[str]:
        _, rows = Stream(data.size, data.seed).rows(step, data.batch)
        if not hasattr(data, "queries"):
            return [f"document {name}" for name in data.shards.docs.ids(rows)]
        pairs = np.asarray(data.negatives.judged_pairs())[rows]
        names = zip(data.queries.ids(pairs[:, 0]), data.shards.docs.ids(pairs[:, 1]), strict=True)
        return [f"query {query} with document {document}" for query, document in names]

    return ids


class LexiconWatch:
    """Notices a lexicon that has collapsed: no vector has a term, or half of the vocabulary is in all of them.

    Args:
        vocabulary: entries of the vocabulary.
        settled: steps after which vectors should be sparse.
        said: what an earlier part of the run has said.
    """

    def __init__(self, vocabulary: int, settled: int, said: Iterable[str] = ()):
        self.vocabulary, self.settled, self.said = vocabulary, settled, list(said)
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def look(self, done: int, metrics: Mapping[str, torch.Tensor],
             total: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        """Take a step's shares of the metrics; warnings, where it is time to look and there are new ones.

        Args:
            total: sums over the ranks.
        """
        for name in _SIDES.keys() & metrics.keys():
            self._sums[name] = self._sums.get(name, 0) + metrics[name].detach().float()
        self._count += 1
        if self._count < _INTERVAL or not self._sums:
            return []
        names = sorted(self._sums)
        means = (total(torch.stack([self._sums[name] for name in names])) / self._count).tolist()
        self._sums, self._count = {}, 0
        found = []
        for name, mean in zip(names, means, strict=True):
            kind, text = self._verdict(name, mean, done)
            if text and kind not in self.said:
                self.said.append(kind)
                found.append(text)
        return found

    def _verdict(self, name: str, mean: float, done: int) -> tuple[str, str]:
        side, weight = _SIDES[name]
        if mean == 0:
            return f"{name} empty", (
                f"the lexicon has collapsed: every {side} vector of the last {_INTERVAL} steps is empty, so nothing is "
                f"learned any more. Start again from an earlier checkpoint with a lower {weight} or optimization.lr")
        if done >= self.settled + _INTERVAL and mean >= self.vocabulary / 2:
            return f"{name} dense", (
                f"the lexicon has not become sparse: {mean:.0f} of {self.vocabulary} terms are active in a {side} "
                f"vector. Raise {weight}, or set a budget (loss.active_terms); where the loss does not fall, lower "
                "optimization.lr")
        return "", ""


def watch_lexicon(config: Any, vocabulary: int, total: int, said: Iterable[str]) -> LexiconWatch | None:
    """The watch of a fine-tuning run, whose vectors should be sparse once learning rate and λ have grown; else None."""
    if not isinstance(config, FinetuneRecipe):
        return None
    settled = math.ceil(max(config.optimization.warmup, config.loss.lambda_ramp) * total)
    return LexiconWatch(vocabulary, settled, said)
