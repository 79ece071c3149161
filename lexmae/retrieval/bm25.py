"""BM25 over text or over token ids: the baseline, and the source of the first negatives.

Text is analysed the way Lucene's EnglishAnalyzer does it (Unicode word breaks, possessives off, lower case, stop
words off, Porter stems), and scored by the library bm25s with Lucene's formula, k1 0.9 and b 0.4, as in Anserini.
Lucene itself rounds document lengths above 40 terms to one byte; bm25s does not, so figures may differ from
Anserini's by about 0.001.

Two other readings of the text: ``names`` also breaks words at dots, underscores and inner capitals
(``numpy.linalg.normType`` → numpy, linalg, norm, type), which suits program text; and prepared shards, whose
documents exist as token ids only, are searched by token id: no stems, no stop words, text cut to the shards'
length. That is clearly worse than the text itself (MRR@10 0.68 instead of 0.75 on some SQuAD paragraphs with a
vocabulary of 8000).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice

import bm25s
import numpy as np

from lexmae.cli import progress
from lexmae.data.corpus import Passage
from lexmae.data.tokens import TokenTable
from lexmae.errors import InputError
from lexmae.retrieval.kernels import chunks
from lexmae.retrieval.runs import Run

K1, B = 0.9, 0.4
# Lucene's EnglishAnalyzer.ENGLISH_STOP_WORDS_SET
STOP_WORDS = frozenset(("a an and are as at be but by for if in into is it no not of on or such that the their then "
                        "there these they this to was will with").split())
_IDEOGRAPH = r"\u2e80-\u2fdf\u3005-\u3007\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER, _MARK = rf"[^\W\d_{_IDEOGRAPH}]", r"\u0300-\u036f\u0590-\u05bd\u064b-\u065f\u0900-\u0903\u093a-\u094f"
# Unicode word breaks (UAX 29) as Lucene's StandardTokenizer applies them: letters join over . : ' · and digits over
# . , ; ' between them; an ideograph stands alone
_WORD = re.compile(rf"[{_IDEOGRAPH}]|(?:(?![{_IDEOGRAPH}])[\w{_MARK}])+"
                   rf"(?:(?:(?<={_LETTER})[.:'\u2019\u00b7\u2027](?={_LETTER})|(?<=\d)[.,;'\u2019](?=\d))"
                   rf"(?:(?![{_IDEOGRAPH}])[\w{_MARK}])+)*")
_POSSESSIVE = re.compile(r"['\u2019\uff07][sS]$")
_NAME = re.compile(r"[A-Za-z]\.[A-Za-z]{2,}|_|[a-z][A-Z]")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")


def words(text: str) -> list[str]:
    """The words of a text as Lucene's StandardTokenizer breaks them."""
    return [word for word in _WORD.findall(text) if word.strip("_")]


def name_parts(text: str) -> list[str]:
    """The words of a text, broken further at dots, underscores, digits and inner capitals."""
    return [part for word in words(text) for part in _PARTS.findall(_POSSESSIVE.sub("", word))]


TOKENS: dict[str, Callable[[str], list[str]]] = {"standard": words, "names": name_parts}


def suited_tokens(texts: Iterable[str]) -> str:
    """``names`` where more than one word in a hundred is a program's name (of docstrings it is one in 25, of
    encyclopaedia text one in 700), else ``standard``."""
    found = [_NAME.search(word) is not None for text in texts for word in words(text)]
    return "names" if sum(found) > 0.01 * len(found) else "standard"


class Analyzer:
    """Text → terms."""

    def __init__(self, tokens: str = "standard"):
        """``tokens``: ``standard`` or ``names``."""
        import Stemmer

        if tokens not in TOKENS:
            raise InputError(f"unknown way '{tokens}' to break words: known are {', '.join(TOKENS)}")
        self.tokens = tokens
        self._words = TOKENS[tokens]
        stemmer = Stemmer.Stemmer("porter", 0)

        @lru_cache(maxsize=1 << 20)
        def term(word: str) -> str | None:
            word = _POSSESSIVE.sub("", word).lower()
            return None if word in STOP_WORDS else stemmer.stemWord(word)

        self._term = term

    def __call__(self, text: str) -> list[str]:
        """The terms of a text in order, stop words left out."""
        return [term for term in map(self._term, self._words(text)) if term]


