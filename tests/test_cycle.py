"""The cycle: the plan's order and refusals, what the runner skips, runs again and refuses, and the table."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lexmae import artifact, locks
from lexmae.cycle import report, runner
from lexmae.cycle.config import (
    BiEncoderConfig,
    CollectionConfig,
    EvaluationConfig,
    PipelineRecipe,
    PrepareConfig,
    RerankerConfig,
    StageConfig,
)
from lexmae.cycle.plan import Plan
from lexmae.cycle.runner import ROOT, Runner
from lexmae.cycle.steps import Step
from lexmae.errors import InputError

# ---------------------------------------------------------------------------------------------------- the plan

FP32 = "ds_configs/fp32_zero1.json"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of recipes to be in: pretrain.yaml, stage.yaml and an input folder `text`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    write(tmp_path / "pretrain.yaml", optimization={"batch": 8})
    write(tmp_path / "stage.yaml", optimization={"batch": 8})
    return tmp_path


def write(path: Path, **content) -> None:
    path.write_text(yaml.safe_dump({"data": "-", "output": "-", "deepspeed": FP32, **content}))


def pipeline(*stages: StageConfig, **options) -> PipelineRecipe:
    values = {"input": "text", "work": "work", "prepare": PrepareConfig(train_tokenizer=300), "stages": stages}
    return PipelineRecipe(**(values | options))


ONE = StageConfig("one", "stage.yaml")
TWO = StageConfig("two", "stage.yaml", init="one", negatives="one", mine_depth=20)


def plan(folder: Path, config: PipelineRecipe, **options) -> dict[str, Step]:
    """Steps by name; no two share a name or an output, and each finds its inputs made before it."""
    steps = Plan(config, folder, **options).steps
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == len({step.output for step in steps})
    made: set[Path] = set()
    for step in steps:
        for source in step.inputs:
            assert source.exists() or source in made, f"{step.name} needs {source} before it is made"
        made.add(step.output)
    return dict(zip(names, steps, strict=True))


def option(step: Step, name: str) -> str:
    return step.command[step.command.index(name) + 1]


def settings(step: Step) -> dict[str, str]:
    """What follows --set."""
    start = step.command.index("--set") + 1
    return dict(item.split("=", 1) for item in step.command[start:step.command.index("--resume")])


def test_steps_come_in_order(folder):
    assert list(plan(folder, pipeline(ONE, TWO))) == [
        "prepare", "pretrain", "bm25", "bm25-evaluate", "bm25-negatives",
        "one", "one-docs", "one-queries", "one-index", "one-search", "one-evaluate",
        "one-train-encode", "one-mine", "one-negatives",
        "two", "two-docs", "two-queries", "two-index", "two-search", "two-evaluate"]
    assert list(plan(folder, pipeline())) == ["prepare", "pretrain", "bm25", "bm25-evaluate"]
    assert "pretrain" not in plan(folder, pipeline(ONE, pretrain=None))


def test_folders_with_signs_of_yaml_are_given_as_they_are(folder):
    work = "my #1: work"
    given = settings(plan(folder, pipeline(ONE, TWO, work=work))["two"])
    assert {yaml.safe_load(given[key]) for key in ("data", "output", "negatives.path", "model.init")} == {
        f"{work}/shards", f"{work}/two", f"{work}/one/negatives.jsonl", f"{work}/one/model"}
    assert given["split"] == "train" and given["output"] == f'"{work}/two"'


def test_the_built_in_corpus_is_a_step(folder):
    steps = plan(folder, pipeline(input="builtin", builtin_passages=70))
    assert list(steps)[:2] == ["corpus", "prepare"]
    assert steps["corpus"].command == ["-m", "lexmae.data.builtin", "--output", "work/corpus", "--max-passages", "70"]
    assert option(steps["prepare"], "--input") == "work/corpus"


def test_commands_say_what_the_recipe_says(folder):
    evaluation = EvaluationConfig(split="test", train_split="learn", engine="anserini", hits=77, top_k_docs=9,
                                  batch_tokens=500)
    steps = plan(folder, pipeline(ONE, TWO, evaluation=evaluation,
                                  prepare=PrepareConfig(tokenizer="tok", max_length=50, query_length=12)))
    prepare = steps["prepare"]
    assert [option(prepare, n) for n in ("--input", "--output", "--tokenizer", "--max-length", "--query-length")] == [
        "text", "work/shards", "tok", "50", "12"]
    assert settings(steps["one"]) == {"data": "work/shards", "output": "work/one", "split": "learn",
                                      "negatives.path": "work/bm25/negatives.jsonl",
                                      "model.init": "work/pretrain/model"}
    assert settings(steps["two"])["model.init"] == "work/one/model"
    assert settings(steps["two"])["negatives.path"] == "work/one/negatives.jsonl"
    assert option(steps["one-docs"], "--top-k") == "9" and "--top-k" not in steps["one-queries"].command
    assert option(steps["one-queries"], "--split") == "test" and option(steps["one-docs"], "--batch-tokens") == "500"
    assert option(steps["one-index"], "--engine") == "anserini" and option(steps["one-search"], "--hits") == "77"
    assert option(steps["one-evaluate"], "--qrels") == "work/shards/qrels/test.tsv"
    assert option(steps["one-evaluate"], "--compare") == "work/bm25/run.trec"
    assert option(steps["one-negatives"], "--qrels") == "work/shards/qrels/learn.tsv"
    assert int(option(steps["one-mine"], "--hits")) > 20  # judged positives are taken out of it
    assert option(steps["bm25-negatives"], "--depth") == "512"
    assert {name for name, step in steps.items() if step.trains} == {
        "pretrain", "one", "two", "one-docs", "one-queries", "two-docs", "two-queries", "one-learn-encode"}


def test_split_documents_are_searched_by_their_passages(folder):
    steps = plan(folder, pipeline(ONE, TWO, prepare=PrepareConfig(tokenizer="tok", split_documents=True, stride=60)))
    assert "--split-documents" in steps["prepare"].command and option(steps["prepare"], "--stride") == "60"
    assert "--max-passage" in steps["one-search"].command and "--max-passage" not in steps["one-mine"].command
    assert int(option(steps["one-mine"], "--hits")) >= 20 + 500
    assert "--passages" in steps["one-negatives"].command and "--passages" not in steps["bm25-negatives"].command
    plain = plan(folder, pipeline(ONE, TWO))
    flags = {"--split-documents", "--stride", "--max-passage", "--passages"}
    assert not flags & {part for step in plain.values() for part in step.command}


def test_without_pretraining_a_stage_has_its_recipes_own_weights(folder):
    assert "model.init" not in settings(plan(folder, pipeline(ONE, TWO, pretrain=None))["one"])


def test_a_file_of_negatives(folder):
    (folder / "n.jsonl").write_text("x")
    steps = plan(folder, pipeline(StageConfig("one", "stage.yaml", negatives="n.jsonl")))
    assert settings(steps["one"])["negatives.path"] == "n.jsonl" and "bm25-negatives" not in steps
    assert Path("n.jsonl") in steps["one"].inputs


def test_several_sources_of_negatives(folder):
    (folder / "n.jsonl").write_text("x")
    write(folder / "several.yaml", negatives={"per_query": 4, "sources": [
        {"path": "-", "share": 3.0, "depth": 30}, {"path": "-"}, {"path": "-", "skip": 5}]})
    three = StageConfig("three", "several.yaml", negatives=("one", "bm25", "n.jsonl"), mine_depth=700)
    steps = plan(folder, pipeline(ONE, three))
    given = ["work/one/negatives.jsonl", "work/bm25/negatives.jsonl", "n.jsonl"]
    assert [settings(steps["three"])[f"negatives.sources.{i}.path"] for i in range(3)] == given
    assert "negatives.path" not in settings(steps["three"])
    assert set(map(Path, given)) <= set(steps["three"].inputs)
    learned = steps["three"].settings["negatives"]["sources"]
    assert [(source["path"], source["share"], source["skip"], source["depth"]) for source in learned] == [
        (given[0], 3.0, 0, 30), (given[1], 1.0, 0, 1000), (given[2], 1.0, 5, 1000)]
    assert {option(steps[f"{name}-negatives"], "--depth") for name in ("bm25", "one")} == {"700"}


@pytest.mark.parametrize("recipe, sources, reason", [
    ("stage.yaml", ("bm25", "one"), "negatives.sources: 2 are needed, one for each of bm25, one of stage three"),
    ("several.yaml", ("bm25",), "negatives.sources: 1 are needed, .*, and there are 2"),
    ("several.yaml", "bm25", "path or sources: only one of the two"),
])
def test_sources_that_a_recipe_does_not_have_are_refused(folder, recipe, sources, reason):
    write(folder / "several.yaml", negatives={"sources": [{"path": "-"}, {"path": "-"}]})
    with pytest.raises(InputError, match=f"{recipe}.*{reason}"):
        plan(folder, pipeline(ONE, StageConfig("three", recipe, negatives=sources)))


def test_a_stage_need_not_name_the_folders_that_a_pipeline_gives_it(folder):
    (folder / "short.yaml").write_text(f"deepspeed: {FP32}\n")
    steps = plan(folder, pipeline(ONE, StageConfig("two", "short.yaml", negatives="one")))
    assert settings(steps["two"])["data"] == "work/shards" and settings(steps["two"])["output"] == "work/two"


def test_best_passages_need_a_ranking_of_passages(folder):
    write(folder / "best.yaml", passages="best")
    split = PrepareConfig(tokenizer="tok", split_documents=True)
    with pytest.raises(InputError, match="best.yaml: passages: 'best' needs negatives of an earlier stage, and two"):
        plan(folder, pipeline(ONE, StageConfig("two", "best.yaml"), prepare=split))
    plan(folder, pipeline(ONE, StageConfig("two", "best.yaml", negatives="one"), prepare=split))
    plan(folder, pipeline(ONE, StageConfig("two", "best.yaml")))  # passages are whole documents


@pytest.mark.parametrize("sources, reason", [((), "at least one"), (("bm25", "bm25"), "named once")])
def test_sources_of_a_stage_are_some_and_different(sources, reason):
    with pytest.raises(InputError, match=f"negatives: .*{reason}"):
        StageConfig("one", "stage.yaml", negatives=sources)


def test_two_stages_mined_from_one_share_the_longer_list(folder):
    three = StageConfig("three", "stage.yaml", negatives="one", mine_depth=60)
    steps = plan(folder, pipeline(ONE, TWO, three))
    assert settings(steps["two"])["negatives.path"] == settings(steps["three"])["negatives.path"]
    assert option(steps["one-negatives"], "--depth") == "60" and int(option(steps["one-mine"], "--hits")) > 60


def test_training_and_measuring_on_one_split(folder):
    steps = plan(folder, pipeline(ONE, TWO, evaluation=EvaluationConfig(split="all", train_split="all")))
    assert "one-all-encode" not in steps and option(steps["one-mine"], "--queries") == "work/one/vectors-all"


def test_further_splits_and_collections_are_measured(folder):
    (folder / "other").mkdir()
    evaluation = EvaluationConfig(more_splits=("held-out",), zero_shot=(CollectionConfig("far", "other"),))
    steps = plan(folder, pipeline(ONE, TWO, evaluation=evaluation))
    assert option(steps["prepare-far"], "--tokenizer") == "work/shards/tokenizer"
    assert Path("work/shards") in steps["prepare-far"].inputs
    for model in ("one", "two"):
        assert option(steps[f"{model}-held-out-queries"], "--split") == "held-out"
        assert f"{model}-held-out-docs" not in steps, "the documents are the same"
        assert option(steps[f"{model}-held-out-search"], "--index") == f"work/{model}/index"
        assert option(steps[f"{model}-held-out-evaluate"], "--qrels") == "work/shards/qrels/held-out.tsv"
        assert option(steps[f"{model}-far-docs"], "--data") == "work/zero-shot/far"
        assert option(steps[f"{model}-far-search"], "--index") == f"work/{model}/far/index"
        assert option(steps[f"{model}-far-evaluate"], "--qrels") == "work/zero-shot/far/qrels/test.tsv"
    assert option(steps["bm25-far"], "--bm25") == "other" and option(steps["bm25-held-out"], "--split") == "held-out"
    absent = EvaluationConfig(zero_shot=(CollectionConfig("far", "nowhere"),))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        plan(folder, pipeline(ONE, evaluation=absent))


def test_a_backbone_takes_the_place_of_the_recipes_own(folder):
    bare = StageConfig("bare", "stage.yaml", init="backbone")
    steps = plan(folder, pipeline(bare, ONE, TWO, backbone="some/backbone", prepare=PrepareConfig()))
    assert option(steps["prepare"], "--tokenizer") == "some/backbone"
    inits = {name: settings(steps[name])["model.init"] for name in ("pretrain", "bare", "one", "two")}
    assert inits == {"pretrain": "some/backbone", "bare": "some/backbone", "one": "work/pretrain/model",
                     "two": "work/one/model"}
    assert settings(plan(folder, pipeline(ONE, backbone="b", pretrain=None))["one"])["model.init"] == "b"


THREE = StageConfig("three", "stage.yaml", negatives="two", mine_depth=30, teacher="reranker")


@pytest.fixture
def reranking(folder) -> Path:
    """The folder with a recipe of a reranker."""
    write(folder / "rerank.yaml", optimization={"batch": 8}, max_length=60)
    return folder


def test_a_reranker_is_trained_reranks_and_teaches(reranking):
    config = RerankerConfig(negatives="one", mine_depth=70, score_depth=25, rerank_depth=40)
    steps = plan(reranking, pipeline(ONE, TWO, THREE, reranker=config))
    names = list(steps)
    assert names[names.index("one-evaluate") + 1:names.index("two")] == [
        "one-train-encode", "one-mine", "one-negatives", "reranker", "rerank", "rerank-evaluate"]
    assert names[names.index("two-evaluate") + 1:names.index("three")] == [
        "two-train-encode", "two-mine", "two-negatives", "two-scores"]
    training = steps["reranker"]
    assert training.command[0] == "launch/rerank.py" and training.trains and training.resumes
    assert settings(training) == {"data": "work/shards", "output": "work/reranker", "split": "train",
                                  "negatives.path": "work/one/negatives.jsonl", "model.init": "work/pretrain/model"}
    assert option(steps["one-negatives"], "--depth") == "70", "stage two needs 20 of them"
    rerank = steps["rerank"]
    assert option(rerank, "--run") == "work/one/run.trec" and option(rerank, "--depth") == "40"
    assert option(steps["rerank-evaluate"], "--compare") == "work/one/run.trec"
    assert option(steps["three-evaluate"], "--compare") == "work/two/run.trec"
    assert option(rerank, "--split") == "dev" and option(rerank, "--model") == "work/reranker/model"
    assert {Path("work/one/run.trec"), Path("work/reranker/model"), Path("work/shards")} == set(rerank.inputs)
    scores = steps["two-scores"]
    assert option(scores, "--negatives") == "work/two/negatives.jsonl" and option(scores, "--depth") == "25"
    assert option(scores, "--split") == "train" and scores.trains and scores.resumes
    assert settings(steps["three"])["negatives.path"] == option(scores, "--output") == "work/reranker/two.jsonl"
    assert settings(steps["two"])["negatives.path"] == "work/one/negatives.jsonl"


def test_a_reranker_scores_every_source(reranking):
    folder = reranking
    (folder / "n.jsonl").write_text("x")
    write(folder / "several.yaml", negatives={"sources": [{"path": "-"}] * 3}, loss={"distillation": "kl"})
    taught = StageConfig("taught", "several.yaml", negatives=("bm25", "one", "n.jsonl"), teacher="reranker")
    steps = plan(folder, pipeline(ONE, taught, reranker=RerankerConfig(negatives="bm25")))
    assert [option(steps[f"{name}-scores"], "--negatives") for name in ("bm25", "one", "taught-file2")] == [
        "work/bm25/negatives.jsonl", "work/one/negatives.jsonl", "n.jsonl"]
    assert [settings(steps["taught"])[f"negatives.sources.{i}.path"] for i in range(3)] == [
        f"work/reranker/{name}.jsonl" for name in ("bm25", "one", "files/taught-file2")]


def test_a_reranker_scores_batches_where_no_list_is_scored(reranking):
    write(reranking / "kl.yaml", loss={"distillation": "kl"})
    three = dataclasses.replace(THREE, recipe="kl.yaml")
    steps = plan(reranking, pipeline(ONE, TWO, three, reranker=RerankerConfig(negatives="one", score_depth=0)))
    assert not [name for name in steps if name.endswith("-scores")]
    taught = settings(steps["three"])
    assert taught["negatives.path"] == "work/two/negatives.jsonl" and taught["loss.teacher"] == "work/reranker/model"
    assert Path("work/reranker/model") in steps["three"].inputs, "it is distilled again when the teacher changes"
    assert "loss.teacher" not in settings(steps["two"])
    write(reranking / "kl.yaml", loss={"distillation": "kl"}, negatives={"filter_margin": 1.0})
    with pytest.raises(InputError, match="filters need a teacher's scores, and three has one that scores its batches"):
        Plan(pipeline(ONE, TWO, three, reranker=RerankerConfig(negatives="one", score_depth=0)), reranking)


@pytest.mark.parametrize(("passages", "negatives", "depth", "fits"), [
    ("first", "two", 9, False), ("best", "two", 9, True), ("best", ("bm25", "two"), 9, False),
    ("first", "two", 0, True)])
def test_split_documents_are_distilled_from_scores_of_passages(reranking, passages, negatives, depth, fits):
    several = {} if isinstance(negatives, str) else {"negatives": {"sources": [{"path": "-"}] * len(negatives)}}
    write(reranking / "kl.yaml", loss={"distillation": "kl"}, passages=passages, **several)
    three = dataclasses.replace(THREE, recipe="kl.yaml", negatives=negatives)
    config = pipeline(ONE, TWO, three, backbone="b", prepare=PrepareConfig(split_documents=True),
                      reranker=RerankerConfig(negatives="bm25", score_depth=depth))
    if fits:
        assert "three" in plan(reranking, config)
    else:
        with pytest.raises(InputError, match="kl.yaml: loss: where documents are split, .* reranker.score_depth 0"):
            Plan(config, reranking)


def test_a_stage_has_one_teacher(reranking):
    write(reranking / "kl.yaml", loss={"distillation": "kl", "teacher": "some/model"})
    three = dataclasses.replace(THREE, recipe="kl.yaml")
    with pytest.raises(InputError, match="the teacher of three scores its negatives beforehand"):
        Plan(pipeline(ONE, TWO, three, reranker=RerankerConfig(negatives="one")), reranking)


def test_a_reranker_on_negatives_of_bm25(reranking):
    (reranking / "n.jsonl").write_text("x")
    taught = [StageConfig("own", "stage.yaml", negatives="n.jsonl", teacher="reranker"),
              StageConfig("first", "stage.yaml", teacher="reranker"),
              StageConfig("second", "stage.yaml", teacher="reranker", init="first")]
    steps = plan(reranking, pipeline(*taught, reranker=RerankerConfig(mine_depth=600, init="backbone")))
    assert list(steps)[2:8] == ["bm25", "bm25-evaluate", "bm25-negatives", "reranker", "rerank", "rerank-evaluate"]
    assert option(steps["bm25-negatives"], "--depth") == "600"
    assert "model.init" not in settings(steps["reranker"])
    assert settings(steps["own"])["negatives.path"] == "work/reranker/files/own-file.jsonl"
    assert option(steps["own-file-scores"], "--negatives") == "n.jsonl"
    for name in ("first", "second"):
        assert settings(steps[name])["negatives.path"] == "work/reranker/bm25.jsonl"
    assert list(steps).count("bm25-scores") == 1
    started = plan(reranking, pipeline(reranker=RerankerConfig(init="backbone"), backbone="b"))
    assert settings(started["reranker"])["model.init"] == "b"


def test_a_bi_encoder_is_measured_mined_from_and_teaches(folder):
    write(folder / "taught.yaml", negatives={"sources": [{"path": "-"}] * 2}, loss={"distillation": "kl"})
    stages = (StageConfig("hard", "stage.yaml", negatives="bi_encoder", mine_depth=30),
              StageConfig("taught", "taught.yaml", negatives=("bi_encoder", "hard"), mine_depth=60,
                          teacher="bi_encoder"))
    config = pipeline(*stages, bi_encoder=BiEncoderConfig("some/encoder", "cls", scale=15.0, score_depth=40))
    steps = plan(folder, config)
    names = list(steps)
    assert names[names.index("bm25-evaluate") + 1:names.index("hard")] == [
        *(f"bi_encoder-{what}" for what in ("docs", "queries", "index", "search", "evaluate")),
        "bi_encoder-train-encode", "bi_encoder-mine", "bi_encoder-negatives"]
    for name in ("docs", "queries", "train-encode"):
        step = steps[f"bi_encoder-{name}"]
        assert option(step, "--model") == "some/encoder" and option(step, "--representation") == "cls" and step.trains
        assert "--top-k" not in step.command
    assert option(steps["bi_encoder-index"], "--engine") == "faiss"
    assert option(steps["hard-index"], "--engine") == "exact"
    assert option(steps["bi_encoder-evaluate"], "--compare") == "work/bm25/run.trec"
    assert option(steps["bi_encoder-negatives"], "--depth") == "60", "the other stage needs 30 of them"
    assert settings(steps["hard"])["negatives.path"] == "work/bi_encoder/negatives.jsonl"
    for source in ("bi_encoder", "hard"):
        step = steps[f"{source}-products"]
        place = step.command.index("--vectors")
        assert step.command[place + 1:place + 3] == ["work/bi_encoder/vectors-docs", "work/bi_encoder/vectors-train"]
        assert option(step, "--scale") == "15.0" and option(step, "--depth") == "40"
        assert option(step, "--negatives") == f"work/{source}/negatives.jsonl" and not step.trains
    assert [settings(steps["taught"])[f"negatives.sources.{i}.path"] for i in range(2)] == [
        "work/bi_encoder/bi_encoder-scored.jsonl", "work/bi_encoder/hard-scored.jsonl"]


def test_the_backbone_as_bi_encoder(folder):
    taught = StageConfig("taught", "stage.yaml", init="backbone", teacher="bi_encoder")
    steps = plan(folder, pipeline(taught, backbone="a/b", bi_encoder=BiEncoderConfig(), pretrain=None))
    assert option(steps["bi_encoder-docs"], "--model") == "a/b"
    assert option(steps["bm25-products"], "--negatives") == "work/bm25/negatives.jsonl"
    with pytest.raises(InputError, match="'model: backbone' needs a backbone"):
        pipeline(taught, bi_encoder=BiEncoderConfig())


def test_a_bi_encoder_with_a_tokenizer_and_a_length_of_its_own(folder):
    (folder / "other").mkdir()
    config = pipeline(StageConfig("taught", "stage.yaml", negatives="bi_encoder", teacher="bi_encoder"),
                      bi_encoder=BiEncoderConfig("some/encoder", max_length=256),
                      evaluation=EvaluationConfig(more_splits=("more",), zero_shot=(CollectionConfig("o", "other"),)))
    steps = plan(folder, config)
    own, other = steps["bi_encoder-prepare"], steps["bi_encoder-prepare-o"]
    for step, text, shards in ((own, "text", "work/bi_encoder/shards"), (other, "other", "work/bi_encoder/o/shards")):
        assert [option(step, f"--{name}") for name in ("input", "output", "tokenizer", "max-length")] == [
            text if text == "other" else option(steps["prepare"], "--input"), shards, "some/encoder", "256"]
        assert "--train-tokenizer" not in step.command and option(step, "--query-length") == "32"
    assert list(steps).count("bi_encoder-prepare") == 1
    for name, shards in (("docs", "work/bi_encoder/shards"), ("queries", "work/bi_encoder/shards"),
                         ("more-queries", "work/bi_encoder/shards"), ("train-encode", "work/bi_encoder/shards"),
                         ("o-docs", "work/bi_encoder/o/shards")):
        step = steps[f"bi_encoder-{name}"]
        assert option(step, "--data") == shards and Path(shards) in step.inputs
    assert option(steps["taught-docs"], "--data") == "work/shards"
    assert option(steps["bi_encoder-products"], "--data") == "work/shards", "whose queries are trained on"
    assert option(steps["prepare-o"], "--tokenizer") == "work/shards/tokenizer"
    with pytest.raises(InputError, match="'max_length' would cut documents into other passages"):
        pipeline(bi_encoder=BiEncoderConfig("e/e", max_length=9),
                 prepare=PrepareConfig(train_tokenizer=64, split_documents=True))


@pytest.mark.parametrize("stage", [StageConfig("x", "stage.yaml", teacher="bi_encoder"),
                                   StageConfig("x", "stage.yaml", negatives="bi_encoder"),
                                   StageConfig("x", "stage.yaml", compare="bi_encoder"),
                                   StageConfig("x", "stage.yaml", negatives=("bm25", "bi_encoder"))])
def test_a_bi_encoder_that_is_not_there_is_refused(stage):
    with pytest.raises(InputError, match="x names the bi_encoder, and there is no section of that name"):
        pipeline(stage)


def test_a_stage_is_compared_with_the_row_that_it_names(folder):
    stages = [StageConfig(name, "stage.yaml", compare=other) for name, other in
              (("a", None), ("b", None), ("c", "a"), ("d", "bm25"), ("e", "bi_encoder"))]
    steps = plan(folder, pipeline(*stages, bi_encoder=BiEncoderConfig("some/encoder"),
                                  evaluation=EvaluationConfig(more_splits=("test",))))
    for name, other in zip("abcde", ("bm25", "a", "a", "bm25", "bi_encoder"), strict=True):
        assert option(steps[f"{name}-evaluate"], "--compare") == f"work/{other}/run.trec"
        assert option(steps[f"{name}-test-evaluate"], "--compare") == f"work/{other}/run-test.trec"


@pytest.mark.parametrize("other", ["b", "later", "pretrain", "backbone"])
def test_a_stage_that_is_compared_with_no_earlier_one_is_refused(other):
    with pytest.raises(InputError, match=f"b is compared with '{other}', which is not an earlier stage"):
        pipeline(ONE, StageConfig("b", "stage.yaml", compare=other), StageConfig("later", "stage.yaml"))


@pytest.mark.parametrize("stages, reranker, reason", [
    ((THREE,), None, "three has a teacher that is not there yet"),
    ((ONE, StageConfig("early", "stage.yaml", teacher="reranker"), TWO), RerankerConfig(negatives="two"), "early has"),
    ((ONE,), RerankerConfig(negatives="two"), "'two' is neither bm25 nor a stage"),
    ((ONE, TWO), RerankerConfig(negatives="one", init="two"), "starts from 'two', which is not an earlier step"),
    ((StageConfig("reranker", "stage.yaml"),), None, "the name 'reranker' is taken"),
    ((StageConfig("bi_encoder", "stage.yaml"),), None, "the name 'bi_encoder' is taken"),
])
def test_a_reranker_that_comes_too_late_is_refused(stages, reranker, reason):
    with pytest.raises(InputError, match=reason):
        pipeline(*stages, reranker=reranker)


def test_another_hardware_configuration(folder):
    steps = plan(folder, pipeline(ONE), deepspeed_config="ds_configs/bf16_zero2.json", ranks=4)
    assert option(steps["one"], "--deepspeed_config") == "ds_configs/bf16_zero2.json"


def test_what_only_reports_or_computes_does_not_count_as_a_setting(folder):
    before = plan(folder, pipeline(ONE))["one"].settings
    write(folder / "stage.yaml", optimization={"batch": 8}, logging={"every": 3},
          deepspeed="ds_configs/bf16_zero0.json")
    assert plan(folder, pipeline(ONE))["one"].settings == before
    write(folder / "stage.yaml", optimization={"batch": 8, "lr": 1e-4})
    assert plan(folder, pipeline(ONE))["one"].settings != before


@pytest.mark.parametrize("break_it, reason", [
    (lambda f: write(f / "stage.yaml", learning_rate=1), "stage.yaml:.*learning_rate: unknown key"),
    (lambda f: write(f / "pretrain.yaml", masking={"encoder": 2.0}), "pretrain.yaml:.*masking.encoder"),
    (lambda f: (f / "stage.yaml").unlink(), "stage.yaml: no such recipe"),
    (lambda f: write(f / "stage.yaml", deepspeed="ds_configs/none.json"), "none.json: no such DeepSpeed"),
    (lambda f: write(f / "pretrain.yaml", optimization={"batch": 7}), "7 cannot be shared evenly by 2 ranks"),
    (lambda f: (f / "text").rmdir(), "text: no such folder"),
])
def test_a_bad_recipe_is_refused_before_the_first_step(folder, break_it, reason):
    break_it(folder)
    with pytest.raises(InputError, match=reason):
        Plan(pipeline(ONE, TWO), folder, ranks=2)
    assert not (folder / "work").exists()


@pytest.mark.parametrize("name", ["absent.jsonl", "later", "self"])
def test_negatives_of_no_earlier_stage_are_refused(folder, name):
    stages = [StageConfig("self", "stage.yaml", negatives=name), StageConfig("later", "stage.yaml")]
    with pytest.raises(InputError, match=f"{name}: no such file, and no earlier stage of that name"):
        Plan(pipeline(*stages), folder)


def test_an_input_that_is_the_work_folder_is_refused(folder):
    with pytest.raises(InputError, match="text: is the work folder too; choose another work=FOLDER"):
        Plan(pipeline(ONE, work="text"), folder)


# -------------------------------------------------------------------------------------------------- the runner

TOOL = """\
import sys
from pathlib import Path
output, mode = Path(sys.argv[1]), sys.argv[2]
with open("calls", "a") as calls:
    calls.write(output.name + "\\n")
