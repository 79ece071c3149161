"""Training of the cross-encoder: its loss over micro-batches, what it starts from, refusals, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import MAX_LENGTH, QUERY_LENGTH, write_model
from launching import TINY, log, run
from test_reranker import scorer
from test_session import SIZE, recipe
from tiny_models import batch

from lexmae import artifact
from lexmae.config import ModelConfig, NegativesConfig, PretrainRecipe, RerankRecipe
from lexmae.data.pairs import PairBatch
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.reranker import CrossEncoder
from lexmae.train import losses, rerank, session

assert recipe  # a fixture

N_DOCS = 3
LENGTHS = (12, 11, 9, 12, 8, 6, 7, 5, 5)  # three queries of three documents


def test_the_loss_by_hand():
    """-log softmax of the first; 2.0 against 1.0 and 1.0, and a tie."""
    summed, won = losses.listwise(torch.tensor([[2.0, 1.0, 1.0], [0.0, -1.0, 0.0]]))
    first = math.log(1 + 2 * math.exp(-1))
    second = math.log(2 + math.exp(-1))
    assert summed.item() == pytest.approx(first + second) and won.item() == 1, "a tie is not won"


def test_the_loss_is_the_mean_cross_entropy_in_float32():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 20
    summed, won = losses.listwise(scores.half())
    expected = F.cross_entropy(scores.half().float(), torch.zeros(5, dtype=torch.long))
    assert summed.dtype == torch.float32 and summed.item() / 5 == pytest.approx(expected.item(), rel=1e-6)
    assert won.item() == (scores.argmax(1) == 0).sum().item()


def whole() -> PairBatch:
    inputs = batch(4, LENGTHS)
    return PairBatch(*(inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")), n_docs=N_DOCS)


def pieces(size: int) -> list[PairBatch]:
    """The same pairs in micro-batches of so many queries, each padded to its own longest pair."""
    found = []
    for start in range(0, len(LENGTHS), size * N_DOCS):
        rows = slice(start, start + size * N_DOCS)
        length = max(LENGTHS[rows])
        found.append(PairBatch(*(tensor[rows, :length] for tensor in whole().arguments().values()), n_docs=N_DOCS))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_sum_to_the_loss_of_the_batch(size):
    """Which is torch's cross entropy of the model's scores."""
    model, objective = CrossEncoder(scorer()), rerank.RerankObjective()

    def step(batches):
        model.zero_grad(set_to_none=True)
        totals, sums = [float(n) for n in objective.counts(batches)], {}
        for micro in objective.micro_batches(batches):
            loss, metrics = objective.loss(model, micro, totals, 0, 1)
            loss.backward()
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found, gradients = step(pieces(size))
    scores = model(**whole().arguments()).view(-1, N_DOCS)
    expected = F.cross_entropy(scores, torch.zeros(3, dtype=torch.long))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((scores.argmax(1) == 0).float().mean().item())
    model.zero_grad(set_to_none=True)
    expected.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert objective.sizes(whole()) == (sum(LENGTHS), 9 * 12) and objective.counts([whole()]) == [3]


# --------------------------------------------------------------------------------------------------- the recipe


def reranking(make, **changes) -> RerankRecipe:
    return make(RerankRecipe, **({"max_length": 32} | changes))


def test_how_a_run_is_spread(recipe):
    assert session.check(reranking(recipe)).accumulation == 4  # batch 8 in micro-batches of 2 queries
    assert session.check(reranking(recipe), world=4).accumulation == 1


@pytest.mark.parametrize("changes, reason", [
    ({"max_length": QUERY_LENGTH + 2}, f"queries have up to {QUERY_LENGTH} tokens, so at least {QUERY_LENGTH + 3}"),
    ({"split": "test"}, "no queries of the split 'test'"),
    ({"negatives": NegativesConfig(path="nowhere.jsonl")}, "no such file of negatives"),
])
def test_what_cannot_work_is_refused(recipe, changes, reason):
    with pytest.raises(InputError, match=reason):
        session.check(reranking(recipe, **changes))


def test_models_of_other_tokenizers_and_kinds_are_refused(recipe, shards_dir, model_dir, tmp_path):
    session.check(reranking(recipe, model=ModelConfig(init=str(model_dir))))
    other = write_model(tmp_path / "other", shards_dir, tokenizer_hash="0" * 64)
    with pytest.raises(InputError, match="other: was trained with another tokenizer"):
        session.check(reranking(recipe, model=ModelConfig(init=str(other))))
    with pytest.raises(InputError, match="is of kind 'shards', but 'model' is needed here"):
        session.check(reranking(recipe, model=ModelConfig(init=str(shards_dir))))
    with artifact.create(tmp_path / "finished", "reranker") as draft:
        draft.extra["tokenizer_hash"] = artifact.read(model_dir).extra["tokenizer_hash"]
    session.check(reranking(recipe, model=ModelConfig(init=str(tmp_path / "finished"))))
    with pytest.raises(InputError, match="is of kind 'reranker', but 'model' is needed here"):
        session.check(recipe(PretrainRecipe, model=ModelConfig(init=str(tmp_path / "finished"))))


def test_what_it_starts_from(recipe, tiny_shards, model_dir, tmp_path, capsys):
    made = rerank.build_scorer(reranking(recipe), tiny_shards)
    assert backbone.word_embeddings(made).shape == (tiny_shards.vocab_size, SIZE["hidden_size"])
    assert made.config.num_labels == 1 and made.config.pad_token_id == tiny_shards.special.pad
    taken = rerank.build_scorer(reranking(recipe, model=ModelConfig(init=str(model_dir))), tiny_shards)
    assert f"{model_dir}: new are bert.pooler.dense.bias" in capsys.readouterr().err
    CrossEncoder(taken).save(tmp_path / "finished")
    rerank.build_scorer(reranking(recipe, model=ModelConfig(init=str(tmp_path / "finished"))), tiny_shards)
    assert "finished: a finished cross-encoder is trained on" in capsys.readouterr().err


def test_a_model_that_cannot_read_the_pairs_is_refused(recipe, tiny_shards, tmp_path):
    with pytest.raises(InputError, match="reads 32 tokens, max_length is 33"):
        rerank.build_scorer(reranking(recipe, max_length=33), tiny_shards)
    few = backbone.create_scorer("bert", 50, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, SIZE)
    few.save_pretrained(tmp_path / "few")
    with pytest.raises(InputError, match="knows 50 tokens, the shards use a vocabulary of"):
        rerank.build_scorer(reranking(recipe, model=ModelConfig(init=str(tmp_path / "few"))), tiny_shards)
    assert MAX_LENGTH < 32


# ----------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_learns(shards_dir, tmp_path):
    """Sixteen judgements are learned by heart: from chance (one in four) to nearly all."""
    values = {"data": str(shards_dir), "output": str(tmp_path / "run"), "deepspeed": "ds_configs/fp32_zero1.json",
              "max_length": 32, "model": TINY, "negatives": {"per_query": 3},
              "optimization": {"lr": 3e-3, "batch": 16, "micro_batch": 4, "steps": 250},
              "logging": {"every": 5, "checkpoint_every": 0}}
    path = tmp_path / "rerank.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    run(["launch/rerank.py", str(path)])
    lines = log(tmp_path / "run")
    assert lines[0]["accuracy"] < 0.5 and lines[-1]["accuracy"] > 0.9 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    manifest = artifact.read(tmp_path / "run" / "model", "reranker")
    assert manifest.extra["pair_length"] == 32 and manifest.counts["steps"] == 250
    artifact.verify(manifest.path)
    assert CrossEncoder.load(manifest.path).max_length == 32
    refused = ["launch/finetune.py", str(write_finetune(tmp_path, shards_dir, manifest.path))]
    assert "is of kind 'reranker', but 'model' is needed here" in run(refused, code=2)


def write_finetune(folder: Path, shards: Path, init: Path) -> Path:
    path = folder / "finetune.yaml"
    path.write_text(f"{{data: {shards}, output: {folder / 'other'}, deepspeed: ds_configs/fp32_zero1.json, "
                    f"model: {{init: {init}}}}}", encoding="utf-8")
    return path
