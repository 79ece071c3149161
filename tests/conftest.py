"""Small inputs that several tests share: a BEIR folder, the shards made of it, a model made for the shards.

The texts hold what real ones do: documents without a title, very short and very long ones, a word of many pieces, a
query with a character that the tokenizer has never seen, judgements of 0, queries with several positives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lexmae import artifact
from lexmae.config import NegativesConfig
from lexmae.data import draws, negative_rows
from lexmae.data.corpus import Passage, Query, write_beir
from lexmae.data.negatives import write_negatives
from lexmae.data.shards import Shards, prepare

DOCUMENTS, MAX_LENGTH, QUERY_LENGTH = 41, 28, 10
_WORDS = ("river stone carries silver water beneath ancient mountain bridges while quiet travellers remember winter "
          "markets where merchants trade copper lanterns against woven blankets and salted fish under open skies "
          "before evening bells announce closing gates around distant harbours filled with wooden ships").split()


def _text(random: np.random.Generator, words: int) -> str:
    return " ".join(_WORDS[i] for i in random.integers(0, len(_WORDS), words))


def passages() -> list[Passage]:
    """Documents d0 … d40; every fifth has no title."""
    random = np.random.default_rng(7)
    found = [Passage(f"d{i}", "" if i % 5 == 0 else _text(random, 2), _text(random, int(random.integers(1, 40))))
             for i in range(DOCUMENTS)]
    found[3] = Passage("d3", "Oddity", "quzzkvjxwqypfzkgx lies among wooden ships and a fish")
    return found


def queries() -> list[Query]:
    """Queries t0 … t12 of the split train, v0 … v4 of the split dev."""
    random = np.random.default_rng(8)
    names = [f"t{i}" for i in range(13)] + [f"v{i}" for i in range(5)]
    found = [Query(name, _text(random, int(random.integers(1, 8)))) for name in names]
    found[1] = Query("t1", "silver ☃ bridges")
    return found


def judgements() -> dict[str, dict[str, dict[str, int]]]:
    """One positive each; t2 and t5 have three, t7 shares its positive with t8, t9 has none among its judgements."""
    train = {f"t{i}": {f"d{3 * i}": 1} for i in range(13)}
    train["t2"] |= {"d1": 2, "d2": 1, "d30": 0}
    train["t5"] |= {"d16": 1, "d17": 3}
    train["t7"] = dict(train["t8"])
    train["t9"] = {"d40": 0}
    return {"train": train, "dev": {f"v{i}": {f"d{4 * i}": 1} for i in range(5)}}


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, for their subprocesses too: they remember nothing in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def beir_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection as a BEIR folder."""
    folder = tmp_path_factory.mktemp("collection") / "beir"
    write_beir(folder, passages(), queries(), judgements())
    return folder


@pytest.fixture(scope="session")
def shards_dir(beir_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the collection in files of 16 documents, with a WordPiece trained on it."""
    folder = tmp_path_factory.mktemp("shards") / "shards"
    prepare(beir_dir, folder, train_tokenizer=140, max_length=MAX_LENGTH, query_length=QUERY_LENGTH, workers=1,
            shard_size=16)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(shards_dir: Path) -> Shards:
    """The shards, opened."""
    return Shards.open(shards_dir)


@pytest.fixture(scope="session")
def lists(tiny_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> draws.NegativeLists:
    """Ten negatives for most queries of train, none for t3."""
    folder = tmp_path_factory.mktemp("negatives")
    random = np.random.default_rng(3)
    write_negatives(folder / "n.jsonl", ((f"t{i}", [f"d{j}" for j in random.permutation(41)[:10]], None)
                                         for i in range(13) if i != 3))
    negative_rows.build(tiny_shards, "train", NegativesConfig(str(folder / "n.jsonl"), depth=10), folder / "lists")
    return draws.NegativeLists(folder / "lists")


@pytest.fixture(scope="session")
def model_dir(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two tiny layers with random weights, as training leaves one: an artifact with the shards' tokenizer."""
    return write_model(tmp_path_factory.mktemp("model") / "model", shards_dir, seed=0)


def write_model(path: Path, shards_dir: Path, seed: int = 0, **extra) -> Path:
    """Write a random model for the shards; ``extra`` replaces facts of its manifest."""
    import torch

    from lexmae.model import backbone
    from lexmae.model.encoder import save_masked_lm

    shards = Shards.open(shards_dir)
    special = {name: getattr(shards.special, name) for name in ("pad", "unk", "cls", "sep", "mask")}
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "max_position_embeddings": 32}
    torch.manual_seed(seed)
    lm = backbone.create_masked_lm("bert", shards.vocab_size, special, size)
    for name, parameter in lm.named_parameters():
        if "norm" not in name.lower():
            torch.nn.init.normal_(parameter, std=0.3)
    with artifact.create(path, "model", inputs={"shards": shards_dir}) as draft:
        save_masked_lm(lm, draft.path, shards.tokenizer_dir)
        facts = {key: shards.manifest.extra[key]
                 for key in ("tokenizer_hash", "vocab_size", "max_length", "query_length")}
        draft.extra.update(facts | extra)
    return path


LONG_LENGTH, LONG_STRIDE = 28, 11


def long_documents() -> list[Passage]:
    """Documents D0 … D11 of 3 to 90 words."""
    random = np.random.default_rng(3)
    words = [5, 70, 12, 40, 90, 3, 33, 8, 61, 20, 45, 10]
    return [Passage(f"D{i}", "" if i == 3 else _text(random, 2), _text(random, n)) for i, n in enumerate(words)]


LONG_JUDGED = {"train": {"t0": {"D1": 1, "D0": 1}, "t1": {"D4": 2, "D2": 0}, "t2": {"D8": 1}},
               "dev": {"v0": {"D1": 1}, "v1": {"D3": 1}, "v2": {"D6": 1, "D5": 0}}}


@pytest.fixture(scope="session")
def long_dir(tmp_path_factory) -> Path:
    """The long documents as a BEIR folder."""
    folder = tmp_path_factory.mktemp("long") / "beir"
    random = np.random.default_rng(4)
    asked = [Query(name, _text(random, 4)) for split in LONG_JUDGED.values() for name in split]
    write_beir(folder, long_documents(), asked, LONG_JUDGED)
    return folder


@pytest.fixture(scope="session")
def long_shards(long_dir, tmp_path_factory) -> Shards:
    """Them, split, in files of 7 passages."""
    folder = tmp_path_factory.mktemp("split") / "shards"
    prepare(long_dir, folder, train_tokenizer=140, max_length=LONG_LENGTH, query_length=10, split_documents=True,
            stride=LONG_STRIDE, workers=1, shard_size=7)
    return Shards.open(folder)