if mode == "fail":
    sys.exit(3)
if mode == "forget":
    sys.exit(0)
output.parent.mkdir(parents=True, exist_ok=True)
if mode == "checkpoint":
    (output.parent / "checkpoints" / "step-5").mkdir(parents=True)
    sys.exit(9)
if mode == "folder":
    from lexmae import artifact
    with artifact.create(output, "model") as draft:
        (draft.path / "x").write_text("1")
else:
    output.write_text(mode)
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A work folder, with the tool of which steps are made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tool.py").write_text(TOOL)
    return tmp_path / "work"


def step(work: Path, name: str = "a", mode: str = "text", **options) -> Step:
    output = work / name / "model" if options.get("trains") else work / name
    return Step(name, [str(work.parent / "tool.py"), str(output), mode], output, **options)


def run(work: Path, *steps: Step, redo: bool = False) -> list[str]:
    """Names of the outputs of the commands that ran."""
    calls = work.parent / "calls"
    calls.unlink(missing_ok=True)
    runner = Runner(work, redo=redo)
    try:
        for i, one in enumerate(steps):
            runner.run(one, f"{i + 1}/{len(steps)}")
    finally:
        ran = calls.read_text().split() if calls.exists() else []
    return ran


def test_finished_steps_are_skipped(work, capsys):
    steps = [step(work, "a"), step(work, "b", inputs=[work / "a"])]
    assert run(work, *steps) == ["a", "b"]
    assert run(work, *steps) == []
    assert capsys.readouterr().err.count("finished before") == 2
    runner = Runner(work)
    assert runner.seconds(["a", "b"]).keys() == {"a", "b"}


