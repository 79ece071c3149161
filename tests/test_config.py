"""The defaults are the paper's (SPEC §1, §3), and a value out of range is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from lexmae import config as c
from lexmae.cycle import config as p
from lexmae.errors import InputError


def test_pretraining_defaults_are_the_papers():
    recipe = c.PretrainRecipe(data="d", output="o")
    assert recipe.model.init == "bert-base-uncased"
    assert (recipe.masking.encoder, recipe.masking.decoder) == (0.30, 0.50)
    assert (recipe.masking.decoder_strategy, recipe.masking.whole_word) == ("inclusive", False)
    assert (recipe.bottleneck.source, recipe.bottleneck.decoder_layers) == ("logits", 2)
    assert recipe.bottleneck.encoder_weight == recipe.bottleneck.decoder_weight == 1
    found = recipe.optimization
    assert (found.batch, found.lr, found.weight_decay, found.warmup) == (2048, 3e-4, 0.01, 0.05)
    assert (found.epochs, found.steps, found.clip, found.seed) == (20, None, 0, 42)
    assert "fp16" in recipe.deepspeed


def test_fine_tuning_defaults_are_those_of_stage_1():
    recipe = c.FinetuneRecipe(data="d", output="o")
    found = recipe.optimization
    assert (found.lr, found.batch, found.epochs, found.clip, found.seed) == (2e-5, 24, 3, 1, 42)
    assert (found.weight_decay, found.warmup) == (0.01, 0.05)
    assert (recipe.negatives.per_query, recipe.negatives.depth) == (15, 1000)
    assert (recipe.loss.lambda_docs, recipe.loss.temperature, recipe.loss.lambda_ramp) == (0.002, 1, 0)
    assert recipe.loss.query_weight == pytest.approx(0.0015)


def test_cycle_defaults():
    assert dataclasses.astuple(p.PrepareConfig(tokenizer="t"))[2:] == (144, 32, False, None)
    evaluation = p.EvaluationConfig()
    assert (evaluation.hits, evaluation.top_k_docs, evaluation.top_k_queries) == (1000, None, None)
    assert p.StageConfig("s", "r").mine_depth == 512


def test_the_weight_of_queries_may_be_given_and_may_be_zero():
    assert c.LossConfig(lambda_docs=0.008).query_weight == pytest.approx(0.006)
    assert c.LossConfig(lambda_docs=0.008, lambda_queries=0.0).query_weight == 0
    assert c.LossConfig(lambda_docs=0.008, lambda_queries=0.01).query_weight == 0.01


@pytest.mark.parametrize("kind, values, named", [
    (c.ModelConfig, {"architecture": "gpt"}, "architecture"),
    (c.ModelConfig, {"init": "bert-base-uncased", "size": {"hidden_size": 8}}, "size"),
    (c.MaskingConfig, {"encoder": 0.0}, "encoder"),
    (c.MaskingConfig, {"encoder": 1.0}, "encoder"),
    (c.MaskingConfig, {"decoder": 1.0}, "decoder"),
    (c.MaskingConfig, {"decoder": 0.2}, "decoder"),
    (c.MaskingConfig, {"decoder": 0.8, "decoder_strategy": "exclusive"}, "decoder"),
    (c.MaskingConfig, {"decoder_strategy": "both"}, "decoder_strategy"),
    (c.BottleneckConfig, {"source": "mean"}, "source"),
    (c.BottleneckConfig, {"decoder_layers": 0}, "decoder_layers"),
    (c.BottleneckConfig, {"bow_weight": -0.1}, "bow_weight"),
    (c.BottleneckConfig, {"encoder_weight": -1.0}, "encoder_weight"),
    (c.BottleneckConfig, {"active_terms": 0}, "active_terms"),
    (c.BottleneckConfig, {"active_terms": 9, "source": "saturated"}, "learns where relu cuts"),
    (c.ModelConfig, {"start_terms": 0}, "start_terms"),
    (c.FinetuneRecipe, {"data": "d", "output": "o", "passages": "last"}, "passages"),
    (c.ProbeConfig, {"every": -1}, "every"),
    (c.RerankRecipe, {"data": "d", "output": "o", "passages": "last"}, "passages"),
    (c.RerankRecipe, {"data": "d", "output": "o", "max_length": 0}, "max_length"),
    (c.RerankRecipe, {"data": "d", "output": "o", "negatives": c.NegativesConfig(per_query=0)}, "per_query"),
    (c.RerankRecipe, {"data": "d", "output": "o", "model": c.ModelConfig(frequency_penalty=1.0)}, "lexicon encoders"),
    (c.RerankRecipe, {"data": "d", "output": "o", "model": c.ModelConfig(start_terms=9)}, "lexicon encoders"),
    (p.StageConfig, {"name": "s", "recipe": "r", "teacher": "someone"}, "teacher"),
    (p.RerankerConfig, {"score_depth": -1}, "score_depth"),
    (c.ProbeConfig, {"queries": 0}, "queries"),
    (c.ProbeConfig, {"documents": 0}, "documents"),
    (c.LossConfig, {"lambda_docs": -0.1}, "lambda_docs"),
    (c.LossConfig, {"lambda_queries": -0.1}, "lambda_queries"),
    (c.LossConfig, {"lambda_ramp": 1.5}, "lambda_ramp"),
    (c.LossConfig, {"temperature": 0.0}, "temperature"),
    (c.NegativesConfig, {"per_query": -1}, "per_query"),
    (c.NegativesConfig, {"depth": 0}, "depth"),
    (c.OptimizationConfig, {"lr": 0.0}, "lr"),
    (c.OptimizationConfig, {"batch": 0}, "batch"),
    (c.OptimizationConfig, {"micro_batch": 0}, "micro_batch"),
    (c.ModelConfig, {"packing": "yes"}, "packing"),
    (c.OptimizationConfig, {"micro_tokens": 0}, "micro_tokens"),
    (c.OptimizationConfig, {"micro_tokens": 512, "micro_batch": 4}, "micro_tokens"),
    (c.OptimizationConfig, {"epochs": 0.0}, "epochs"),
    (c.OptimizationConfig, {"steps": 0}, "steps"),
    (c.OptimizationConfig, {"warmup": 1.1}, "warmup"),
    (c.OptimizationConfig, {"clip": -1.0}, "clip"),
    (c.OptimizationConfig, {"weight_decay": -0.1}, "weight_decay"),
    (c.OptimizationConfig, {"seed": -1}, "seed"),
    (c.OptimizationConfig, {"seed": 2 ** 64}, "seed"),
    (c.OptimizationConfig, {"beta1": 1.0}, "beta1"),
    (c.OptimizationConfig, {"beta2": -0.1}, "beta2"),
    (c.OptimizationConfig, {"epsilon": 0.0}, "epsilon"),
    (c.LossConfig, {"top_k_docs": 64, "active_terms": c.ActiveTermsConfig(docs=128)}, "keep one of the two"),
    (c.FinetuneRecipe, {"data": "d", "output": "o", "loss": c.LossConfig(distillation="kl"),
                        "negatives": c.NegativesConfig(per_query=0)}, "per_query"),
    (c.RerankRecipe, {"data": "d", "output": "o", "model": c.ModelConfig(queries="static")}, "static"),
    (c.LoggingConfig, {"every": 0}, "every"),
    (c.LoggingConfig, {"keep": 0}, "keep"),
    (c.LoggingConfig, {"checkpoint_every": -1}, "checkpoint_every"),
    (p.EvaluationConfig, {"engine": "grep"}, "engine"),
    (p.EvaluationConfig, {"hits": 0}, "hits"),
    (p.EvaluationConfig, {"top_k_docs": 0}, "top_k_docs"),
    (p.EvaluationConfig, {"batch_tokens": 0}, "batch_tokens"),
    (p.StageConfig, {"name": "s", "recipe": "r", "mine_depth": 0}, "mine_depth"),
    (p.StageConfig, {"name": "../s", "recipe": "r"}, "name"),
    (p.StageConfig, {"name": "", "recipe": "r"}, "name"),
    (p.EvaluationConfig, {"more_splits": ("dev",)}, "more_splits"),
    (p.EvaluationConfig, {"zero_shot": (p.CollectionConfig("a", "x"), p.CollectionConfig("a", "y"))}, "zero_shot"),
    (p.EvaluationConfig, {"zero_shot": (p.CollectionConfig("dev", "x"),)}, "zero_shot"),
    (p.EvaluationConfig, {"zero_shot": (p.CollectionConfig("model", "x"),)}, "the folder 'model' of a stage"),
    (p.CollectionConfig, {"name": "../x", "input": "x"}, "name"),
    (p.PipelineRecipe, {"input": "x", "work": "w", "prepare": p.PrepareConfig()}, "prepare"),
    (p.PrepareConfig, {"tokenizer": "t", "train_tokenizer": 300}, "tokenizer"),
    (p.PrepareConfig, {"tokenizer": "t", "stride": 50}, "stride"),
    (p.PrepareConfig, {"tokenizer": "t", "split_documents": True, "stride": 145}, "stride"),
])
def test_a_value_out_of_range_is_refused(kind, values, named):
    with pytest.raises(InputError, match=named):
        kind(**values)


@pytest.mark.parametrize("values", [
    {"encoder": 0.3, "decoder": 0.3},
    {"encoder": 0.3, "decoder": 0.7, "decoder_strategy": "exclusive"},
    {"encoder": 0.8, "decoder": 0.2, "decoder_strategy": "random"},
])
def test_the_ends_of_the_ranges_of_masks_are_open_to_use(values):
    masking = c.MaskingConfig(**values)
    assert {name: getattr(masking, name) for name in values} == values


def test_recipes_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.PretrainRecipe(data="d", output="o").data = "e"


def pipeline(*stages: p.StageConfig, **options) -> p.PipelineRecipe:
    """A pipeline recipe of these stages."""
    return p.PipelineRecipe("builtin", "work", p.PrepareConfig(train_tokenizer=300), stages=stages, **options)


def test_a_stage_starts_from_an_earlier_step():
    pipeline(p.StageConfig("one", "r"), p.StageConfig("two", "r", init="one"))
    pipeline(p.StageConfig("one", "r"), pretrain=None)
    with pytest.raises(InputError, match="two starts from 'three'"):
        pipeline(p.StageConfig("two", "r", init="three"), p.StageConfig("three", "r"))
    with pytest.raises(InputError, match="starts from 'one'"):
        pipeline(p.StageConfig("one", "r", init="one"))
    with pytest.raises(InputError, match="starts from 'other'"):
        pipeline(p.StageConfig("one", "r", init="other"), pretrain=None)


def test_the_engines_are_those_there_are():
    from lexmae.retrieval import engines

    assert set(p.ENGINES) == set(engines.SPARSE)


@pytest.mark.parametrize("name", ["one", "pretrain", "bm25", "shards", "corpus"])
def test_names_of_steps_are_taken_once(name):
    with pytest.raises(InputError, match=f"the name '{name}' is taken"):
        pipeline(p.StageConfig("one", "r"), p.StageConfig(name, "r"))