class Bm25:
    """An index in memory over documents given as sequences of terms (strings, or token ids).

    The weight of term t in document d is ``idf(t) · tf / (tf + k1·(1 - b + b·|d| / mean))`` with
    ``idf(t) = ln(1 + (D - df + 0.5) / (df + 0.5))``: the method ``lucene`` of bm25s. Its numpy backend is used, as
    the numba backend compiles for 15 s in every process.

    Attributes:
        ids: the documents' ids, sorted.
        analyzer: what made the terms from text, for the queries.
    """

    analyzer: Analyzer | None = None

    def __init__(self, documents: Iterable[tuple[str, Sequence]], k1: float = K1, b: float = B):
        """``documents``: (id, terms) pairs."""
        self._number: dict = {}
        rows = [(name, [self._number.setdefault(term, len(self._number)) for term in terms])
                for name, terms in documents]
        if not self._number:
            raise InputError("there is no text to index")
        rows.sort(key=lambda row: row[0])
        self.ids = [name for name, _ in rows]
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._index.index(([terms for _, terms in rows], self._number), create_empty_token=False, show_progress=False)

    @classmethod
    def of_text(cls, passages: Iterable[Passage], tokens: str = "auto", **settings: float) -> Bm25:
        """Over passages; title and text are one field. ``auto`` breaks words as suits the first 2000 of them."""
        passages = iter(passages)
        head = list(islice(passages, 2000))
        if tokens == "auto":
            tokens = suited_tokens(f"{p.title}\n{p.text}" for p in head)
        analyzer, bar = Analyzer(tokens), progress(chain(head, passages), desc="read", unit="doc")
        index = cls(((p.id, analyzer(f"{p.title}\n{p.text}")) for p in bar), **settings)
        index.analyzer = analyzer
        return index

    @classmethod
    def of_tokens(cls, table: TokenTable, special: Sequence[int], **settings: float) -> Bm25:
        """Over the token ids of prepared documents, those in ``special`` left out."""
        return cls(token_rows(table, special), **settings)

    @property
    def n_bytes(self) -> int:
        """Size of the postings."""
        return sum(self._index.scores[part].nbytes for part in ("data", "indices", "indptr"))

    @property
    def mean_terms(self) -> float:
        """Mean number of different terms per document."""
        return len(self._index.scores["data"]) / len(self.ids)

    def search(self, queries: Iterable[tuple[str, Sequence]], hits: int, threads: int = 1) -> Run:
        """The ``hits`` best documents of every (id, terms) pair; ties by document id.

        Only documents with a term of the query are found. A term that occurs twice in the query counts twice.
        """
        asked = [(name, [self._number[term] for term in terms if term in self._number]) for name, terms in queries]
        parts = [asked[first:last] for first, last in chunks(len(asked), threads)]
        run, started = Run(self.ids), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool, progress(total=len(asked), desc="search", unit="query") as bar:
            for part, found in zip(parts, pool.map(lambda part: self._search(part, hits), parts), strict=True):
                for (name, _), (rows, scores) in zip(part, found, strict=True):
                    run.add(name, rows, scores, ordered=True)
                bar.update(len(part))
        run.seconds = time.perf_counter() - started
        return run

    def _search(self, queries: list[tuple[str, list[int]]], hits: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [best(self._index.get_scores_from_ids(terms), hits) for _, terms in queries]


def best(scores: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``hits`` best documents of those with a positive score [D]: rows and scores, equal scores by row."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > hits:
        rows = rows[scores[rows] >= np.partition(scores[rows], -hits)[-hits]]
    rows = rows[np.argsort(-scores[rows], kind="stable")[:hits]].astype(np.int32)
    return rows, scores[rows]


def token_rows(table: TokenTable, special: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """(id, token ids) of every row, those in ``special`` left out."""
    for row, name in enumerate(table.ids()):
        tokens = table.tokens(row)
        yield name, tokens[~np.isin(tokens, special)].tolist()