def test_what_is_gone_is_made_again(work):
    steps = [step(work, "a"), step(work, "b", inputs=[work / "a"])]
    run(work, *steps)
    (work / "a").unlink()
    assert run(work, *steps) == ["a"]  # the same content again: what is made of it stays


@pytest.mark.parametrize("change", ["command", "settings", "input"])
def test_changed_steps_are_refused_and_replaced_only_when_asked(work, change):
    source = work.parent / "source"
    source.write_text("1")
    steps = [step(work, inputs=[source], settings={"lr": 1}), step(work, "b", inputs=[work / "a"])]
    run(work, *steps)
    if change == "command":
        steps[0] = step(work, mode="other", inputs=[source], settings={"lr": 1})
    elif change == "settings":
        steps[0] = step(work, inputs=[source], settings={"lr": 2})
    else:
        source.write_text("2")
    with pytest.raises(InputError, match="made with other settings or inputs than step a now has.*--redo"):
        run(work, *steps)
    assert (work / "a").read_text() == "text"
    assert run(work, *steps, redo=True) == (["a", "b"] if change == "command" else ["a"])  # b only if a differs
    assert run(work, *steps) == []


def test_an_output_that_no_record_tells_of_is_refused(work):
    work.mkdir()
    (work / "a").write_text("mine")
    with pytest.raises(InputError, match="a: was made with other settings"):
        run(work, step(work))
    assert (work / "a").read_text() == "mine"


