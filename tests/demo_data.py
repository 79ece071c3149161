"""A collection whose texts try to be HTML, with model, vectors and index, for the tests of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from conftest import MAX_LENGTH, QUERY_LENGTH, judgements, passages, queries, write_model

from lexmae.data.corpus import Passage, write_beir
from lexmae.data.shards import prepare
from lexmae.retrieval import encode, engines

EVIL = Passage('evil"><b>', '<script>document.title="caught"</script>Silver',
               "silver bridges <img src=x onerror=\"document.title='caught'\"> & ancient stone " + "water " * 90)


class Folders(NamedTuple):
    """What `tools/demo.py` is given."""

    model: Path
    index: Path
    vectors: Path
    corpus: Path

    def arguments(self) -> list[str]:
        """As arguments of the command."""
        return [part for name, path in self._asdict().items() for part in (f"--{name}", str(path))]


def build(folder: Path) -> Folders:
    """Write all of it."""
    made = Folders(folder / "model", folder / "index", folder / "vectors", folder / "corpus")
    write_beir(made.corpus, [*passages(), EVIL], queries(), judgements())
    prepare(made.corpus, folder / "shards", train_tokenizer=140, max_length=MAX_LENGTH, query_length=QUERY_LENGTH,
            workers=1)
    write_model(made.model, folder / "shards", seed=0)
    encode.encode(made.model, folder / "shards", made.vectors, encode.EncodeConfig("docs"))
    engines.build(made.vectors, "exact", made.index)
    return made
