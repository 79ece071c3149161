"""Compiled loops of exact search, the choice of the best hits, the division of work among threads.

Shapes: V vocabulary, P postings, G blocks of documents, D documents of a segment, Q queries of a batch, K hits.

A hit is kept as one integer key, ``score · 2³¹ + (2³¹ - 1 - document)`` with a score of at most 31 bits: keys are
unique, and the larger key is the better hit, equal scores included (the lower document number comes first).
A posting is one 32-bit word, ``weight · 2¹⁶ + document``, the document counted within its block: one load instead of
two. The kernels are written as plain loops: slices and array functions take numba seconds to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numba
import numpy as np

LIMIT = 2**31 - 1
TILE, PART = 128, 8  # accumulators compared with the floor at a time, then again in parts; blocks are multiples of TILE
FOUND, FLOOR = range(2)  # columns of a query's state
_DOCUMENT, _WEIGHT = np.uint32(0xFFFF), np.uint32(16)  # where a posting keeps which


def compiled(function: Callable) -> Callable:
    """Compile without the interpreter lock; keep the machine code on disk where a cache folder can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder it may write to
        return numba.njit(nogil=True)(function)


def frozen(array: np.ndarray) -> np.ndarray:
    """A plain, read-only view: mapped or not, one compiled form of a kernel serves all (and memmap slices slowly)."""
    view = np.asarray(array).view(np.ndarray)
    view.flags.writeable = False
    return view