def test_a_failed_step_stops_with_its_code_and_runs_again(work):
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run(work, step(work, mode="fail"), step(work, "b"))
        assert stop.value.code == 3 and (work.parent / "calls").read_text().split() == ["a"]
    assert run(work, step(work), step(work, "b")) == ["a", "b"]


def test_a_step_that_makes_nothing_is_an_error(work):
    with pytest.raises(InputError, match="step a ended without making it"):
        run(work, step(work, mode="forget"))


def test_half_of_what_a_step_left_is_removed_before_it_runs_again(work):
    run(work, step(work))
    book = json.loads((work / "steps.json").read_text())
    book["a"]["seconds"] = None  # killed before the end
    (work / "steps.json").write_text(json.dumps(book))
    artifact.partial_path(work / "a").mkdir()
    assert run(work, step(work)) == ["a"] and not artifact.partial_path(work / "a").exists()


def test_a_link_to_an_output_is_replaced_and_what_it_leads_to_stays(work):
    run(work, step(work, mode="folder"))
    (work / "a").rename(work.parent / "elsewhere")
    (work / "a").symlink_to(work.parent / "elsewhere")
    assert run(work, step(work, mode="folder")) == []
    assert run(work, step(work, mode="folder", settings={"lr": 2}), redo=True) == ["a"]
    assert not (work / "a").is_symlink() and artifact.exists(work / "a") and artifact.exists(work.parent / "elsewhere")


