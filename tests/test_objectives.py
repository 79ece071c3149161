"""Objectives: the sum over micro-batches is the loss of the step; chunks and recomputation change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_models import STRUCTURAL, batch, masked, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

from lexmae.config import ActiveTermsConfig, BottleneckConfig, LossConfig
from lexmae.data.batches import PretrainBatch, RankingBatch, TextBatch
from lexmae.data.masking import IGNORE
from lexmae.model import layers
from lexmae.model.encoder import SparseEncoder
from lexmae.model.pretrainer import Pretrainer
from lexmae.train.objectives import PretrainObjective, RankingModel, RankingObjective

LENGTHS = (12, 9, 8, 7, 5, 4)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter, which are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def cut(values: torch.Tensor, rows: slice, length: int) -> torch.Tensor:
    return values[rows, :length]


# ----------------------------------------------------------------------------------------------- pre-training


@pytest.fixture(scope="module")
def whole() -> PretrainBatch:
    """Six masked texts as one micro-batch."""
    inputs = batch(3, LENGTHS)
    enc_ids, enc_labels = masked(inputs, 1, 0.3)
    dec_ids, dec_labels = masked(inputs, 2, 0.5)
    return PretrainBatch(TextBatch(**{**inputs, "input_ids": enc_ids}), enc_labels, dec_ids, dec_labels,
                         int((enc_labels != IGNORE).sum()), int((dec_labels != IGNORE).sum()))


def pieces(whole: PretrainBatch, size: int) -> list[PretrainBatch]:
    """The same texts in micro-batches, each padded to its own longest text."""
    found = []
    for start in range(0, len(LENGTHS), size):
        rows, length = slice(start, start + size), LENGTHS[start]
        text = TextBatch(**{name: cut(value, rows, length) for name, value in whole.text.arguments().items()})
        labels = [cut(t, rows, length) for t in (whole.enc_labels, whole.dec_input_ids, whole.dec_labels)]
        found.append(PretrainBatch(text, *labels, int((labels[0] != IGNORE).sum()), int((labels[2] != IGNORE).sum())))
    return found


def step(model, objective, micro_batches) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and gradients of one optimizer step on one rank."""
    totals = [float(n) for n in objective.counts(micro_batches)]
    sums: dict[str, float] = {}
    for micro in objective.micro_batches(micro_batches):
        loss, metrics = objective.loss(model, micro, totals, 0, 10)
        loss.backward()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums, gradients(model)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pretraining_losses_of_micro_batches_sum_to_that_of_the_batch(whole, size):
    model = Pretrainer(tiny(), 2)
    objective = PretrainObjective(BottleneckConfig(encoder_weight=0.7, decoder_weight=1.3))
    expected, expected_gradients = step(model, objective, [whole])
    found, found_gradients = step(model, objective, pieces(whole, size))
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["loss"] == pytest.approx(0.7 * expected["loss_enc"] + 1.3 * expected["loss_dec"], rel=1e-5)
    assert_same(found_gradients, expected_gradients)


