"""What the benchmarks share: real texts of a stated length distribution, runs in turn, a table, a JSON record."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmae import artifact, memory
from lexmae.data import tokenizer
from lexmae.data.builtin import build
from lexmae.data.corpus import Corpus
from lexmae.model import backbone
from lexmae.model.encoder import save_masked_lm

RESULTS = Path(__file__).parent / "results"
MEAN_TOKENS, MAX_TOKENS = 77, 144  # MS MARCO passages under BERT's WordPiece
VOCABULARY, VOCABULARY_PASSAGES = 30522, 3000
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "numpy", "numba")
SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "mini": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
"""Shapes of BERT: BERT-base, MiniLM-L6, and one that only shows that a script works."""


def make_parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks, and one for each keyword."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="DIR", help="collection with the texts; default: docstrings of the packages")
    parser.add_argument("--size", choices=SIZES, default="base", help="shape of the BERT, default base")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn; default 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16: ours with DeepSpeed's bf16 engine, peers "
                                                          "under autocast")
    parser.add_argument("--json", metavar="NAME", nargs="?", const=Path(sys.argv[0]).stem,
                        help="write the record to results/NAME.json, or to a path; without NAME the script's")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    return parser


def training_parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """That of the benchmarks that train."""
    parser = make_parser(description, **defaults)
    parser.add_argument("--padded", action="store_true", help="lexmae trains with padding: `model.packing: off`")
    return parser


def inputs(args: argparse.Namespace, count: int, folder: Path) -> tuple[list[str], Path]:
    """``count`` passages of ``--input`` in MS MARCO's lengths, and the model folder of ``--size`` that reads them."""
    collection = source(args.input, folder)
    words = wordpiece(collection)
    return texts(collection, draw_lengths(count), words), model_folder(folder, args.size, words)


def source(given: str | None, folder: Path) -> str:
    """The collection of ``--input``, or the built-in one, made in ``folder``."""
    if given is not None:
        return given
    built = folder / "builtin"
    if not artifact.exists(built):
        build(built)
    return str(built)


def wordpiece(source: str) -> Any:
    """A WordPiece of BERT's kind, trained on the first passages of a collection."""
    def passages() -> Iterator[str]:
        return (passage.text for passage in itertools.islice(Corpus.open(source).passages(), VOCABULARY_PASSAGES))

    return tokenizer.train(passages, VOCABULARY)