def test_a_step_that_goes_on_keeps_what_there_is(work):
    one = step(work, mode="fail", resumes=True)
    with pytest.raises(SystemExit):
        run(work, one)
    artifact.partial_path(work / "a").mkdir(parents=True)
    with pytest.raises(SystemExit):
        run(work, one)
    assert artifact.partial_path(work / "a").exists()
    with pytest.raises(SystemExit):
        run(work, step(work, mode="fail", resumes=True, settings={"changed": 1}))
    assert not artifact.partial_path(work / "a").exists()


def test_an_output_that_was_finished_but_not_noted_is_kept(work):
    one = step(work, "a", "folder", trains=True, resumes=True)
    run(work, one)
    book = json.loads((work / "steps.json").read_text())
    book["a"]["seconds"] = None  # killed between the two
    (work / "steps.json").write_text(json.dumps(book))
    assert run(work, one) == [] and Runner(work).seconds(["a"]) == {"a": 0.0}


def test_checkpoints_of_other_settings_are_not_thrown_away_unasked(work):
    with pytest.raises(SystemExit):
        run(work, step(work, mode="checkpoint", trains=True, resumes=True))
    changed = step(work, mode="folder", trains=True, resumes=True)
    with pytest.raises(InputError, match="other settings"):
        run(work, changed)
    assert (work / "a" / "checkpoints" / "step-5").is_dir()
    assert run(work, changed, redo=True) == ["model"] and not (work / "a" / "checkpoints").exists()


