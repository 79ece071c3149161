"""Pairs: laid out by hand and as the tokenizers do it, cut to fit; the steps of the cross-encoder's training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUERY_LENGTH, passages, queries
from test_batches import positives
from test_shards import FAMILIES
from transformers import AutoTokenizer

from lexmae.config import NegativesConfig
from lexmae.data import tokenizer as tok
from lexmae.data.pairs import PairBatch, RerankData, read_pairs
from lexmae.data.tokens import TokenBatch
from lexmae.errors import InputError

LONG = 64  # longer than any pair


class Table:
    """A table of rows given as lists; their first segment ends with the first separator (3)."""

    def __init__(self, rows: list[list[int]]):
        self.rows = [np.asarray(row) for row in rows]
        self.lengths = np.array([len(row) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, row: int) -> np.ndarray:
        return self.rows[row]

    def first_length(self, row: int) -> int:
        return int(np.flatnonzero(self.rows[row] == 3)[0]) + 1

    def pad_batch(self, rows, pad: int) -> TokenBatch:
        lengths = self.lengths[rows]
        ids = np.full((len(rows), lengths.max()), pad)
        for place, row in enumerate(rows):
            ids[place, :self.lengths[row]] = self.rows[row]
        return TokenBatch(ids, lengths, np.array([self.first_length(row) for row in rows]))


def shards(docs: list[list[int]], segments: bool = True):
    """[CLS] 2, [SEP] 3, [PAD] 0."""
    return SimpleNamespace(docs=Table(docs), token_type_ids=segments,
                           special=SimpleNamespace(pad=0, structural=(0, 2, 3)))


BERT_DOCS = [[2, 20, 3, 21, 22, 23, 3], [2, 30, 31, 3, 32, 3], [2, 40, 3, 3]]
QUERIES = Table([[2, 10, 11, 3], [2, 12, 3]])


def test_the_layout_by_hand():
    batch = read_pairs(shards(BERT_DOCS), QUERIES, np.array([0, 1, 1]), np.array([0, 1, 2]), 99)
    assert batch.input_ids.tolist() == [[2, 10, 11, 3, 20, 3, 21, 22, 23, 3],
                                        [2, 12, 3, 30, 31, 3, 32, 3, 0, 0],
                                        [2, 12, 3, 40, 3, 3, 0, 0, 0, 0]]
    assert batch.token_type_ids.tolist() == [[0] * 4 + [1] * 6, [0] * 3 + [1] * 5 + [0] * 2,
                                             [0] * 3 + [1] * 3 + [0] * 4]
    assert batch.attention_mask.tolist() == [[1] * 10, [1] * 8 + [0] * 2, [1] * 6 + [0] * 4]
    assert all(tensor.dtype == torch.int64 for tensor in batch.arguments().values()) and batch.n_docs == 1


def test_the_document_is_cut_and_keeps_its_end():
    found = read_pairs(shards(BERT_DOCS), QUERIES, np.array([0, 1]), np.array([0, 0]), 8)
    assert found.input_ids.tolist() == [[2, 10, 11, 3, 20, 3, 21, 3], [2, 12, 3, 20, 3, 21, 22, 3]]
    assert found.attention_mask.all() and found.token_type_ids.sum(1).tolist() == [4, 5]
    least = read_pairs(shards(BERT_DOCS), QUERIES, np.array([0]), np.array([0]), 6)
    assert least.input_ids.tolist() == [[2, 10, 11, 3, 20, 3]]
    with pytest.raises(InputError, match="max_length 5: a query of 4 tokens leaves no room"):
        read_pairs(shards(BERT_DOCS), QUERIES, np.array([0]), np.array([0]), 5)


def test_a_tokenizer_without_segments_has_none():
    batch = read_pairs(shards(BERT_DOCS, segments=False), QUERIES, np.array([0]), np.array([0]), 99)
    assert not batch.token_type_ids.any() and batch.attention_mask.sum() == 10


def test_two_separators_where_the_tokenizer_has_two():
    docs = [[2, 20, 3, 3, 21, 22, 3], [2, 30, 3, 3, 3]]  # <s> title </s></s> passage </s>
    batch = read_pairs(shards(docs), QUERIES, np.array([0, 1]), np.array([0, 1]), 99)
    assert batch.input_ids.tolist() == [[2, 10, 11, 3, 3, 20, 3, 3, 21, 22, 3], [2, 12, 3, 3, 30, 3, 3, 3, 0, 0, 0]]
    cut = read_pairs(shards(docs), QUERIES, np.array([0]), np.array([0]), 9)
    assert cut.input_ids.tolist() == [[2, 10, 11, 3, 3, 20, 3, 3, 3]]
    empty = [[2, 30, 3, 3, 3], [2, 20, 3, 3, 21, 22, 3]]  # the first passage has no text
    again = read_pairs(shards(empty), QUERIES, np.array([0]), np.array([1]), 99)
    assert again.input_ids.tolist() == [[2, 10, 11, 3, 3, 20, 3, 3, 21, 22, 3]]


def test_documents_of_each_query_stand_together():
    batch = read_pairs(shards(BERT_DOCS), QUERIES, np.array([1, 0]), np.array([[2, 1], [0, 2]]), 99)
    flat = read_pairs(shards(BERT_DOCS), QUERIES, np.array([1, 1, 0, 0]), np.array([2, 1, 0, 2]), 99)
    assert batch.n_docs == 2 and torch.equal(batch.input_ids, flat.input_ids)
    assert batch.to(torch.device("meta")).input_ids.device.type == "meta"


def test_real_pairs_are_what_the_tokenizer_makes_of_the_texts(tiny_shards):
    tokenizer = AutoTokenizer.from_pretrained(tiny_shards.tokenizer_dir)
    table = tiny_shards.queries("train")
    asked, texts = {q.id: q.text for q in queries()}, passages()
    short = [i for i in range(len(texts)) if tiny_shards.docs.lengths[i] < 28]
    for row, name in enumerate(table.ids()):
        if table.lengths[row] == QUERY_LENGTH:
            continue  # may have been cut
        documents = [f"{texts[i].title or '-'} [SEP] {texts[i].text}" for i in short]
        expected = tokenizer([asked[name]] * len(short), documents, padding=True, return_tensors="pt")
        batch = read_pairs(tiny_shards, table, np.full(len(short), row), np.array(short), LONG)
        for key, tensor in batch.arguments().items():
            assert torch.equal(tensor, expected[key]), (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_tokenizer_separates_pairs_as_it_does_itself(family):
    tokenizer = FAMILIES[family]()
    encoder = tok.TextEncoder(tokenizer)
    titles, texts, query = ["Foxes", "A title"], ["", "The quick brown fox jumps"], "lazy dog"
    rows, asked = encoder.pairs(titles, texts, LONG), encoder.singles([query], LONG)
    docs = Table(np.split(rows.values, np.cumsum(rows.lengths)[:-1]))
    docs.first_length = lambda row: int(rows.first_lengths[row])
    docs.pad_batch = lambda which, pad: Table.pad_batch(docs, which, pad)
    made = SimpleNamespace(docs=docs, token_type_ids=encoder.token_type_ids, special=encoder.special)
    table = Table([list(asked.values)])
    table.first_length = lambda row: int(asked.lengths[row])
    batch = read_pairs(made, table, np.zeros(2, int), np.arange(2), LONG)
    for row, (title, text) in enumerate(zip(titles, texts, strict=True)):
        rest = tokenizer(title, text or "dog")["input_ids"][len(tokenizer(title)["input_ids"]):]
        rest = [token for token in rest if text or token in encoder.special.structural]
        expected = tokenizer(query, title)["input_ids"] + rest
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == expected


# --------------------------------------------------------------------------------------------------- training


@pytest.fixture
def data(tiny_shards, lists):
    """Makes RerankData of 3 negatives each."""
    def make(**options) -> RerankData:
        return RerankData(tiny_shards, "train", lists, NegativesConfig(per_query=3),
                          **({"seed": 2, "batch": 6, "micro_batch": 6, "max_length": LONG} | options))
    return make


def names(tiny_shards, batches: list[PairBatch]) -> list[tuple[str, ...]]:
    """(query id, positive's id, ids of the negatives) of every query, told by the tokens."""
    table = tiny_shards.queries("train")
    query_of = {tuple(table.tokens(i).tolist()): name for i, name in enumerate(table.ids())}
    doc_of = {tuple(tiny_shards.docs.tokens(i)[1:].tolist()): name for i, name in enumerate(tiny_shards.docs.ids())}
    found = []
    for batch in batches:
        for start in range(0, len(batch.input_ids), batch.n_docs):
            row: list[str] = []
            for i in range(start, start + batch.n_docs):
                real = batch.attention_mask[i].bool()
                second = batch.token_type_ids[i].bool()
                row.append(doc_of[tuple(batch.input_ids[i][second].tolist())])
                query = query_of[tuple(batch.input_ids[i][real & ~second].tolist())]
            found.append((query, *row))
    return found


@pytest.mark.parametrize("step", [0, 3])  # step 3 spans two epochs
def test_two_ranks_see_what_one_sees(tiny_shards, data, step):
    alone = names(tiny_shards, data()(step))
    together = [row for rank in range(2)
                for row in names(tiny_shards, data(micro_batch=1, rank=rank, world=2)(step))]
    assert len(alone) == 6 and sorted(together) == sorted(alone)


def test_every_judgement_once_per_epoch_with_negatives_drawn_afresh(tiny_shards, data):
    judged, made, seen = positives(tiny_shards), data(batch=16), {}
    for step in range(20):
        rows = names(tiny_shards, made(step))
        assert sorted(row[:2] for row in rows) == sorted((q, d) for q, found in judged.items() for d in found)
        for query, _, *negatives in rows:
            assert not judged[query] & set(negatives) and len(set(negatives)) == 3 or query == "t3"
            seen.setdefault(query, set()).add(tuple(negatives))
    assert all(len(drawn) > 10 for drawn in seen.values())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_budget_of_tokens_changes_no_query(tiny_shards, data, world):
    for step in (0, 3):
        alone = names(tiny_shards, data(batch=8, micro_batch=8)(step))
        ranks = [data(batch=8, micro_tokens=4 * LONG, rank=rank, world=world)(step) for rank in range(world)]
        assert sorted(row for rank in ranks for row in names(tiny_shards, rank)) == sorted(alone)
        assert len({len(rank) for rank in ranks}) == 1
        assert all(batch.input_ids.numel() <= 4 * LONG for rank in ranks for batch in rank)


def test_micro_batches_hold_whole_queries_of_similar_length(data):
    batches = data(batch=16, micro_batch=4)(0)
    assert [len(batch.input_ids) for batch in batches] == [16] * 4
    longest = [batch.attention_mask.sum(1).view(4, 4).max(1).values.tolist() for batch in batches]
    flat = [length for part in longest for length in part]
    assert flat == sorted(flat, reverse=True)
    assert all(batch.input_ids.shape[1] == part[0] for batch, part in zip(batches, longest, strict=True))


def test_a_step_can_be_asked_for_in_any_order(tiny_shards, data):
    walked = data()
    expected = [names(tiny_shards, walked(step)) for step in range(7)]
    jumping = data()
    for step in (6, 1, 4, 1):
        assert names(tiny_shards, jumping(step)) == expected[step]


def test_pairs_are_bounded(data):
    assert data(max_length=20)(0)[0].input_ids.shape[1] == 20