def test_the_encoders_loss_is_the_mean_over_all_masked_positions(whole):
    lm = tiny()
    metrics, _ = step(Pretrainer(lm, 2), PretrainObjective(BottleneckConfig()), pieces(whole, 2))
    with torch.no_grad():
        text = whole.text
        logits = lm(input_ids=text.input_ids, attention_mask=text.attention_mask,
                    token_type_ids=text.token_type_ids).logits
        expected = F.cross_entropy(logits.flatten(0, 1), whole.enc_labels.flatten(), ignore_index=IGNORE)
        chosen = whole.enc_labels != IGNORE
        right = (logits.argmax(-1) == whole.enc_labels)[chosen].float().mean()
    assert metrics["loss_enc"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["accuracy_enc"] == pytest.approx(right.item(), abs=1e-6)


def test_two_ranks_with_unequal_counts_make_the_same_loss(whole):
    """Ranks divide by the counts of all ranks, which the engine sums."""
    model, objective = Pretrainer(tiny(), 2), PretrainObjective(BottleneckConfig())
    expected, expected_gradients = step(model, objective, [whole])
    ranks = [pieces(whole, 1)[:1], pieces(whole, 1)[1:]]
    totals = [sum(values) for values in zip(*(objective.counts(rank) for rank in ranks), strict=True)]
    assert totals == [whole.enc_count, whole.dec_count]
    found = 0.0
    for rank in ranks:
        for micro in rank:
            loss, _ = objective.loss(model, micro, [float(n) for n in totals], 0, 10)
            loss.backward()
            found += loss.item()
    assert found == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(gradients(model), expected_gradients)


def test_a_step_without_a_masked_position_has_no_loss(whole):
    none = torch.full_like(whole.enc_labels, IGNORE)
    empty = dataclasses.replace(whole, enc_labels=none, dec_labels=none, enc_count=0, dec_count=0)
    metrics, found = step(Pretrainer(tiny(), 2), PretrainObjective(BottleneckConfig()), [empty])
    assert metrics["loss"] == 0 and all(torch.isfinite(g).all() and not g.any() for g in found.values())


def test_tokens_are_counted_with_and_without_padding(whole):
    assert PretrainObjective(BottleneckConfig()).sizes(whole) == (sum(LENGTHS), len(LENGTHS) * 12)


# ------------------------------------------------------------------------------------------------ fine-tuning

N_DOCS = 3


def text(seed: int, lengths: tuple[int, ...]) -> TextBatch:
    return TextBatch(**batch(seed, lengths))


@pytest.fixture(scope="module")
def texts() -> tuple[TextBatch, TextBatch]:
    """Two queries and their six documents."""
    return text(11, (7, 5)), text(12, LENGTHS)


TEACHER = torch.tensor([[5.0, 1.0, -2.0], [0.5, 0.75, 0.25]])
EXCLUDE = torch.tensor([[0, 1], [4, 2]])
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])  # of the documents in the texts


def ranking_batch(texts, chunk: int) -> RankingBatch:
    queries, docs = texts
    parts = [TextBatch(**{name: value[i:i + chunk, :LENGTHS[i]] for name, value in docs.arguments().items()})
             for i in range(0, len(LENGTHS), chunk)]
    return RankingBatch([queries], torch.arange(2), parts, ORDER, N_DOCS, EXCLUDE, TEACHER)


def ranking_step(model, objective, data, at: int = 0, total: int = 10):
    loss, metrics = objective.loss(model, data, [], at, total)
    loss.backward()
    return {name: value.item() for name, value in metrics.items()}, gradients(model)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_and_recomputation_change_nothing(texts, chunk, recompute):
    encoder = SparseEncoder(tiny())
    objective = RankingObjective(LossConfig(lambda_docs=0.1), lambda rows: rows, 1)
    expected, expected_gradients = ranking_step(RankingModel(encoder), objective, ranking_batch(texts, 6))
    model = RankingModel(encoder, recompute=recompute)
    found, found_gradients = ranking_step(model, objective, ranking_batch(texts, chunk))
    assert found == pytest.approx(expected, rel=1e-4)
    assert_same(found_gradients, expected_gradients, atol=1e-5)


def test_documents_come_in_the_batchs_order(texts):
    encoder = SparseEncoder(tiny())
    with torch.no_grad():
        queries, docs = RankingModel(encoder, recompute=True)(ranking_batch(texts, 2))
        expected = encoder(**texts[1].arguments())[ORDER]
        torch.testing.assert_close(queries, encoder(**texts[0].arguments()))
    torch.testing.assert_close(docs, expected, rtol=1e-4, atol=1e-5)