def test_inputs_are_known_by_content(work):
    folder = work.parent / "source"
    folder.mkdir()
    (folder / "x").write_text("1")
    one = step(work, inputs=[folder])
    run(work, one)
    assert run(work, one) == []
    (folder / "y").write_text("2")
    with pytest.raises(InputError):
        run(work, one)


@pytest.mark.parametrize("where", ["source/work", "source/deep/work", "link"])
def test_a_work_folder_within_an_input_is_no_part_of_it(work, where):
    source, folder = work.parent / "source", work.parent / where
    (source / "more").mkdir(parents=True)
    (source / "more" / "x").write_text("1")
    if where == "link":
        (source / "work").mkdir()
        folder.symlink_to(source / "work")

    def once() -> str:
        with locks.writing(folder):  # as the pipeline does
            Runner(folder).run(Step("a", [str(work.parent / "tool.py"), str(folder / "a"), "text"], folder / "a",
                                    [source]), "1/1")
        return (work.parent / "calls").read_text()

    assert once() == once() == "a\n"
    (source / "more" / "y").write_text("2")
    with pytest.raises(InputError, match="made with other settings or inputs"):
        once()


@pytest.mark.parametrize("record", [1, {}, {"key": 1, "seconds": 1.0}, {"key": "a"}, {"key": "a", "seconds": "b"}])
def test_a_book_of_another_form_is_one_line(work, record):
    write_json(work / "steps.json", {"rerank": record})
    with pytest.raises(InputError, match="steps.json: its entry of the step 'rerank' is not one that a pipeline "):
        Runner(work)


def test_several_ranks_go_through_the_launcher(tmp_path):
    training, other = Step("t", ["launch/pretrain.py", "r"], Path("o"), trains=True), Step("p", ["-m", "x"], Path("o"))
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    alone, four = Runner(tmp_path), Runner(tmp_path, ranks=4)
    assert alone._launch(training)[0] == four._launch(other)[0] == sys.executable
    assert four._launch(other)[1:] == ["-m", "x"]
    assert four._launch(training)[:3] == [launcher, "--num_gpus", "4"]
    assert four._launch(training)[3].endswith("/launch/pretrain.py") and Path(four._launch(training)[3]).is_file()
    assert Runner(tmp_path, hostfile="hosts")._launch(training)[:3] == [launcher, "--hostfile", "hosts"]


