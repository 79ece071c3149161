"""Why a document was found: which terms of its vector meet which of the query's, and which its text does not hold.

Weights are those of the index, `round(100·v)`, shown as `v`; a score is the sum of the products of two weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lexmae.retrieval.vectors import SCALE

SNIPPET_WORDS = 64
CONTINUES = "…"


@dataclass(frozen=True)
class Term:
    """An entry of a vector.

    Attributes:
        name: as it is shown: a piece that continues a word begins with CONTINUES.
        weight: v, not quantised.
        in_text: whether it stands in the text; the model added it where it does not.
        share: of the largest weight shown beside it, 0 to 100: the length of its bar.
    """

    name: str
    weight: float
    in_text: bool
    share: float


@dataclass(frozen=True)
class Match:
    """A term that query and document share: its part of the score is `product`."""

    name: str
    query: float
    document: float
    product: float
    in_text: bool
    share: float


@dataclass(frozen=True)
class Segment:
    """A piece of a text; `marked` where it is a word that matched."""

    text: str
    marked: bool


class Names:
    """How vocabulary entries are shown.

    Args:
        vocabulary: the token strings by id.
        tokenizer: turns byte-level and sentence pieces back into text.
        starts: whether an entry begins a word, bool [V].
    """

    def __init__(self, vocabulary: Sequence[str], tokenizer, starts: np.ndarray):
        self._vocabulary, self._tokenizer, self._starts = vocabulary, tokenizer, starts

    def __getitem__(self, index: int) -> str:
        token = self._vocabulary[index]
        if token.startswith("##") and len(token) > 2:
            return CONTINUES + token[2:]
        plain = self._tokenizer.convert_tokens_to_string([token]).strip() or token
        return plain if index >= len(self._starts) or self._starts[index] else CONTINUES + plain


def terms(names: Names, indices: np.ndarray, weights: np.ndarray, text: Collection[int]) -> list[Term]:
    """The entries of a vector, heaviest first; of equal ones the lower id."""
    order = np.lexsort((indices, -weights.astype(np.int64)))
    largest = max(int(weights.max(initial=0)), 1)
    return [Term(names[i], weight / SCALE, i in text, round(100 * weight / largest, 1))
            for i, weight in zip(indices[order].tolist(), weights[order].tolist(), strict=True)]


def matches(names: Names, query: tuple[np.ndarray, np.ndarray], document: tuple[np.ndarray, np.ndarray],
            text: Collection[int]) -> list[Match]:
    """The shared entries of two vectors (ids ascending, weights), largest product first."""
    shared, left, right = np.intersect1d(query[0], document[0], return_indices=True)
    one, other = query[1][left].astype(np.int64), document[1][right].astype(np.int64)
    parts = one * other
    largest = max(int(parts.max(initial=0)), 1)
    order = np.lexsort((shared, -parts))
    columns = (values[order].tolist() for values in (shared, one, other, parts))
    return [Match(names[i], a / SCALE, b / SCALE, product / SCALE**2, i in text, round(100 * product / largest, 1))
            for i, a, b, product in zip(*columns, strict=True)]


def products(query: tuple[np.ndarray, np.ndarray], document: tuple[np.ndarray, np.ndarray]) -> dict[int, int]:
    """Term id → what it adds to the score, of the shared entries of two vectors."""
    shared, left, right = np.intersect1d(query[0], document[0], return_indices=True)
    parts = query[1][left].astype(np.int64) * document[1][right].astype(np.int64)
    return dict(zip(shared.tolist(), parts.tolist(), strict=True))


def segments(text: str, words: Sequence[tuple[int, int, float]]) -> list[Segment]:
    """A text in pieces, marked words apart. `words` are (start, end, weight), in order; a weight marks a word."""
    found, at = [], 0
    for start, end, weight in words:
        if weight:
            found += [Segment(text[at:start], False), Segment(text[start:end], True)]
            at = end
    return [segment for segment in [*found, Segment(text[at:], False)] if segment.text]


def snippet(text: str, words: Sequence[tuple[int, int, float]], length: int = SNIPPET_WORDS) -> list[Segment]:
    """The part of a text whose words weigh most, `length` words at most; of equal ones the first."""
    if len(words) <= length:
        return segments(text, words)
    sums = np.concatenate([[0], np.cumsum([weight for _, _, weight in words])])
    first = int(np.argmax(sums[length:] - sums[:-length]))
    kept = words[first:first + length]
    start, end = kept[0][0], kept[-1][1]
    cut = segments(text[start:end], [(a - start, b - start, weight) for a, b, weight in kept])
    before = [Segment("… ", False)] if first else []
    return [*before, *cut, *([Segment(" …", False)] if first + length < len(words) else [])]
