"""Batches: what one rank sees, two ranks together see; every example once per epoch; nothing depends on the past."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from lexmae.config import MaskingConfig, NegativesConfig
from lexmae.data.batches import PretrainData, RankingData, Stream, TextBatch, prefetch, share, text_batch
from lexmae.data.masking import IGNORE
from lexmae.data.tokens import TokenBatch

# ---------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("size, batch", [(10, 3), (7, 7), (5, 12), (1, 4)])
def test_every_example_once_per_epoch(size, batch):
    stream = Stream(size, seed=1)
    steps = size * 3  # whole epochs: size·3·batch positions
    rows = np.concatenate([stream.rows(step, batch)[1] for step in range(steps)])
    positions = np.concatenate([stream.rows(step, batch)[0] for step in range(steps)])
    assert positions.tolist() == list(range(steps * batch))
    for epoch in rows.reshape(-1, size):
        assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [Stream(50, seed).rows(epoch, 50)[1].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_step_does_not_depend_on_those_before_it():
    walked = Stream(10, 5)
    expected = {step: walked.rows(step, 4) for step in range(12)}
    jumping = Stream(10, 5)
    for step in (11, 0, 7, 7, 3, 10):
        for found, wanted in zip(jumping.rows(step, 4), expected[step], strict=True):
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_of_the_ranks_make_up_the_batch(world):
    assert [i for rank in range(world) for i in range(12)[share(rank, world, 12)]] == list(range(12))


# ------------------------------------------------------------------------------------------------ text batches


def test_which_tokens_are_text(tiny_shards):
    """Specials and padding are not, the unknown token is; segments as the tokenizer itself gives them."""
    special = tiny_shards.special
    row = int(tiny_shards.queries("train").rows(["t1"])[0])
    batch = text_batch(tiny_shards.queries("train").pad_batch([row, 0], special.pad), np.asarray(special.structural),
                       True)
    ids = batch.input_ids[0][batch.attention_mask[0].bool()]
    assert special.unk in ids.tolist()
    assert batch.text_mask[0].sum() == len(ids) - 2 and batch.text_mask[0][1:len(ids) - 1].all()
    assert (batch.token_type_ids == 0).all()


def test_segments_and_masks_of_documents_agree_with_the_tokenizer(tiny_shards):
    from conftest import MAX_LENGTH, passages
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_shards.tokenizer_dir)
    texts = passages()
    rows = list(range(len(texts)))
    assert tiny_shards.docs.ids(rows) == [p.id for p in texts]
    expected = tokenizer([p.title or "-" for p in texts], [p.text for p in texts], truncation="longest_first",
                         max_length=MAX_LENGTH, padding=True, return_special_tokens_mask=True, return_tensors="pt")
    batch = text_batch(tiny_shards.docs.pad_batch(rows, tiny_shards.special.pad),
                       np.asarray(tiny_shards.special.structural), True)
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.token_type_ids, expected["token_type_ids"])
    assert torch.equal(batch.text_mask, expected["special_tokens_mask"] == 0)


def test_a_tokenizer_without_segments_has_none():
    tokens = TokenBatch(np.array([[2, 7, 3, 8, 3], [2, 9, 3, 0, 0]]), np.array([5, 3]), np.array([3, 3]))
    assert (text_batch(tokens, np.array([0, 2, 3]), False).token_type_ids == 0).all()
    with_segments = text_batch(tokens, np.array([0, 2, 3]), True)
    assert with_segments.token_type_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert with_segments.text_mask.tolist() == [[False, True, False, True, False], [False, True, False, False, False]]


def test_a_batch_moves_as_a_whole(ranking):
    moved = ranking(batch=2)(0).to(torch.device("meta"))
    tensors = [*moved.queries[0].arguments().values(), *moved.docs[0].arguments().values(), moved.exclude,
               moved.doc_order, moved.query_order, moved.teacher_scores]
    assert all(tensor.device.type == "meta" for tensor in tensors) and moved.n_docs == 4


# ----------------------------------------------------------------------------------------------- pre-training


def pretrain_rows(batches) -> list[tuple]:
    """(encoder ids, encoder labels, decoder ids, decoder labels) of every text, padding removed."""
    found = []
    for batch in batches:
        assert batch.enc_count == int((batch.enc_labels != IGNORE).sum())
        assert batch.dec_count == int((batch.dec_labels != IGNORE).sum())
        for row in range(len(batch.enc_labels)):
            n = int(batch.text.attention_mask[row].sum())
            found.append(tuple(tuple(t[row, :n].tolist()) for t in (
                batch.text.input_ids, batch.enc_labels, batch.dec_input_ids, batch.dec_labels)))
    return found


def pretraining(shards, **options) -> PretrainData:
    return PretrainData(shards, MaskingConfig(), **({"seed": 9, "batch": 12, "micro_batch": 12} | options))


@pytest.mark.parametrize("step", [0, 3])  # step 3 spans two epochs
def test_two_ranks_see_what_one_sees(tiny_shards, step):
    alone = pretrain_rows(pretraining(tiny_shards)(step))
    together = [row for rank in range(2)
                for row in pretrain_rows(pretraining(tiny_shards, micro_batch=3, rank=rank, world=2)(step))]
    assert len(alone) == 12 and sorted(together) == sorted(alone)


def test_documents_of_one_epoch(tiny_shards):
    data = pretraining(tiny_shards, batch=41, micro_batch=41)
    expected = sorted(tuple(tiny_shards.docs.tokens(row).tolist()) for row in range(41))
    for step in (0, 1):
        true = [tuple(label if label != IGNORE else token for token, label in zip(ids, labels, strict=True))
                for ids, labels, *_ in pretrain_rows(data(step))]
        assert sorted(true) == expected
    assert sorted(pretrain_rows(data(0))) != sorted(pretrain_rows(data(1)))  # masks are drawn afresh


def test_micro_batches_hold_texts_of_similar_length(tiny_shards):
    batches = pretraining(tiny_shards, batch=40, micro_batch=8)(0)
    lengths = [batch.text.attention_mask.sum(1).tolist() for batch in batches]
    assert [len(part) for part in lengths] == [8] * 5
    flat = [n for part in lengths for n in part]
    assert flat == sorted(flat, reverse=True)
    assert all(batch.text.input_ids.shape[1] == part[0] for batch, part in zip(batches, lengths, strict=True))


def test_a_step_of_pretraining_can_be_asked_for_in_any_order(tiny_shards):
    walked = pretraining(tiny_shards)
    expected = [pretrain_rows(walked(step)) for step in range(9)]
    jumping = pretraining(tiny_shards)
    for step in (8, 2, 5, 2):
        assert pretrain_rows(jumping(step)) == expected[step]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 3])
def test_a_budget_of_tokens_changes_no_example(tiny_shards, step, world, packed):
    """The same texts with the same masks, whatever is together; as many micro-batches on every rank."""
    alone = pretrain_rows(pretraining(tiny_shards)(step))
    options = {"micro_tokens": 70, "packed": packed, "world": world}
    ranks = [pretraining(tiny_shards, rank=rank, **options)(step) for rank in range(world)]
    assert sorted(row for batches in ranks for row in pretrain_rows(batches)) == sorted(alone)
    assert len({len(batches) for batches in ranks}) == 1
    for batch in (batch for batches in ranks for batch in batches):
        mask = batch.text.attention_mask
        assert (mask.sum() if packed else mask.numel()) <= 70
    again = [pretraining(tiny_shards, rank=rank, **options) for rank in range(world)]
    for batches, data in zip(ranks, again, strict=True):
        data(step + 1)  # a step does not depend on those before it
        assert pretrain_rows(data(step)) == pretrain_rows(batches)


def test_a_budget_of_tokens_leaves_less_padding(tiny_shards):
    """The global batch is sorted, not the share of each rank."""
    def padding(**options) -> float:
        masks = [batch.text.attention_mask for step in range(4) for rank in range(4)
                 for batch in pretraining(tiny_shards, batch=40, rank=rank, world=4, **options)(step)]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(micro_tokens=5 * 28) < padding(micro_batch=5)


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.fixture
def ranking(tiny_shards, lists):
    """Makes RankingData of 3 negatives each."""
    def make(**options) -> RankingData:
        return RankingData(tiny_shards, "train", lists, NegativesConfig(per_query=options.pop("per_query", 3)),
                           **({"seed": 2, "batch": 6, "micro_batch": 5} | options))
    return make


def texts(batch: TextBatch) -> list[tuple[int, ...]]:
    """Token ids of every row without padding."""
    return [tuple(row[mask.bool()].tolist()) for row, mask in
            zip(batch.input_ids, batch.attention_mask, strict=True)]


def names(shards, batch) -> tuple[list[str], np.ndarray]:
    """Query ids [Q] and document ids [Q, N] of a batch, put in order by `doc_order`."""
    query_of = {tuple(shards.queries("train").tokens(i).tolist()): name
                for i, name in enumerate(shards.queries("train").ids())}
    doc_of = {tuple(shards.docs.tokens(i).tolist()): name for i, name in enumerate(shards.docs.ids())}
    assert len(query_of) == 13 and len(doc_of) == 41  # texts tell which is which
    docs = [doc_of[text] for chunk in batch.docs for text in texts(chunk)]
    ordered = np.array(docs)[batch.doc_order.numpy()].reshape(-1, batch.n_docs)
    asked = np.array([query_of[text] for chunk in batch.queries for text in texts(chunk)])
    return asked[batch.query_order.numpy()].tolist(), ordered


def positives(shards) -> dict[str, set[str]]:
    return {qid: {doc for doc, relevance in judged.items() if relevance > 0}
            for qid, judged in shards.qrels("train").items()}


def test_the_positive_comes_first_and_is_never_a_negative(tiny_shards, ranking):
    judged, data = positives(tiny_shards), ranking()
    pairs = []
    for step in range(40):
        queries, docs = names(tiny_shards, data(step))
        for query, row in zip(queries, docs, strict=True):
            assert row[0] in judged[query] and not judged[query] & set(row[1:])
            assert len(set(row)) == 4 or query == "t3"  # which has random passages
            pairs.append((query, row[0]))
    expected = sorted((query, doc) for query, found in judged.items() for doc in found)
    assert data.size == len(expected) == 16
    for epoch in range(len(pairs) // 16):
        assert sorted(pairs[16 * epoch:16 * (epoch + 1)]) == expected


def test_negatives_come_from_the_lists_and_are_drawn_afresh(tiny_shards, ranking, lists):
    data, seen = ranking(batch=16), {}
    rows = {name: row for row, name in enumerate(tiny_shards.queries("train").ids())}
    for step in range(30):  # an epoch each
        for query, docs in zip(*names(tiny_shards, data(step)), strict=True):
            seen.setdefault(query, []).append(frozenset(docs[1:]))
    for query, drawn in seen.items():
        pool = set(tiny_shards.docs.ids(lists._sources[0].rows[lists._sources[0].part(rows[query])]))
        if query == "t3":
            assert not pool and len(set().union(*drawn)) > 25  # random passages
        else:
            assert set().union(*drawn) == pool
        assert len(set(drawn)) > 5


def test_chunks_are_bounded_and_the_longest_comes_first(ranking):
    batch = ranking(micro_batch=5)(0)
    assert [len(chunk.input_ids) for chunk in batch.docs] == [5, 5, 5, 5, 4]
    assert [len(chunk.input_ids) for chunk in batch.queries] == [5, 1]
    lengths = [n for chunk in batch.docs for n in chunk.attention_mask.sum(1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(batch.doc_order.tolist()) == list(range(24))


def test_ranks_of_fine_tuning_make_up_the_batch(tiny_shards, ranking):
    for step in (0, 2, 5):
        whole = ranking()(step)
        queries, docs = names(tiny_shards, whole)
        parts = [ranking(rank=rank, world=3, micro_batch=3)(step) for rank in range(3)]
        found = [names(tiny_shards, part) for part in parts]
        assert [query for part, _ in found for query in part] == queries
        assert np.array_equal(np.concatenate([part for _, part in found]), docs)
        assert all(torch.equal(part.exclude, whole.exclude) for part in parts)  # pairs of the global batch


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_budget_of_tokens_changes_no_query(tiny_shards, ranking, world):
    """The same queries with the same documents, though in another order; as many chunks on every rank."""
    for step in (0, 2, 5):
        queries, docs = names(tiny_shards, ranking()(step))
        parts = [ranking(rank=rank, world=world, micro_tokens=64)(step) for rank in range(world)]
        found = [names(tiny_shards, part) for part in parts]
        pairs = [(query, *row) for names, rows in found for query, row in zip(names, rows.tolist(), strict=True)]
        assert sorted(pairs) == sorted((query, *row) for query, row in zip(queries, docs.tolist(), strict=True))
        assert len({(len(part.docs), len(part.queries)) for part in parts}) == 1
        for part in parts:
            assert all(torch.equal(part.exclude, other.exclude) for other in parts)
            assert all(chunk.attention_mask.numel() <= 64 for chunk in [*part.docs, *part.queries])
            for query, column in part.exclude.T.tolist():  # pairs of the batch in its new order
                assert pairs[column // part.n_docs][1 + column % part.n_docs] in positives(tiny_shards)[pairs[query][0]]
        tokens = [sum(int(chunk.attention_mask.sum()) for chunk in part.docs) for part in parts]
        assert max(tokens) - min(tokens) <= 4 * 28


def test_excluded_pairs_by_brute_force(tiny_shards, ranking):
    judged, total = positives(tiny_shards), 0
    for step in range(12):
        batch = ranking(batch=16, per_query=5)(step)
        queries, docs = names(tiny_shards, batch)
        expected = {(i, column) for i, query in enumerate(queries) for column, doc in enumerate(docs.ravel())
                    if doc in judged[query] and column != i * batch.n_docs}
        assert set(map(tuple, batch.exclude.T.tolist())) == expected
        assert batch.exclude.shape == (2, len(expected))
        total += len(expected)
    assert total > 50
    assert ranking(exclude_judged=False)(0).exclude.shape == (2, 0)


def test_a_step_of_fine_tuning_can_be_asked_for_in_any_order(tiny_shards, ranking):
    walked = ranking()
    expected = [names(tiny_shards, walked(step)) for step in range(7)]
    jumping = ranking()
    for step in (6, 1, 4, 1):
        queries, docs = names(tiny_shards, jumping(step))
        assert queries == expected[step][0] and np.array_equal(docs, expected[step][1])


def test_without_negatives_there_are_the_positives(tiny_shards, ranking):
    queries, docs = names(tiny_shards, ranking(per_query=0)(0))
    assert docs.shape == (6, 1)


# --------------------------------------------------------------------------------------------------- prefetch


def test_prefetching_keeps_the_order_and_stays_ahead():
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    batches = prefetch(make, 3, 30, depth=4)
    assert next(batches) == 9
    wait_for(lambda: len(made) >= 6)  # one taken, four ready, one in hand
    time.sleep(0.05)
    assert len(made) == 6
    assert list(batches) == [step * step for step in range(4, 30)] and made == list(range(3, 30))
    assert list(prefetch(make, 5, 5)) == []


def test_batches_for_a_gpu_are_pinned_in_the_thread(tiny_shards, monkeypatch):
    where = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: where.append((gpu, threading.current_thread().name)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    data, device = pretraining(tiny_shards, micro_batch=4), torch.device("cuda", 3)
    kept = {}

    def make(step: int):
        kept[step] = data(step)
        return kept[step]

    for step, batches in enumerate(prefetch(make, 0, 3, device=device)):
        for batch, own in zip(batches, kept[step], strict=True):
            for name, tensor in batch.text.arguments().items():
                before = own.text.arguments()[name]
                assert tensor is not before and torch.equal(tensor, before)
            assert batch.dec_labels is not own.dec_labels and batch.enc_count == own.enc_count
    assert where == [(device, "prefetch")]


def test_an_error_arrives_at_its_place():
    def make(step: int) -> int:
        if step == 2:
            raise KeyError("batch 2")
        return step

    batches = prefetch(make, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(KeyError, match="batch 2"):
        next(batches)
    assert not running()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_ends_the_thread(taken):
    batches = prefetch(lambda step: step, 0, 1000, depth=2)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert not running()


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()