# --------------------------------------------------------------------------------------------------- the report


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def figures(tmp_path) -> PipelineRecipe:
    """What the steps of a pipeline with one stage leave."""
    work = tmp_path / "work"
    means = {"MRR@10": 0.25, "nDCG@10": 0.3, "Recall@100": 0.5, "Recall@1000": 0.6, "MAP": 0.1}
    write_json(work / "bm25" / "metrics.json", {"means": means})
    write_json(work / "bm25" / "bm25.json", {"terms_docs": 40.25, "terms_queries": 3.5, "index_bytes": 2_000_000,
                                             "queries_per_second": 1234.6})
    tests = [{"measure": "MAP"}, {"measure": "MRR@10", "mean_a": 0.35, "mean_b": 0.25, "p_t": 0.0123}]
    write_json(work / "one" / "metrics.json", {"means": {name: value + 0.1 for name, value in means.items()},
                                               "compare": {"run": str(work / "bm25" / "run.trec"), "tests": tests}})
    write_json(work / "one" / "run.json", {"queries_per_second": 99.5})
    for name, active in (("vectors-docs", 120.04), ("vectors-dev", 12.0)):
        with artifact.create(work / "one" / name, "vectors") as draft:
            draft.extra["mean_active"] = active
    (work / "one" / "index" / "deep").mkdir(parents=True)
    (work / "one" / "index" / "deep" / "x").write_bytes(b"\0" * 3_400_000)
    return pipeline(ONE, work=str(work))


def test_the_table(figures):
    text = report.write(figures, {"prepare": 1.5})
    assert text.splitlines() == [
        "|      | MRR@10 | nDCG@10 | Recall@100 | Recall@1000 |      difference in MRR@10 "
        "| terms/doc | terms/query | index MB | queries/s |",
        "|------|-------:|--------:|-----------:|------------:|--------------------------:"
        "|----------:|------------:|---------:|----------:|",
        "| BM25 | 0.2500 |  0.3000 |     0.5000 |      0.6000 |                         – "
        "|      40.2 |         3.5 |      2.0 |      1235 |",
        "| one  | 0.3500 |  0.4000 |     0.6000 |      0.7000 | +0.1000 to BM25 (p 0.012) "
        "|     120.0 |        12.0 |      3.4 |       100 |"]
    work = Path(figures.work)
    assert (work / "results.md").read_text() == text + "\n"
    written = json.loads((work / "results.json").read_text())
    assert written["seconds"] == {"prepare": 1.5} and written["results"]["one"]["index_bytes"] == 3_400_000
    assert written["results"]["BM25"]["MRR@10"] == 0.25 and "python" in written["versions"]


@pytest.mark.parametrize("source", ["bm25", "one"])
def test_the_row_of_the_reranked_run(figures, source):
    """Two steps that do 99.5 and 10 queries/s one after the other do 1 / (1 / 99.5 + 1 / 10) = 9.1."""
    work = Path(figures.work)
    write_json(work / "reranker" / "metrics.json", {"means": dict.fromkeys(report.MEASURES, 0.75)})
    write_json(work / "reranker" / "run.json", {"queries_per_second": 10.0})
    lines = report.table(report.collect(dataclasses.replace(
        figures, reranker=RerankerConfig(negatives=source)))).splitlines()
    rates = {"bm25": "10", "one": "9"}  # 1234.6 and 10: 9.92
    sizes = {"bm25": "2.0", "one": "3.4"}
    cells = [cell.strip() for cell in lines[{"bm25": 3, "one": 4}[source]].strip("|").split("|")]
    assert cells == ["rerank", *["0.7500"] * 4, "–", "–", "–", sizes[source], rates[source]] and len(lines) == 5
    write_json(work / "reranker" / "run.json", {"queries_per_second": None})
    text = report.table(report.collect(dataclasses.replace(figures, reranker=RerankerConfig(negatives=source))))
    assert next(line for line in text.splitlines() if "rerank" in line).endswith(" – |")


def test_figures_that_a_killed_command_left_out_are_none(figures):
    """Killed between a run and its figures, a step that goes on counts as finished."""
    work = Path(figures.work)
    write_json(work / "reranker" / "metrics.json", {"means": dict.fromkeys(report.MEASURES, 0.75)})
    (work / "bm25" / "bm25.json").unlink()
    with_reranker = dataclasses.replace(figures, reranker=RerankerConfig(negatives="bm25"))
    lines = report.write(with_reranker, {}).splitlines()
    assert all([cell.strip() for cell in line.strip("|").split("|")][-4:] == ["–"] * 4 for line in lines[2:4])
    assert "120.0" in lines[4] and len(lines) == 5


def test_the_row_of_the_bi_encoder(figures):
    folder = Path(figures.work) / "bi_encoder"
    write_json(folder / "metrics.json", {"means": dict.fromkeys(report.MEASURES, 0.5)})
    write_json(folder / "run.json", {"queries_per_second": 77.0})
    for name in ("vectors-docs", "vectors-dev"):
        with artifact.create(folder / name, "dense") as draft:
            draft.extra["dimensions"] = 384
    (folder / "index").mkdir()
    (folder / "index" / "x").write_bytes(b"\0" * 1_500_000)
    lines = report.table(report.collect(dataclasses.replace(figures, bi_encoder=BiEncoderConfig("e/e")))).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["bi_encoder", *["0.5000"] * 4, "–", "–", "–", "1.5", "77"] and len(lines) == 5


def test_a_teacher_that_is_worse_than_its_student_is_named(figures):
    work, student = Path(figures.work), figures.stages[0]
    stages = (student, dataclasses.replace(student, name="two", teacher="reranker"))
    taught = dataclasses.replace(figures, stages=stages, reranker=RerankerConfig(negatives="one"))
    path, means = work / "reranker" / "metrics.json", dict.fromkeys(report.MEASURES, 0.25)
    test = {"measure": "MRR@10", "mean_a": 0.25, "mean_b": 0.35, "p_t": 0.03}
    write_json(path, {"means": means, "compare": {"run": str(work / "one" / "run.trec"), "tests": [test]}})
    assert report.doubt(taught) == (
        "warning: the cross-encoder orders the results of one worse than one did (MRR@10 -0.1000, p 0.03); two can "
        "only lose by learning from it: train it longer, or from a stronger model")
    assert report.doubt(dataclasses.replace(taught, stages=(student,))) is None  # nobody learns from it
    write_json(path, {"means": means, "compare": {"run": str(work / "one" / "run.trec"),
                                                  "tests": [{**test, "mean_b": 0.15}]}})
    assert report.doubt(taught) is None
    write_json(path, {"means": means})
    assert report.doubt(taught) is None


