"""BM25 over text or over token ids: the baseline, and the source of the first negatives.

Text is analysed the way Lucene's EnglishAnalyzer does it (Unicode word breaks, possessives off, lower case, stop
words off, Porter stems), and scored with Lucene's formula, k1 0.9 and b 0.4, as in Anserini.

Two other readings of the text: ``names`` also breaks words at dots, underscores and inner capitals
(``numpy.linalg.normType`` → numpy, linalg, norm, type), which suits program text; and prepared shards, whose
documents exist as token ids only, are searched by token id: no stems, no stop words, text cut to the shards'
length. That is clearly worse than the text itself (MRR@10 0.679 instead of 0.748 on some SQuAD paragraphs with a
vocabulary of 8000).
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice

import numpy as np

from lexmae.cli import progress
from lexmae.data.corpus import Passage
from lexmae.data.tokens import TokenTable
from lexmae.errors import InputError
from lexmae.retrieval.kernels import LIMIT, chunks, compiled, keep_best, unpack, worst
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
    ``idf(t) = ln(1 + (D - df + 0.5) / (df + 0.5))``; like Lucene, |d| is rounded (``lucene_length``).

    Attributes:
        ids: the documents' ids, sorted.
        analyzer: what made the terms from text, for the queries.
    """

    analyzer: Analyzer | None = None

    def __init__(self, documents: Iterable[tuple[str, Sequence]], k1: float = K1, b: float = B):
        """``documents``: (id, terms) pairs."""
        self._number: dict = {}
        names, lengths, flat = [], array("i"), array("i")
        for name, terms in documents:
            names.append(name)
            lengths.append(len(terms))
            flat.extend([self._number.setdefault(term, len(self._number)) for term in terms])
        if not flat:
            raise InputError("there is no text to index")
        order = sorted(range(len(names)), key=names.__getitem__)
        self.ids = [names[i] for i in order]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        self._invert(place, np.frombuffer(lengths, np.int32), np.frombuffer(flat, np.int32), k1, b)

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
        return self._starts.nbytes + self._documents.nbytes + self._weights.nbytes

    @property
    def mean_terms(self) -> float:
        """Mean number of different terms per document."""
        return len(self._documents) / len(self.ids)

    def _invert(self, place: np.ndarray, lengths: np.ndarray, flat: np.ndarray, k1: float, b: float) -> None:
        """Postings sorted by term, then document, with their weights."""
        n = len(place)
        keys, tf = np.unique(flat.astype(np.int64) * n + np.repeat(place, lengths), return_counts=True)
        terms, self._documents = keys // n, (keys % n).astype(np.int32)
        df = np.bincount(terms, minlength=len(self._number))
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(df)])
        kept = np.empty(n)
        kept[place] = lucene_length(lengths)
        norm = k1 * (1 - b + b * kept / lengths.mean())
        idf = np.log1p((n - df + 0.5) / (df + 0.5))
        self._weights = (idf[terms] * tf / (tf + norm[self._documents])).astype(np.float32)

    def search(self, queries: Iterable[tuple[str, Sequence]], hits: int, threads: int = 1) -> Run:
        """The ``hits`` best documents of every (id, terms) pair; ties by document id.

        Only documents with a term of the query are found. A term that occurs twice in the query counts twice.
        """
        names, counts, flat = [], [0], array("q")
        for name, row in queries:
            names.append(name)
            flat.extend([self._number[term] for term in row if term in self._number])
            counts.append(len(flat))
        hits, bounds = min(hits, len(self.ids)), chunks(len(names), threads)
        offsets, terms = np.array(counts, np.int64), np.array(flat, np.int64)
        self._search(offsets, terms, 0, min(1, len(names)), hits)  # compiles before the clock starts
        run, started = Run(self.ids), time.perf_counter()
        with ThreadPoolExecutor(threads) as pool, progress(total=len(names), desc="search", unit="query") as bar:
            jobs = [pool.submit(self._search, offsets, terms, first, last, hits) for first, last in bounds]
            for (first, _), job in zip(bounds, jobs, strict=True):
                for offset, (rows, scores) in enumerate(job.result()):
                    run.add(names[first + offset], rows, scores, ordered=True)
                bar.update(len(job.result()))
        run.seconds = time.perf_counter() - started
        return run

    def _search(self, offsets: np.ndarray, terms: np.ndarray, first: int, last: int,
                hits: int) -> list[tuple[np.ndarray, np.ndarray]]:
        keys = np.zeros((last - first, hits), np.int64)
        counts = np.zeros(last - first, np.int64)
        _search_terms(self._starts, self._documents, self._weights, len(self.ids), offsets, terms, first, last, hits,
                      keys, counts)
        found = [unpack(row[:count]) for row, count in zip(keys, counts.tolist(), strict=True)]
        return [(rows, bits.view(np.float32).astype(np.float64)) for rows, bits in found]


def token_rows(table: TokenTable, special: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """(id, token ids) of every row, those in ``special`` left out."""
    for row, name in enumerate(table.ids()):
        tokens = table.tokens(row)
        yield name, tokens[~np.isin(tokens, special)].tolist()


def lucene_length(lengths: np.ndarray) -> np.ndarray:
    """Document lengths as Lucene keeps them in one byte: exact to 40; above 24, the excess to four significant bits."""
    above = np.maximum(np.asarray(lengths, np.int64) - 24, 0)
    shift = np.maximum(np.frexp(above)[1] - 4, 0)
    return np.minimum(lengths, 24) + ((above >> shift) << shift)


@compiled
def _search_terms(starts, documents, weights, n_documents, offsets, terms, first, last, hits, out_keys, out_counts):
    """The best ``hits`` keys of each query ``first`` to ``last - 1``, in no order.

    Sums are taken in float64 and kept as float32, whose bits, read as an integer, order positive numbers.
    """
    sums = np.zeros(n_documents, np.float64)
    room = max(4 * hits, 4096)
    keys = np.empty(room, np.int64)
    single = np.zeros(1, np.float32)
    bits = single.view(np.int32)
    for query in range(first, last):
        for j in range(offsets[query], offsets[query + 1]):
            for i in range(starts[terms[j]], starts[terms[j] + 1]):
                sums[documents[i]] += weights[i]
        found, floor = 0, np.float64(0)
        for document in range(n_documents):
            if sums[document] > floor:
                single[0] = sums[document]
                keys[found] = (np.int64(bits[0]) << 31) | (LIMIT - document)
                found += 1
                if found == room:
                    found = keep_best(keys, found, hits)
                    bits[0] = worst(keys, hits)
                    floor = np.float64(single[0])
            sums[document] = 0
        out_counts[query - first] = keep_best(keys, found, hits)
        for i in range(out_counts[query - first]):
            out_keys[query - first, i] = keys[i]