@compiled
def keep_best(keys, found, hits):
    """Move the ``hits`` largest of the first ``found`` keys to the front, in no order; returns how many were kept.

    Hoare's selection; numba's own ``np.partition`` is faster but takes several seconds to compile.
    """
    low, high = 0, found - 1
    while hits < found and low < high:
        pivot = keys[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if hits - 1 <= j:
            high = j
        elif hits - 1 >= i:
            low = i
        else:
            break
    return min(found, hits)


@compiled
def gather(indptr, indices, weights, rows, places, out_indptr, out_indices, out_weights):
    """Copy the rows ``rows`` of a CSR matrix to the places ``places`` of another, whose offsets are known."""
    for n in range(len(rows)):
        at = out_indptr[places[n]]
        for i in range(indptr[rows[n]], indptr[rows[n] + 1]):
            out_indices[at] = indices[i]
            out_weights[at] = weights[i]
            at += 1


@compiled
def invert(indptr, indices, weights, at, starts, postings, heaviest):
    """Write the postings of a block of rows, sorted by term, from position ``at`` on; raise ``heaviest`` [V]."""
    for i in range(len(indices)):
        starts[indices[i] + 1] += 1
    starts[0] = at
    for term in range(len(starts) - 1):
        starts[term + 1] += starts[term]
    free = starts[:-1].copy()
    for row in range(len(indptr) - 1):
        for i in range(indptr[row], indptr[row + 1]):
            term = indices[i]
            postings[free[term]] = (np.uint32(weights[i]) << _WEIGHT) | np.uint32(row)
            free[term] += 1
            heaviest[term] = max(heaviest[term], weights[i])


@compiled
def forward(starts, postings, slots, indptr, indices, weights):
    """The rows of a block again, terms ascending: document d becomes row ``slots[d]``, or none where that is -1.

    ``indptr`` comes as zeros [R+1]; returns the number of entries, which is all it does while ``indices`` is empty.
    """
    for i in range(starts[0], starts[-1]):
        slot = slots[postings[i] & _DOCUMENT]
        if slot >= 0:
            indptr[slot + 1] += 1
    for row in range(len(indptr) - 1):
        indptr[row + 1] += indptr[row]
    if len(indices) < indptr[-1]:
        return indptr[-1]
    free = indptr[:-1].copy()
    for term in range(len(starts) - 1):
        for i in range(starts[term], starts[term + 1]):
            slot = slots[postings[i] & _DOCUMENT]
            if slot >= 0:
                indices[free[slot]] = term
                weights[free[slot]] = postings[i] >> _WEIGHT
                free[slot] += 1
    return indptr[-1]


@compiled
def search_blocks(starts, postings, numbers, block, q_indptr, q_terms, q_weights, first, last, hits, total, state, keys,
                  scores, tiles, heads):
    """Add the hits of a segment to the state of the queries ``first`` to ``last - 1``; row 0 of it is query ``first``.

    Block by block, all queries of the batch in each: the postings that one query has fetched stay in the cache for
    the next. A query whose floor is negative is passed over. Indices are unsigned: numba would ask of a signed one
    whether it counts from the end, which costs a third of the adding up.

    Args:
        starts: int64 [G, V+1]; ``postings``: uint32 [P]; ``numbers``: int32 [D], -1 for a deleted document.
        total: documents of all segments, for the guess of a floor.
        state: int64 [Q, 2], see ``open_state``; ``keys``: int64 [Q, K'], K' >= K + TILE.
        scores: int32 [block], zeros, and zeros again at the end; ``tiles``: the same memory as [block / TILE, TILE].
        heads: int32 [block / PART], anything.
    """
    for g in range(len(starts)):
        base = g * block
        n_documents = min(block, len(numbers) - base)
        n_tiles = (n_documents + TILE - 1) // TILE
        share = min(1.0, n_documents / max(total, 1))  # more than all where deleted documents are in the block
        rank = np.int64(hits * share * (2 - share) + 4 * np.sqrt(hits * share * (1 - share))) + 1
        for query in range(first, last):
            own = state[query - first]
            if own[FLOOR] < 0:
                continue
            touched = np.uint64(0)
            for j in range(q_indptr[query], q_indptr[query + 1]):
                factor = np.int32(q_weights[j])
                low, high = np.uint64(starts[g, q_terms[j]]), np.uint64(starts[g, q_terms[j] + 1])
                touched += high - low
                for i in range(low, high):
                    posting = postings[i]
                    scores[posting & _DOCUMENT] += factor * np.int32(posting >> _WEIGHT)
            if touched:
                if own[FLOOR] == 0:
                    own[FLOOR] = _guess_floor(tiles, n_tiles, rank, heads)
                _collect(tiles, n_tiles, numbers, base, hits, own, keys[query - first])


@compiled
def _guess_floor(tiles, n_tiles, rank, heads):
    """A score that about ``rank`` documents of a block reach, and never fewer; 1 where the block has no such score.

    Found among the largest scores of each PART of the block, to one part in 64.
    """
    n = 0
    high = np.int32(1)
    for t in range(n_tiles):
        for part in range(0, TILE, PART):
            best = np.int32(0)
            for d in range(PART):
                best = max(best, tiles[t, part + d])
            heads[n] = best
            high = max(high, best)
            n += 1
    low = np.int32(1)  # reached by ``rank`` heads, or the lowest floor there is
    while high - low > low >> 6:
        middle = low + (high - low + 1) // 2
        above = np.int32(0)
        for i in range(n):
            above += np.int32(heads[i] >= middle)
        if above >= rank:
            low = np.int32(middle)
        else:
            high = np.int32(middle - 1)
    return np.int64(low)


@compiled
def _collect(tiles, n_tiles, numbers, base, hits, state, keys):
    """Keep what of a block may be among the ``hits`` best, and leave zeros behind.

    What is kept reaches the floor. Where ``keys`` is full the best are selected, and the worst of them is the floor.
    """
    found, floor = state[FOUND], np.int32(state[FLOOR])
    for t in range(n_tiles):
        best = np.int32(0)
        for d in range(TILE):
            best = max(best, tiles[t, d])
        if best >= floor:
            for part in range(0, TILE, PART):
                best = np.int32(0)
                for d in range(PART):
                    best = max(best, tiles[t, part + d])
                if best < floor:
                    continue
                for d in range(part, part + PART):
                    score = tiles[t, d]
                    if score >= floor and numbers[base + t * TILE + d] >= 0:
                        keys[found] = (np.int64(score) << 31) | (LIMIT - numbers[base + t * TILE + d])
                        found += 1
            if found > len(keys) - TILE:
                found = keep_best(keys, found, hits)
                worst = keys[0]
                for i in range(found):
                    worst = min(worst, keys[i])
                floor = np.int32(worst >> 31)
        for d in range(TILE):
            tiles[t, d] = 0
    state[FOUND], state[FLOOR] = found, floor


@compiled
def open_state(q_indptr, q_terms, q_weights, first, last, heaviest, state):
    """The state of queries without hits; the floor is -1 where a score might not fit into 31 bits.

    Args:
        heaviest: int64 [V], the largest weight of any document for each term.
        state: int64 [Q, 2]: keys kept, the score that a further one must reach: 0 while it has not been guessed.
    """
    for query in range(first, last):
        bound = np.int64(0)
        for j in range(q_indptr[query], q_indptr[query + 1]):
            bound += np.int64(q_weights[j]) * heaviest[q_terms[j]]
        state[query - first, FOUND] = 0
        state[query - first, FLOOR] = 0 if bound <= LIMIT else -1


def unpack(keys: np.ndarray, hits: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys in any order → document numbers int32 and scores int32 of the ``hits`` best, best first.

    numpy sorts a few thousand integers with vector instructions faster than it or ``keep_best`` selects among them.
    """
    best = np.sort(keys)[:-hits - 1:-1]
    return (LIMIT - (best & LIMIT)).astype(np.int32), (best >> 31).astype(np.int32)


def chunks(n: int, threads: int, most: int = 256) -> list[tuple[int, int]]:
    """Ranges of queries, as many for each thread and about as long; none longer than ``most``, for its results' memory.

    Long ones: the queries of a range share what they fetch.
    """
    parts = max(1, threads * -(-n // (threads * most)))
    bounds = [n * i // parts for i in range(parts + 1)]
    return [(first, last) for first, last in pairwise(bounds) if first < last]
