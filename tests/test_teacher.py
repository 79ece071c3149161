"""A cross-encoder that scores the batches of fine-tuning itself: the scores it gives when it is asked once before."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from test_reranker import scorer

from lexmae import artifact
from lexmae.config import NegativesConfig
from lexmae.data import draws, negative_rows
from lexmae.data.batches import RankingData
from lexmae.data.negatives import write_negatives
from lexmae.data.pairs import read_pairs
from lexmae.errors import InputError
from lexmae.model.reranker import KIND, CrossEncoder
from lexmae.retrieval.score import _pair_length
from lexmae.retrieval.scored import ScoreConfig
from lexmae.train.hardware import Hardware
from lexmae.train.rerank import Teacher, check_teacher


@pytest.fixture(scope="module")
def teacher_dir(tiny_shards, tmp_path_factory):
    """A random cross-encoder for the shards, as training leaves one."""
    special = {name: getattr(tiny_shards.special, name) for name in ("pad", "unk", "cls", "sep", "mask")}
    folder = tmp_path_factory.mktemp("teacher") / "model"
    with artifact.create(folder, KIND) as draft:
        CrossEncoder(scorer(vocab=tiny_shards.vocab_size, special=special, max_position_embeddings=40)).save(
            draft.path, tiny_shards.tokenizer_dir, 36)
        draft.extra.update(tokenizer_hash=tiny_shards.manifest.extra["tokenizer_hash"], pair_length=36)
    return folder


def data(shards, teacher: Teacher, folder, **options) -> RankingData:
    write_negatives(folder / "n.jsonl", ((f"t{i}", [f"d{(i + 5 * j) % 41}" for j in range(8)]) for i in range(13)))
    config = NegativesConfig(str(folder / "n.jsonl"), per_query=2)
    negative_rows.build(shards, "train", config, folder / "lists")
    queries = shards.queries("train")
    return RankingData(shards, "train", draws.NegativeLists(folder / "lists"), config, seed=1, batch=6,
                       pairs=lambda q, d: read_pairs(shards, queries, q, d, teacher.max_length), **options)


def test_scores_are_those_of_each_pair_alone(tiny_shards, teacher_dir, tmp_path):
    teacher = Teacher(str(teacher_dir), tiny_shards)
    assert teacher.max_length == 36
    ranking = data(tiny_shards, teacher, tmp_path, micro_batch=7)
    batch = ranking(0)
    assert [len(pairs.input_ids) for pairs in batch.pairs] == [7, 7, 4], "no more pairs at a time than texts"
    found = teacher(batch)
    positions, rows = ranking._stream.rows(0, 6)
    docs, _ = ranking._documents(positions, rows)
    queries = ranking._pairs[rows][:, 0]
    for q in range(6):
        for n in range(3):
            pair = read_pairs(tiny_shards, tiny_shards.queries("train"), queries[q:q + 1], docs[q, n:n + 1], 36)
            with torch.no_grad():
                assert teacher.scorer(**pair.arguments()).item() == pytest.approx(found[q, n].item(), abs=1e-4)
    assert not any(p.requires_grad for p in teacher.scorer.parameters()) and not teacher.scorer.training


def test_ranks_ask_about_their_own_queries(tiny_shards, teacher_dir, tmp_path):
    teacher = Teacher(str(teacher_dir), tiny_shards)
    whole = teacher(data(tiny_shards, teacher, tmp_path, micro_batch=64)(3))
    parts = [teacher(data(tiny_shards, teacher, tmp_path, micro_batch=3, rank=rank, world=2)(3)) for rank in range(2)]
    np.testing.assert_allclose(torch.cat(parts), whole, atol=1e-4)


def test_pairs_stay_within_a_budget_of_tokens(tiny_shards, teacher_dir, tmp_path):
    """A query's documents may be more than a micro-batch holds: three pairs of up to 36 tokens here, of 60."""
    teacher = Teacher(str(teacher_dir), tiny_shards)
    by_tokens = data(tiny_shards, teacher, tmp_path, micro_batch=0, micro_tokens=60)(1)
    assert len(by_tokens.pairs) > 6 and all(pairs.input_ids.numel() <= 60 for pairs in by_tokens.pairs)
    whole = data(tiny_shards, teacher, tmp_path, micro_batch=0, micro_tokens=10_000)(1)
    assert len(whole.pairs) == 1
    np.testing.assert_allclose(teacher(by_tokens), teacher(whole), atol=1e-4)


def test_a_budget_that_holds_no_pair_is_refused(tiny_shards, teacher_dir):
    check_teacher(str(teacher_dir), tiny_shards, Hardware(1, 0, 0, {}, micro_tokens=36))
    with pytest.raises(InputError, match="micro_tokens 35: the teacher reads pairs of up to 36 tokens, so at least 36"):
        check_teacher(str(teacher_dir), tiny_shards, Hardware(1, 0, 0, {}, micro_tokens=35))


def test_a_teacher_of_others_reads_as_much_of_a_pair_as_beforehand(tiny_shards, teacher_dir, tmp_path):
    shutil.copytree(teacher_dir, tmp_path / "plain")
    (tmp_path / "plain" / artifact.MANIFEST).unlink()
    teacher = Teacher(str(tmp_path / "plain"), tiny_shards)
    assert teacher.max_length == _pair_length(teacher.scorer, None, tiny_shards, ScoreConfig("train"), tmp_path)


def test_another_tokenizer_or_kind_is_refused(tiny_shards, teacher_dir, model_dir, tmp_path):
    with artifact.create(tmp_path / "other", KIND) as draft:
        draft.extra["tokenizer_hash"] = "something else"
    with pytest.raises(InputError, match="trained with another tokenizer"):
        Teacher(str(tmp_path / "other"), tiny_shards)
    with pytest.raises(InputError, match="is of kind 'model', but 'reranker' is needed"):
        Teacher(str(model_dir), tiny_shards)


def test_a_teacher_of_others_with_too_few_tokens_is_refused(tiny_shards, tmp_path):
    CrossEncoder(scorer(vocab=50, max_position_embeddings=40)).save(tmp_path / "few")
    with pytest.raises(InputError, match="few: knows 50 tokens, the shards use a vocabulary of"):
        Teacher(str(tmp_path / "few"), tiny_shards)