def test_further_splits_and_collections_have_tables_of_their_own(figures):
    work = Path(figures.work)
    for row, value in (("bm25", 0.5), ("one", 0.75)):
        for file in ("metrics-test.json", "other/metrics.json"):
            write_json(work / row / file, {"means": dict.fromkeys(report.MEASURES, value)})
    evaluation = EvaluationConfig(more_splits=("test",), zero_shot=(CollectionConfig("other", "text"),))
    text = report.write(dataclasses.replace(figures, evaluation=evaluation), {})
    first, *further = text.split("\n\n")
    assert "terms/doc" in first and "terms/doc" not in "".join(further)
    assert further[1].splitlines() == [
        "| other | MRR@10 | nDCG@10 | Recall@100 | Recall@1000 | difference in MRR@10 |",
        "|-------|-------:|--------:|-----------:|------------:|---------------------:|",
        "| BM25  | 0.5000 |  0.5000 |     0.5000 |      0.5000 |                    – |",
        "| one   | 0.7500 |  0.7500 |     0.7500 |      0.7500 |                    – |"]
    assert json.loads((work / "results.json").read_text())["further"]["test"]["one"]["MRR@10"] == 0.75


def test_a_reranked_run_has_a_row_in_every_table(figures):
    work = Path(figures.work)
    for row in ("bm25", "one", "reranker"):
        for file in ("metrics-test.json", "other/metrics.json"):
            write_json(work / row / file, {"means": dict.fromkeys(report.MEASURES, 0.5)})
    evaluation = EvaluationConfig(more_splits=("test",), zero_shot=(CollectionConfig("other", "text"),))
    further = report.collect_further(dataclasses.replace(
        figures, evaluation=evaluation, reranker=RerankerConfig(negatives="bm25")))
    assert list(further["test"]) == list(further["other"]) == ["BM25", "rerank", "one"]


SAVES_FIRST = """\
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with SIGINT ignored
pathlib.Path("begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path("saved").touch()
"""


SAVES_AT_TERM = """\
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("begun").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("launched", [False, True])
def test_sigterm_is_passed_on(tmp_path, launched):
    """To the command itself, or past the launcher, which would not pass it on."""
    command = [sys.executable, "-c", SAVES_AT_TERM]
    if launched:
        (tmp_path / "deepspeed").write_text(
            f"#!{sys.executable}\nimport subprocess\nraise SystemExit(subprocess.call({command!r}))\n")
        (tmp_path / "deepspeed").chmod(0o755)
        command = [str(tmp_path / "deepspeed")]
    program = f"import sys; from lexmae.cycle import runner; sys.exit(runner._wait({command!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 75 and (tmp_path / "saved").exists()


def test_ctrl_c_lets_a_command_save(tmp_path):
    program = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
               f"from lexmae.cycle import runner; runner._wait([sys.executable, '-c', {SAVES_FIRST!r}])")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0 and (tmp_path / "saved").exists()


# ------------------------------------------------------------------------------------- what decides that a step is done


def test_scores_of_a_file_and_of_a_stages_list_lie_apart(reranking):
    (reranking / "n.jsonl").write_text("x")
    write(reranking / "kl.yaml", loss={"distillation": "kl"})
    two = StageConfig("two", "kl.yaml", negatives="n.jsonl", teacher="reranker")
    three = StageConfig("three", "kl.yaml", negatives="two", teacher="reranker")
    steps = plan(reranking, pipeline(two, three, reranker=RerankerConfig(negatives="bm25")))
    for name, source in (("two", "n.jsonl"), ("three", "work/two/negatives.jsonl")):
        read = settings(steps[name])["negatives.path"]
        scores = next(step for step in steps.values() if str(step.output) == read)
        assert option(scores, "--negatives") == source


def test_steps_that_get_in_each_others_way_are_refused(folder):
    with pytest.raises(InputError, match="get in each other's way"):
        Plan(pipeline(StageConfig("prepare", "stage.yaml")), folder)


def test_the_training_queries_may_be_measured_too(folder):
    two = StageConfig("two", "stage.yaml", negatives="one")
    steps = Plan(pipeline(ONE, two, evaluation=EvaluationConfig(more_splits=("train",))), folder).steps
    assert len({step.name for step in steps}) == len(steps) == len({step.output for step in steps})


@pytest.mark.parametrize("keys, reason", [({"loss": {"distillation": "kl"}}, "distillation needs a teacher's scores"),
                                          ({"negatives": {"filter_margin": 1.0}}, "filters need a teacher's scores")])
def test_scores_that_nothing_makes_are_missed_before_the_first_step(folder, keys, reason):
    write(folder / "needs.yaml", **keys)
    with pytest.raises(InputError, match=reason):
        Plan(pipeline(ONE, StageConfig("two", "needs.yaml", negatives="one")), folder)
    (folder / "n.jsonl").write_text("x")
    plan(folder, pipeline(ONE, StageConfig("two", "needs.yaml", negatives="n.jsonl")))


def test_how_a_machine_computes_a_stage_changes_nothing_that_was_made(folder):
    keys = []
    for more in ({}, {"optimization": {"micro_batch": 2}}, {"model": {"packing": "on"}}, {"optimization": {"lr": 0.5}}):
        write(folder / "one.yaml", **more)
        keys.append(plan(folder, pipeline(StageConfig("one", "one.yaml")))["one"].settings)
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_models_that_lie_in_folders_are_inputs(folder):
    for name in ("bb", "teacher", "own"):
        (folder / name).mkdir()
    write(folder / "teach.yaml", loss={"distillation": "kl", "teacher": "teacher"})
    write(folder / "own.yaml", model={"init": "own"})
    stages = StageConfig("one", "teach.yaml", init="backbone"), StageConfig("two", "own.yaml", init="backbone")
    steps = plan(folder, pipeline(stages[0], backbone="bb", prepare=PrepareConfig(), bi_encoder=BiEncoderConfig()))
    for name in ("prepare", "pretrain", "bi_encoder-docs", "one"):
        assert Path("bb") in steps[name].inputs
    assert Path("teacher") in steps["one"].inputs
    assert Path("own") in plan(folder, pipeline(stages[1], pretrain=None))["two"].inputs


def test_where_a_recipe_lies_and_how_the_machine_computes_do_not_count(folder):
    text = ROOT / "ds_configs" / "fp32_zero3.json"
    config = pipeline(ONE, evaluation=EvaluationConfig(batch_tokens=64))
    here, there = plan(folder, pipeline(ONE)), Plan(config, folder.resolve(), str(text)).steps
    for step in there:
        assert step.counted == here[step.name].counted
    assert any(step.counted != step.command for step in there)


def test_an_edited_collection_counts_as_another(folder, tmp_path):
    from lexmae.data.corpus import Passage, write_beir
    made = tmp_path / "made"
    write_beir(made, [Passage("a", "", "text")], [], {})
    before = runner._content(made, tmp_path / "work")
    (made / "corpus.jsonl").write_text('{"_id": "a", "title": "", "text": "another text"}\n')
    assert runner._content(made, tmp_path / "work") != before
