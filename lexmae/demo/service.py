"""What the page asks for: search a text, show a document. One model, one index, one collection.

Shapes: B texts (always 1), L tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmae import artifact, verification
from lexmae.data import tokenizer as tokenizers
from lexmae.data.corpus import Corpus
from lexmae.data.tokenizer import TextEncoder
from lexmae.demo import explain
from lexmae.demo.explain import Match, Segment, Term
from lexmae.demo.texts import TextStore
from lexmae.errors import InputError
from lexmae.model import foreign
from lexmae.model.encoder import SparseEncoder
from lexmae.retrieval import engines, vectors
from lexmae.retrieval.vectors import Csr, SparseVectors

QUERY_LENGTH = 32  # tokens, of models that do not say
_WHOLE = 65535  # tokens of a text, to tell what stands in it


@dataclass(frozen=True)
class Result:
    """A found document.

    Attributes:
        added: terms that its text does not hold, heaviest first.
        terms: number of terms of its vector.
    """

    rank: int
    id: str
    score: float
    title: str
    text: str
    snippet: list[Segment]
    matches: list[Match]
    added: list[Term]
    terms: int


@dataclass(frozen=True)
class Answer:
    """The results of a query, best first; times in milliseconds."""

    query: str
    terms: list[Term]
    results: list[Result]
    encode_ms: float
    search_ms: float


@dataclass(frozen=True)
class Document:
    """A document and its whole lexicon, heaviest first. `marked` is its text, words that match a query apart."""

    id: str
    title: str
    marked: list[Segment]
    terms: list[Term]


class Service:
    """Answers from a model, an index, the vectors in it and their texts; safe to call from several threads.

    Args:
        corpus: a collection, as `Corpus.open` takes it.

    Raises:
        InputError: something is missing, or they do not belong together.
    """

    def __init__(self, model: str | Path, index: str | Path, documents: str | Path, corpus: str | Path):
        self.index = engines.open_index(index)
        self.vectors = SparseVectors.open(documents, side="docs")
        self._refuse_other_vectors(Path(documents))
        chosen = foreign.plan(model, "queries")
        tokenizer = foreign.tokenizer(chosen)
        if tokenizer is None:
            raise InputError("has no tokenizer", model)
        self._refuse_other_tokenizer(model, tokenizer)
        parts = Path(str(model)).parts
        self.name, self._lock = "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:]), threading.Lock()
        facts = artifact.read(model, "model").extra if artifact.exists(model) else {}
        self.query_length = int(facts.get("query_length", QUERY_LENGTH))
        self._tokenizer, self._texts = tokenizer, TextEncoder(tokenizer)
        self._names = explain.Names(self.vectors.vocabulary, tokenizer, tokenizers.word_starts(tokenizer))
        self._encoder = SparseEncoder.load(model, side="queries").eval()
        self.index.search(self._encode("a")[0], 1, 1)  # refuses another vocabulary; loads the compiled search
        self.store = TextStore(Corpus.open(corpus), self.vectors.ids)

    def _refuse_other_vectors(self, path: Path) -> None:
        index = self.index.manifest
        made_of = index.inputs.get("vectors", {}).get("fingerprint", self.vectors.fingerprint)
        changed = any({"added", "deleted"} & entry.keys() for entry in index.fact("history", list, default=[]))
        if made_of != self.vectors.fingerprint or len(self.index) != len(self.vectors) or changed:
            raise InputError(f"is not what {index.path} was made of; an index that was changed since has to be built "
                             "anew", path)
        if index.config.get("top_k") is not None:  # explanations add up to scores
            self.vectors = self.vectors.pruned(index.fact("top_k", int, "config"))

    def _refuse_other_tokenizer(self, model: str | Path, tokenizer: Any) -> None:
        made_with = self.vectors.extra.get("tokenizer_hash")
        theirs = self.vectors.vocabulary
        known = tokenizers.vocabulary(tokenizer, max(len(tokenizer), len(theirs)))
        own = verification.opened(model).extra["tokenizer_hash"] if artifact.exists(model) else made_with
        if known != theirs:
            how = vectors.vocabularies_differ(known, theirs)
            raise InputError(f"has another tokenizer than the model that encoded the documents: {how} there", model)
        if own != made_with:
            raise InputError("has another tokenizer than the model that encoded the documents: "
                             f"{own[:16]}… here, {str(made_with)[:16]}… there", model)

    def close(self) -> None:
        """Remove what lies on disk."""
        self.store.close()

    def __len__(self) -> int:
        return len(self.vectors)

    # ------------------------------------------------------------------------------------------------- questions

    def search(self, text: str, hits: int = 10) -> Answer:
        """The best documents for a text, each with what it matched."""
        started = time.perf_counter()
        query, tokens = self._encode(text)
        encoded = time.perf_counter()
        run = self.index.search(query, hits, 1)
        searched = time.perf_counter()
        row = query.row(0)
        results = [self._result(rank, name, score, row) for rank, (name, score) in enumerate(run["query"], 1)]
        seconds = searched - encoded if run.seconds is None else run.seconds
        return Answer(text, explain.terms(self._names, *row, tokens), results, 1000 * (encoded - started),
                      1000 * seconds)

    def document(self, identifier: str, query: str = "") -> Document | None:
        """A document by id; None where there is none. Words that match the query are marked."""
        at, passage = self.store.row(identifier), self.store.text(identifier)
        if at is None or passage is None:
            return None
        found = self.vectors.row(at)
        met = explain.products(self._encode(query)[0].row(0), found) if query.strip() else {}
        words = self._words(passage.text, met)
        return Document(identifier, passage.title, explain.segments(passage.text, words),
                        explain.terms(self._names, *found, self._tokens(passage.title, passage.text)))

    def _result(self, rank: int, name: str, score: float, query: tuple[np.ndarray, np.ndarray]) -> Result:
        passage, row = self.store.text(name), self.store.row(name)
        if passage is None or row is None:
            raise InputError(f"document {name!r} has no text")
        found = self.vectors.row(row)
        tokens = self._tokens(passage.title, passage.text)
        words = self._words(passage.text, explain.products(query, found))
        terms = explain.terms(self._names, *found, tokens)
        return Result(rank, name, score / vectors.SCALE**2, passage.title, passage.text,
                      explain.snippet(passage.text, words), explain.matches(self._names, query, found, tokens),
                      [term for term in terms if not term.in_text], len(terms))

    # ---------------------------------------------------------------------------------------------------- tokens

    def _encode(self, text: str) -> tuple[SparseVectors, set[int]]:
        """The vector of a query, quantised, and the ids of its tokens."""
        with self._lock:
            ids = self._texts.singles([text], self.query_length).values.astype(np.int64)
            row = torch.from_numpy(ids)[None]  # [1, L]
            is_text = ~torch.isin(row, torch.tensor(self._texts.special.structural))
            with torch.inference_mode():
                values = self._encoder(input_ids=row, attention_mask=torch.ones_like(row), text_mask=is_text,
                                       token_type_ids=torch.zeros_like(row))  # [1, V]
        csr = vectors.quantise(values[:, :self.vectors.n_terms].float().numpy(), self._texts.special.unk)
        extra = {"tokenizer_hash": self.vectors.extra.get("tokenizer_hash"), "scale": vectors.SCALE}
        return SparseVectors(["query"], *Csr(*csr), self.vectors.vocabulary, extra), set(ids.tolist())

    def _tokens(self, title: str, text: str) -> set[int]:
        """The ids of the tokens of a document."""
        with self._lock:
            return set(self._texts.pairs([title], [text], _WHOLE).values.tolist())

    def _words(self, text: str, weights: Mapping[int, float]) -> list[tuple[int, int, float]]:
        """(start, end, weight) of every word of a text; its weight is the largest of its tokens'."""
        with self._lock:
            got = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        words: dict[int, tuple[int, int, float]] = {}
        for number, token, (start, end) in zip(got.word_ids(), got["input_ids"], got["offset_mapping"], strict=True):
            if number is not None:
                first, _, weight = words.get(number, (start, end, 0.0))
                words[number] = first, end, max(weight, weights.get(token, 0.0))
        return list(words.values())
