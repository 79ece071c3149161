"""Shards: a collection tokenised once, memory-mapped, read at random by row or id.

    SHARDS/
      manifest.json              counts, token statistics, tokenizer hash, checksums
      tokenizer/                 as `save_pretrained` writes it
      docs-00000.arrow …         tokens of the documents, lookup-docs.arrow their ids
      queries-SPLIT-00000.arrow  tokens of the queries of a split, lookup-queries-SPLIT.arrow their ids
      ends.npy                   where documents are split: rows of each (see `lexmae.data.passages`)
      qrels/SPLIT.tsv            judgements, where the split has any
      word_starts.npy            bool [V], for whole-word masking

Reading needs neither torch nor transformers. `prepare` (of `lexmae.data.prepare`) writes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from lexmae import artifact, verification
from lexmae.checked import read_array, read_strings
from lexmae.data.passages import PassageMap, read_ends
from lexmae.data.prepare import KIND, prepare, table_name
from lexmae.data.qrels import Qrels, read_qrels
from lexmae.data.tokenizer import SpecialIds
from lexmae.data.tokens import TokenBatch, TokenTable
from lexmae.errors import InputError

__all__ = ["Shards", "SpecialIds", "TokenBatch", "TokenTable", "prepare"]


class Shards:
    """A finished directory of shards."""

    def __init__(self, manifest: artifact.Manifest) -> None:
        self.manifest = manifest
        self.path = manifest.path
        self.splits: list[str] = manifest.fact("splits", list)
        for split in self.splits:
            _check_split(split, manifest)
        self.vocab_size: int = manifest.fact("vocab_size", int)
        self.special = _special(manifest, self.vocab_size)
        self.token_type_ids: bool = manifest.fact("token_type_ids", bool)
        self.split_documents: bool = bool(manifest.config.get("split_documents"))
        self._queries: dict[str, TokenTable] = {}

    @staticmethod
    def open(path: str | Path) -> Shards:
        """Open shards, verified as ``verification`` says.

        Raises:
            InputError: they are missing, unfinished, damaged or of another kind.
        """
        return Shards(verification.opened(path, KIND, deep=lambda manifest: Shards(manifest).check_tokens()))

    def __reduce__(self):
        return Shards.open, (self.path,)

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's folder, for `AutoTokenizer.from_pretrained`."""
        return self.path / "tokenizer"

    @cached_property
    def docs(self) -> TokenTable:
        """The documents, or their passages where documents are split."""
        return TokenTable(self.path, "docs", "document")

    @cached_property
    def documents(self) -> PassageMap:
        """Which rows of `docs` belong to which document."""
        return PassageMap(self.docs, read_ends(self.path, len(self.docs)) if self.split_documents else None)

    def queries(self, split: str) -> TokenTable:
        """The queries of a split."""
        self.refuse_absent(split)
        if split not in self._queries:
            self._queries[split] = TokenTable(self.path, table_name(split), "query")
        return self._queries[split]

    def qrels(self, split: str) -> Qrels:
        """Judgements {query: {document: relevance}} of a split; empty when it has none."""
        self.refuse_absent(split)
        path = self.path / "qrels" / f"{split}.tsv"
        return read_qrels(path) if path.is_file() else {}

    @contextlib.contextmanager
    def looking_up(self, query: str, source: str | Path) -> Iterator[None]:
        """An InputError about an unknown document becomes one about that query of the file ``source``."""
        try:
            yield
        except InputError as error:
            raise InputError(f"query {query!r}: {error.reason} of {self.path}", source) from None

    def vocabulary(self) -> list[str]:
        """The token strings by id."""
        return read_strings(self.path / "vocabulary.json")

    def word_starts(self) -> np.ndarray:
        """Whether each vocabulary entry begins a word, bool [V]. Special tokens do."""
        return read_array(self.path / "word_starts.npy", bool)

    def refuse_other_tokenizer(self, model: str | Path, *kinds: str) -> artifact.Manifest | None:
        """The manifest of a model of this project, made with the tokenizer of the shards; None for other models.

        Raises:
            InputError: it is an artifact of none of these kinds, or made with another tokenizer.
        """
        if not artifact.exists(model):
            return None
        manifest = artifact.read(model)
        if manifest.kind not in kinds:
            artifact.read(model, kinds[0])  # which says so
        ours, theirs = self.manifest.extra, verification.opened(model).extra
        if theirs["tokenizer_hash"] != ours["tokenizer_hash"]:
            raise InputError(f"was trained with another tokenizer ({theirs['tokenizer_hash'][:16]}…, "
                             f"{theirs.get('vocab_size', '?')} tokens) than that of {self.path} "
                             f"({ours['tokenizer_hash'][:16]}…, {self.vocab_size} tokens)", model)
        return manifest

    def check_tokens(self) -> None:
        """Compare every token id with the vocabulary; reads all texts. InputError names a file and what it holds."""
        for table in (self.docs, *map(self.queries, self.splits)):
            table.check_tokens(self.vocab_size)

    def refuse_absent(self, split: str, key: str = "") -> None:
        """InputError where there are no queries of a split, which ``key`` of a recipe names."""
        if split not in self.splits:
            raise InputError(f"has no queries of the split {split!r}{key and f', which {key} names'}; it has "
                             f"{', '.join(self.splits) or 'none'}", path=self.path)


def _check_split(split: object, manifest: artifact.Manifest) -> None:
    """A split is part of the names of files."""
    if not isinstance(split, str) or "/" in split or any(letter in split for letter in "*?["):
        raise InputError(f"the split {split!r} is no name of a file", path=manifest.path)
    artifact.inside(manifest.path, split)


def _special(manifest: artifact.Manifest, vocab_size: int) -> SpecialIds:
    known, given = SpecialIds.__dataclass_fields__, manifest.fact("special_ids", dict)
    for name in known:
        value = given.get(name)
        if type(value) is not int or not 0 <= value < vocab_size:
            raise InputError(f"special_ids: {name} must be an id below {vocab_size}, not {value!r}", path=manifest.path)
    return SpecialIds(**{name: given[name] for name in known})
