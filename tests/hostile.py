"""What reads files from outside, as targets for hostile bytes: the outcome is a result or an InputError.

A target is a file within a folder of valid inputs, and a function that reads the folder with that file replaced.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from lexmae import artifact, cluster, recipe, verification
from lexmae.config import FinetuneRecipe, PretrainRecipe
from lexmae.cycle.config import PipelineRecipe
from lexmae.data import draws, negative_rows
from lexmae.data.corpus import Corpus, Passage, Query, write_beir
from lexmae.data.negatives import read_negatives
from lexmae.data.qrels import read_qrels
from lexmae.data.shards import Shards, prepare
from lexmae.errors import InputError
from lexmae.retrieval import engines
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.runs import read_run
from lexmae.retrieval.vectors import SparseVectors
from lexmae.train import hardware

TEXTS = ["silver water under bridges", "salted fish and woven blankets", "wooden ships before evening bells",
         "quiet travellers remember winter markets", "", "ancient mountain bridges"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader, the file it is given, and valid contents of it; ``restored`` afterwards where others need it."""

    name: str
    file: Path
    read: Callable[[], object]
    seeds: list[bytes]
    restored: bool = False

    def run(self, data: bytes) -> InputError | None:
        """Read with the file replaced by ``data``; anything but a result or an InputError passes through."""
        self.file.write_bytes(data)
        before = os.environ.get(verification.VARIABLE)
        os.environ[verification.VARIABLE] = "off"  # what the readers find by themselves
        try:
            self.read()
        except InputError as error:
            str(error).encode("utf-8", "backslashreplace")
            return error
        finally:
            os.environ[verification.VARIABLE] = before or "fast"
            if self.restored:  # other targets read this file, too
                self.file.write_bytes(self.seeds[0])
        return None


    def run_quietly(self, data: bytes) -> None:
        """The same for a fuzzer."""
        self.run(data)


def targets(folder: Path, name: str = "") -> list[Target]:
    """All targets, or the one of this name; their inputs are made in ``folder``."""
    made = [*_texts(folder / "texts"), *_settings(folder / "settings")]
    (folder / "made").mkdir(parents=True)
    kind = name.partition(":")[0]
    if not name or kind in ("vectors", "dense", "index"):
        made += _vectors(folder / "made")
    if not name or kind in ("shards", "draws"):
        made += _prepared(folder)
    return [target for target in made if name in ("", target.name)]