def texts(source: str, lengths: np.ndarray, words: Any) -> list[str]:
    """Passages of a collection, of which passage ``i`` has at most ``lengths[i]`` tokens with title and special tokens.

    It is cut after the last whole word that fits; one that is too short goes on with the next passage. A passage
    without a title has a `-` in its place in our shards: four tokens are not the text's.
    """
    def stream() -> Iterator[str]:
        while True:
            yield from (word for passage in Corpus.open(source).passages() for word in passage.text.split())

    found, word = [], stream()
    for length in lengths.tolist():
        text = " ".join(itertools.islice(word, length))
        read = words(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, ids = read["offset_mapping"], read.word_ids()
        last = min(length - 4, len(ends))
        while 0 < last < len(ids) and ids[last] == ids[last - 1]:  # not within a word
            last -= 1
        found.append(text[:ends[max(last, 1) - 1][1]])
    return found


def draw_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths in tokens, int64 [count]: log-normal with σ 0.45, at least 8, at most 144, mean about 77."""
    sigma = 0.45
    drawn = np.random.default_rng(seed).lognormal(math.log(MEAN_TOKENS + 2) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 8, MAX_TOKENS).astype(np.int64)


def model_folder(folder: Path, size: str, words: Any) -> Path:
    """A BERT of random weights with this tokenizer, as a Hugging Face folder.

    Weights and words do not change how long a step takes. The model's vocabulary has BERT's size whatever the texts
    support.
    """
    target = folder / f"bert-{size}"
    words.save_pretrained(folder / "tokenizer")
    special = {name: getattr(words, f"{name}_token_id") for name in ("pad", "unk", "cls", "sep", "mask")}
    torch.manual_seed(0)
    lm = backbone.create_masked_lm("bert", VOCABULARY, special, {**SIZES[size], "max_position_embeddings": 512,
                                                               "hidden_dropout_prob": 0.0,
                                                               "attention_probs_dropout_prob": 0.0})
    # A peer that knows one text has one segment, lexmae has two: made equal, both compute the same.
    torch.nn.init.zeros_(lm.base_model.embeddings.token_type_embeddings.weight)
    save_masked_lm(lm, target, folder / "tokenizer")
    return target


@dataclass
class Side:
    """One side of a comparison: what is run, and how much work a run does."""

    name: str
    run: Callable[[], Any]
    work: float
    unit: str


class Clock:
    """Seconds and peak memory of sides that run in turn.

    Args:
        sides: the first is the one that the others are compared with.
    """

    def __init__(self, sides: list[Side], device: str):
        self.sides, self.device = sides, device
        self._seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        self._memory: dict[str, float] = dict.fromkeys(self._seconds, 0.0)

    @contextmanager
    def run(self, side: Side, counts: bool = True) -> Iterator[None]:
        """Times what the block does for a side; its memory counts also where its time does not.

        Before runs whose time does not count, the kernel gets back what earlier runs have freed: a process that keeps
        it (`lexmae.memory`) shows no other peak.
        """
        if not counts:
            memory.give_back()
        with peak_memory(self.device) as peak:
            start = time.perf_counter()
            yield
            if self.device != "cpu":
                torch.cuda.synchronize()
            spent = time.perf_counter() - start
        self._memory[side.name] = max(self._memory[side.name], peak())
        if counts:
            self._seconds[side.name].append(spent)

    def figures(self) -> dict[str, dict[str, Any]]:
        """By the sides' names. The ratio is that of the first side's speed to each other's, as the median over the
        rounds; the spread that between the slowest and the fastest round."""
        own = self._seconds[self.sides[0].name]
        found = {}
        for side in self.sides:
            seconds = self._seconds[side.name]
            median, ratios = statistics.median(seconds), [t / o for t, o in zip(seconds, own, strict=True)]
            found[side.name] = {
                "seconds": [round(s, 4) for s in seconds], "speed": side.work / median, "unit": side.unit,
                "ratio": statistics.median(ratios), "ratios": [round(r, 3) for r in ratios],
                "spread": (max(seconds) - min(seconds)) / median, "peak_mib": round(self._memory[side.name], 1)}
        return found


def in_turn(sides: list[Side], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Run every side once to warm up, then ``rounds`` times in turn A B A B …; the figures of a ``Clock``."""
    clock = Clock(sides, device)
    for turn in range(rounds + 1):
        for side in sides:
            with clock.run(side, counts=turn > 0):
                side.run()
    return clock.figures()


def refuse_difference(what: str, difference: float, allowed: float) -> float:
    """Exit where two sides do not compute the same; returns the difference."""
    if not difference <= allowed:
        sys.exit(f"the sides do not compute the same: {what} differ by {difference:.2e}, allowed is {allowed:.0e}")
    return difference


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float]]:
    """A function that gives the peak of a block in MiB beyond its beginning: of the GPU, or of the process."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    before, most, done = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _resident())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: max(0.0, most[0] - before)
    finally:
        done.set()
        thread.join()


def _resident() -> float:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(title: str, figures: dict[str, dict[str, Any]], args: argparse.Namespace, **facts: Any) -> None:
    """Print the table, and write the record where ``--json`` says.

    Args:
        figures: of a ``Clock``; those of several cases under the names `case: side`.
    """
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    record = {"benchmark": title, "command": command, "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
              "load": round(os.getloadavg()[0], 2), "versions": versions(), "threads": torch.get_num_threads(),
              "facts": facts, "figures": figures}
    print(f"\n{title}\n{command}\n{record['hardware']}; {record['threads']} threads; load {record['load']}; "
          + ", ".join(f"{name} {number}" for name, number in record["versions"].items()))
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    width = max(map(len, figures))
    for name, row in figures.items():
        print(f"{name:{width}}  {row['speed']:12,.1f} {row['unit']:10}  ratio {row['ratio']:6.2f}  "
              f"spread {row['spread']:5.1%}  peak {row['peak_mib']:8.0f} MiB")
    if args.json:
        path = RESULTS / f"{args.json}.json" if re.fullmatch(r"[\w-]+", args.json) else Path(args.json)
        with artifact.atomic_file(path) as out:
            json.dump(record, out, indent=1)
            out.write("\n")


def hardware() -> str:
    """Processor, cores and GPU in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        rows = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = rows[0] if rows else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