def test_recomputation_repeats_dropout(texts):
    lm = tiny(hidden_dropout_prob=0.3).train()
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = RankingModel(SparseEncoder(lm), recompute)
        objective = RankingObjective(LossConfig(), lambda rows: rows, 1)
        results.append(ranking_step(model, objective, ranking_batch(texts, 2)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same(results[0][1], results[1][1])


def test_recomputation_names_the_batchs_device(texts, monkeypatch):
    """torch keeps the random state of the GPUs of positional tensors alone; without it dropout would not be repeated
    there, which a CPU does not show."""
    positional = []

    def recorded(function, *args, **kw):
        positional.append(args)
        return checkpoint(function, *args, **kw)

    monkeypatch.setattr(layers, "checkpoint", recorded)
    batch = ranking_batch(texts, 2)
    RankingModel(SparseEncoder(tiny()), recompute=True)(batch)
    assert len(positional) == len(batch.docs) + len(batch.queries)
    assert all(any(isinstance(value, torch.Tensor) for value in args) for args in positional)


def reference(lm, texts, config: LossConfig, growth: float = 1.0) -> dict[str, float]:
    """The loss of SPEC §2 and §3, written out from the model's own logits."""
    def vectors(part: TextBatch) -> torch.Tensor:
        logits = lm(input_ids=part.input_ids, attention_mask=part.attention_mask,
                    token_type_ids=part.token_type_ids).logits
        keep = part.attention_mask.bool() & ~torch.isin(part.input_ids, torch.tensor(STRUCTURAL))
        return torch.log1p(torch.where(keep[..., None], logits, -1e9).amax(1).clamp_min(0)).double()

    queries, docs = vectors(texts[0]), vectors(texts[1])[ORDER]
    scores = queries @ docs.T / config.temperature
    scores[EXCLUDE[0], EXCLUDE[1]] = -1e30
    own = scores[torch.arange(2), torch.arange(2) * N_DOCS]
    contrastive = (scores.logsumexp(1) - own).mean()
    flops_d, flops_q = ((v.mean(0) ** 2).sum() for v in (docs, queries))
    lambda_d, lambda_q = growth * config.lambda_docs, growth * config.query_weight
    return {"loss": (contrastive + lambda_d * flops_d + lambda_q * flops_q).item(),
            "loss_contrastive": contrastive.item(), "flops_docs": flops_d.item(), "flops_queries": flops_q.item(),
            "terms_docs": (docs > 0).sum(1).double().mean().item(), "lambda_docs": lambda_d,
            "lambda_queries": lambda_q, "terms_queries": (queries > 0).sum(1).double().mean().item(),
            "accuracy": (scores.argmax(1) == torch.arange(2) * N_DOCS).double().mean().item()}


@pytest.mark.parametrize("settings", [{"lambda_docs": 0.1}, {"lambda_docs": 0.2, "lambda_queries": 0.0},
                                      {"temperature": 3.0}])
def test_the_ranking_loss_by_the_specification(texts, settings):
    lm, config = tiny(), LossConfig(**settings)
    objective = RankingObjective(config, lambda rows: rows, 1)
    found, _ = ranking_step(RankingModel(SparseEncoder(lm)), objective, ranking_batch(texts, 2))
    with torch.no_grad():
        assert found == pytest.approx(reference(lm, texts, config), rel=1e-5)


def test_lambda_grows_with_the_step(texts):
    lm, config = tiny(), LossConfig(lambda_docs=0.4, lambda_ramp=0.5)
    objective = RankingObjective(config, lambda rows: rows, 1)
    model = RankingModel(SparseEncoder(lm))
    for at, growth in ((0, 1 / 36), (2, 9 / 36), (5, 1.0), (9, 1.0)):
        found, _ = ranking_step(model, objective, ranking_batch(texts, 6), at)
        with torch.no_grad():
            expected = reference(lm, texts, config, growth)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["lambda_docs"] == pytest.approx(0.4 * growth)


def test_gathering_comes_before_every_mean(texts):
    """Two ranks with a query each: with the other's rows gathered, the sum of their losses is that of one rank."""
    lm, config = tiny(), LossConfig(lambda_docs=0.3)
    model = RankingModel(SparseEncoder(lm))
    expected, expected_gradients = ranking_step(model, RankingObjective(config, lambda rows: rows, 1),
                                                ranking_batch(texts, 6))
    total = 0.0
    for rank in range(2):
        queries = TextBatch(**{k: v[rank:rank + 1] for k, v in texts[0].arguments().items()})
        own = ORDER[rank * N_DOCS:(rank + 1) * N_DOCS]
        docs = TextBatch(**{k: v[own] for k, v in texts[1].arguments().items()})
        share = RankingBatch([queries], torch.arange(1), [docs], torch.arange(N_DOCS), N_DOCS, EXCLUDE,
                             TEACHER[rank:rank + 1])

        def gather(rows: torch.Tensor, rank=rank) -> torch.Tensor:
            with torch.no_grad():
                both = model(ranking_batch(texts, 6))
            other = both[0] if len(rows) == 1 else both[1]
            parts = list(other.chunk(2))
            parts[rank] = rows
            return torch.cat(parts)

        loss, metrics = RankingObjective(config, gather, 2).loss(model, share, [], 0, 10)
        (loss * 2).backward()  # the slice of the gradient that the engine's gather passes on, times the ranks
        total += metrics["loss"].item()
    assert total == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(gradients(model), expected_gradients, atol=1e-5)


# --------------------------------------------------------------------------------- distillation, pruning, budgets


def distilling(texts, chunk: int = 6, gather=lambda rows: rows, world: int = 1, teacher=None, **options):
    model = RankingModel(SparseEncoder(tiny()))
    objective = RankingObjective(LossConfig(lambda_docs=0.0, **options), gather, world, teacher)
    return ranking_step(model, objective, ranking_batch(texts, chunk))


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_distillation_joins_the_contrastive_loss(texts, kind):
    plain, _ = distilling(texts)
    found, found_gradients = distilling(texts, contrastive_weight=0.2, distillation=kind, distillation_weight=0.5)
    assert found["loss_contrastive"] == pytest.approx(plain["loss_contrastive"])
    assert found["loss"] == pytest.approx(0.2 * found["loss_contrastive"] + 0.5 * found["loss_distillation"], rel=1e-5)
    with torch.no_grad():
        queries, docs = RankingModel(SparseEncoder(tiny()))(ranking_batch(texts, 6))
    student = torch.stack([docs[N_DOCS * i:N_DOCS * (i + 1)] @ queries[i] for i in range(2)])
    if kind == "kl":
        expected = F.kl_div(student.log_softmax(1), TEACHER.softmax(1), reduction="batchmean")
    else:
        expected = ((student[:, :1] - student[:, 1:]) - (TEACHER[:, :1] - TEACHER[:, 1:])).square().mean()
    assert found["loss_distillation"] == pytest.approx(expected.item(), rel=1e-4)
    _, in_chunks = distilling(texts, 2, contrastive_weight=0.2, distillation=kind, distillation_weight=0.5)
    assert_same(in_chunks, found_gradients, atol=1e-4)


def test_a_teacher_may_score_the_batch_itself(texts):
    stored, _ = distilling(texts, distillation="kl")
    found, _ = distilling(texts, distillation="kl", teacher=lambda batch: 2 * batch.teacher_scores)
    assert found["loss_distillation"] != pytest.approx(stored["loss_distillation"])
    again, _ = distilling(texts, distillation="kl", teacher=lambda batch: batch.teacher_scores + 7)
    assert again["loss_distillation"] == pytest.approx(stored["loss_distillation"], rel=1e-4)


def test_top_k_in_training_keeps_the_largest_and_their_gradients(texts):
    model = RankingModel(SparseEncoder(tiny()))
    objective = RankingObjective(LossConfig(top_k_docs=4, top_k_queries=2), lambda rows: rows, 1)
    found, gradient = ranking_step(model, objective, ranking_batch(texts, 2))
    assert found["terms_docs"] == 4 and found["terms_queries"] == 2
    _, whole = ranking_step(model, RankingObjective(LossConfig(), lambda rows: rows, 1), ranking_batch(texts, 2))
    assert any(not torch.equal(gradient[name], whole[name]) for name in whole)


def test_a_budget_moves_lambda_and_its_state_goes_on(texts):
    config = LossConfig(lambda_docs=0.1, active_terms=ActiveTermsConfig(docs=3, queries=500))
    model, data = RankingModel(SparseEncoder(tiny())), ranking_batch(texts, 6)
    objective = RankingObjective(config, lambda rows: rows, 1)
    seen = [ranking_step(model, objective, data, at)[0] for at in range(4)]
    assert seen[0]["lambda_docs"] == pytest.approx(0.1) and seen[0]["lambda_queries"] == pytest.approx(0.075)
    docs, queries = ([step[name] for step in seen] for name in ("lambda_docs", "lambda_queries"))
    assert docs == sorted(docs) and docs[3] > docs[1] > 0.1, "too many terms: λ grows"
    assert queries[3] < queries[1] < 0.075, "too few: it falls"
    other = RankingObjective(config, lambda rows: rows, 1)
    other.load_state_dict(objective.state_dict())
    assert ranking_step(model, other, data, 4)[0] == ranking_step(model, objective, data, 4)[0]


def test_a_step_that_is_not_finite_moves_no_lambda(texts):
    config = LossConfig(lambda_docs=0.1, active_terms=ActiveTermsConfig(docs=3))
    model, data = RankingModel(SparseEncoder(tiny())), ranking_batch(texts, 6)
    objective = RankingObjective(config, lambda rows: rows, 1)
    ranking_step(model, objective, data, 0)
    before = objective.state_dict()
    with torch.no_grad():
        next(model.parameters())[:] = torch.nan
    loss = ranking_step(model, objective, data, 1)[0]["loss"]
    assert loss != loss and objective.state_dict() == before


# -------------------------------------------------------------------------------------------- large batches


def big(queries: int, n_docs: int, chunk: int) -> RankingBatch:
    """Full-length texts of 12 tokens in chunks."""
    def chunks(count: int, seed: int) -> list[TextBatch]:
        whole = text(seed, (12,) * count)
        return [TextBatch(**{name: value[i:i + chunk] for name, value in whole.arguments().items()})
                for i in range(0, count, chunk)]

    docs = queries * n_docs
    return RankingBatch(chunks(queries, 1), torch.arange(queries), chunks(docs, 2), torch.arange(docs), n_docs,
                        torch.zeros((2, 0), dtype=torch.int64), torch.zeros(queries, n_docs))


def test_recomputed_chunks_have_the_gradients_of_the_plain_computation():
    lm = tiny().double()
    objective = RankingObjective(LossConfig(lambda_docs=0.01), lambda rows: rows, 1)
    _, plain = ranking_step(RankingModel(SparseEncoder(lm)), objective, big(32, 3, 96))
    _, chunked = ranking_step(RankingModel(SparseEncoder(lm), recompute=True), objective, big(32, 3, 4))
    assert plain.keys() == chunked.keys()
    largest = max(gradient.abs().max() for gradient in plain.values())
    for name, expected in plain.items():
        assert (chunked[name] - expected).abs().max() < 1e-5 * largest, name


def test_a_batch_of_512_queries_needs_the_activations_of_16():
    """Bytes that autograd keeps between forward and backward, beyond the vectors themselves."""
    kept = {}
    for name, queries, recompute in (("plain 16", 16, False), ("chunks of 512", 512, True)):
        model = RankingModel(SparseEncoder(tiny()), recompute)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen=seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        data = big(queries, 2, 16)
        inputs = {t.untyped_storage().data_ptr() for chunk in (*data.queries, *data.docs)
                  for t in chunk.arguments().values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vectors = model(data)
        kept[name] = sum(size for place, size in seen.items() if place not in own | inputs)
        assert len(vectors[1]) == 2 * queries
    assert kept["chunks of 512"] < kept["plain 16"] / 4


def test_texts_of_a_side_are_encoded_by_that_sides_encoder(texts):
    """As a probe asks for them."""
    documents, others = SparseEncoder(tiny()), SparseEncoder(tiny(seed=1))
    model = RankingModel(documents, query_encoder=others).eval()
    objective = RankingObjective(LossConfig(), lambda rows: rows, 1)
    with torch.no_grad():
        asked, searched = model(ranking_batch(texts, 6))
        torch.testing.assert_close(objective.encode(model, texts[0], "queries"), asked)
        torch.testing.assert_close(objective.encode(model, texts[1], "docs")[ORDER], searched)
        torch.testing.assert_close(asked, others(**texts[0].arguments()))
        torch.testing.assert_close(objective.encode(RankingModel(documents), texts[0], "queries"),
                                   documents(**texts[0].arguments()))