def _prepared(folder: Path) -> list[Target]:
    beir = folder / "made" / "beir"
    write_beir(beir, [Passage(f"d{i}", "", text) for i, text in enumerate(TEXTS)],
               [Query("q0", TEXTS[0]), Query("q1", TEXTS[1])], {"train": {"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 0}}})
    shards = folder / "made" / "shards"
    prepare(beir, shards, train_tokenizer=64, max_length=12, query_length=6, workers=1)
    return _shards(shards) + _negatives(folder / "made", shards)


def _files(name: str, folder: Path, read: Callable[[], object], *files: str) -> list[Target]:
    """A target for each file of a valid folder; the others stay as they are."""
    return [Target(f"{name}:{file}", folder / file, read, [(folder / file).read_bytes()], restored=True)
            for file in files]


def _texts(folder: Path) -> list[Target]:
    folder.mkdir(parents=True)
    run = b"q1 Q0 d1 1 2.5 tag\nq1 Q0 d2 2 1e-3 tag\nq2\tQ0\td1\t1\t7\ttag\n"
    own = b'{"qid": "q1", "negatives": ["d1", "d2"], "scores": [1.5, 2], "positives": {"d3": 4}, "passages": ["d3"]}\n'
    systems = b'{"qid": 1, "pos": [3], "neg": {"bm25": [1, {"pid": 2, "ce-score": 0.5}], "x": [2, 4]}}\n'
    table = {"q1": ["d1", "d2"], "q2": [("d3", 0.5)]}
    pickled = [pickle.dumps(table, protocol) for protocol in (0, 2, 4)]
    beir, marco = folder / "beir", folder / "marco"
    for path, text in {
            beir / "corpus.jsonl": '{"_id": "d1", "title": "a", "text": "b"}\n{"_id": 2, "text": "\\u00e9"}\n',
            beir / "queries.jsonl": '{"_id": "q1", "text": "who"}\n{"_id": "q2", "text": "what"}\n',
            beir / "qrels" / "train.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\t2\t0\n",
            marco / "collection.tsv": "1\tsome text\n2\tother text\n", marco / "queries.train.tsv": "7\twho\n8\twhat\n",
            marco / "qrels.train.tsv": "7\t0\t1\t1\n"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def collection(source: Path) -> None:
        corpus = Corpus.open(source)
        list(corpus.passages())
        for split in corpus.splits():
            list(corpus.queries(split))
            corpus.qrels(split)

    def one(name: str, read: Callable, *seeds: bytes) -> Target:
        path = folder / name
        return Target(name, path, lambda: read(path), list(seeds))

    return [
        *_files("beir", beir, lambda: collection(beir), "corpus.jsonl", "queries.jsonl", "qrels/train.tsv"),
        *_files("marco", marco, lambda: collection(marco), "collection.tsv", "queries.train.tsv", "qrels.train.tsv"),
        one("qrels", read_qrels, b"q1 0 d1 1\nq1 0 d2 -1\n", b"query-id\tcorpus-id\tscore\nq1\td1\t1\n",
            gzip.compress(b"q1 0 d1 1\n")),
        one("negatives", lambda path: list(read_negatives(path)), own, systems, b"1\t2,3,4\n",
            b"1\t2\twho\tsome text\n", run, gzip.compress(own)),
        one("negatives.pkl", lambda path: list(read_negatives(path)), *pickled),
        one("run", read_run, run, gzip.compress(run)),
        one("hostfile", cluster.read_hostfile, b"# two\nworker-1 slots=8\nworker-2 slots=4\n"),
    ]


def _settings(folder: Path) -> list[Target]:
    folder.mkdir(parents=True)
    root = Path(__file__).parents[1]

    def one(name: str, read: Callable, *seeds: Path | bytes) -> Target:
        path = folder / name
        return Target(name, path, lambda: read(path),
                      [seed if isinstance(seed, bytes) else seed.read_bytes() for seed in seeds])

    def composed(kind: type) -> Callable[[Path], object]:
        return lambda path: recipe.dump(recipe.load(path, kind, ["output=x"] if kind is not PipelineRecipe else []))

    bomb = b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
    return [
        one("pretrain.yaml", composed(PretrainRecipe), root / "recipes/toy/pretrain.yaml", bomb),
        one("finetune.yaml", composed(FinetuneRecipe), root / "recipes/toy/stage1.yaml",
            b"data: d\noutput: o\nnegatives: {sources: [{path: x, share: 2}]}\n"),
        one("pipeline.yaml", composed(PipelineRecipe), root / "recipes/toy/pipeline.yaml"),
        one("ds_config.json", hardware.read, *sorted((root / "ds_configs").glob("*.json"))),
        one("manifest.json", lambda path: verification.verify(path.parent), _manifest()),
    ]


def _manifest() -> bytes:
    record = {"lexmae": "0", "format": artifact.FORMAT, "kind": "vectors", "inputs": {"a": {"path": "b"}},
              "config": {"x": 1}, "counts": {"rows": 2}, "extra": {}, "files": {"part": "0" * 64, "a/b": "1" * 64},
              "fingerprint": "f" * 64, "versions": {}}
    return json.dumps(record).encode()


def _shards(path: Path) -> list[Target]:
    def read() -> None:
        shards = Shards.open(path)
        for table in (shards.docs, *map(shards.queries, shards.splits)):
            names = table.ids()
            table.contains(names)
            if len(table):
                table.pad_batch(np.arange(len(table)), shards.special.pad)
                table.first_length(0), table.tokens(len(table) - 1), table.rows(names[:1])
        for split in shards.splits:
            shards.qrels(split)
        shards.vocabulary(), shards.word_starts(), len(shards.documents)

    return _files("shards", path, read, "manifest.json", "docs-00000.arrow", "lookup-docs.arrow", "vocabulary.json",
                  "word_starts.npy", "qrels/train.tsv", "queries-train-00000.arrow")


def _negatives(folder: Path, shards: Path) -> list[Target]:
    source, path = folder / "negatives.jsonl", folder / "negatives"
    source.write_bytes(b'{"qid": "q0", "negatives": ["d2", "d3"]}\n{"qid": "q1", "negatives": ["d0"]}\n')
    config = recipe.load(_write(folder / "finetune.yaml", {"data": "d", "output": "o",
                                                           "negatives": {"path": str(source)}}), FinetuneRecipe)
    negative_rows.build(Shards.open(shards), "train", config.negatives, path)

    def read() -> None:
        lists = draws.NegativeLists(path)
        for query in range(2):
            lists.judged(query)
        lists.judged_pairs()

    return _files("draws", path, read, "manifest.json", "source0-ends.npy", "source0-rows.npy", "trained-ends.npy")


def _write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _vectors(folder: Path) -> list[Target]:
    path, index = folder / "vectors", folder / "index"
    rows = [[(1, 7), (3, 2)], [(0, 1)], [(2, 300), (3, 5), (4, 1)]]
    vectors = SparseVectors(
        ["a", "b", "c"], np.cumsum([0, *map(len, rows)]), np.array([t for row in rows for t, _ in row], np.int32),
        np.array([w for row in rows for _, w in row], np.uint16), ["[PAD]", "x", "y", "z", "[UNK]"],
        {"side": "docs", "scale": 100})
    vectors.save(path)
    engines.build(path, "exact", index)
    asked = SparseVectors(["q"], np.array([0, 2]), np.array([1, 3], np.int32), np.array([2, 1], np.uint16),
                          vectors.vocabulary, {"side": "queries", "scale": 100})
    dense = folder / "dense"
    DenseVectors(["a", "b"], np.ones((2, 3), np.float32), {"side": "docs"}).save(dense)
    names = sorted(str(file.relative_to(index)) for file in index.rglob("*") if file.is_file())
    return [*_files("vectors", path, lambda: SparseVectors.open(path, "docs").to_scipy().sum(), "manifest.json",
                    "vocabulary.json", "part-00000-00000.arrow"),
            *_files("dense", dense, lambda: DenseVectors.open(dense, "docs").subset([0]), "manifest.json", "ids.arrow",
                    "matrix.npy"),
            *_files("index", index, lambda: engines.open_index(index).search(asked, 3, threads=1), *names)]
