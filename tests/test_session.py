"""What a training run refuses before anything is started, and the model that a recipe asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import MAX_LENGTH, write_model

from lexmae import artifact
from lexmae.config import (
    FinetuneRecipe,
    LossConfig,
    ModelConfig,
    NegativesConfig,
    OptimizationConfig,
    PretrainRecipe,
    ProbeConfig,
    RerankRecipe,
)
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.recipe import to_dict
from lexmae.train import parts, session

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32}
SCRATCH = ModelConfig(init="scratch", size=SIZE)


@pytest.fixture
def recipe(shards_dir, tmp_path):
    """Makes a recipe that can run here; keywords replace parts of it."""
    def make(kind: type = PretrainRecipe, **changes):
        values = {"data": str(shards_dir), "output": str(tmp_path / "run"), "deepspeed": "ds_configs/fp32_zero1.json",
                  "model": SCRATCH, "optimization": OptimizationConfig(batch=8, micro_batch=2, steps=2)}
        return kind(**(values | changes))
    return make


def test_how_a_run_is_spread(recipe, monkeypatch):
    assert session.check(recipe()).accumulation == 4
    assert session.check(recipe(), world=2).accumulation == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert session.check(recipe()).world == 4
    assert session.check(recipe(FinetuneRecipe)).accumulation == 1


def folder(path: Path, *files: str) -> Path:
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    return path


@pytest.mark.parametrize("kind, changes, reason", [
    (PretrainRecipe, {"data": "nowhere"}, "nowhere: no such shards"),
    (PretrainRecipe, {"deepspeed": "nowhere.json"}, "no such DeepSpeed configuration"),
    (PretrainRecipe, {"optimization": OptimizationConfig(batch=8, micro_batch=3)}, "not a multiple of the micro-batch"),
    (PretrainRecipe, {"optimization": OptimizationConfig(batch=8, micro_tokens=MAX_LENGTH - 1)},
     f"texts that may be longer, so at least {MAX_LENGTH} are needed"),
    (RerankRecipe, {"optimization": OptimizationConfig(batch=8, micro_tokens=99), "max_length": 32,
                    "negatives": NegativesConfig(per_query=3)}, "4 pairs of up to 32 tokens, so at least 128"),
    (FinetuneRecipe, {"split": "test"}, "no queries of the split 'test'; it has dev, train"),
    (PretrainRecipe, {"probe": ProbeConfig(every=5, split="test")}, "of the split 'test', which probe.split names"),
    (FinetuneRecipe, {"probe": ProbeConfig(every=5, split="test")}, "which probe.split names; it has dev, train"),
    (FinetuneRecipe, {"negatives": NegativesConfig(path="nowhere.jsonl")}, "nowhere.jsonl: no such file of negatives"),
])
def test_inputs_that_are_not_there_are_refused(recipe, tmp_path, kind, changes, reason):
    with pytest.raises(InputError, match=reason):
        session.check(recipe(kind, **changes))
    assert not (tmp_path / "run").exists()


def test_a_probe_that_is_off_names_no_split(recipe):
    session.check(recipe(probe=ProbeConfig(split="test")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_on_a_cpu_is_refused(recipe):
    with pytest.raises(InputError, match="fp16, which needs a GPU"):
        session.check(recipe(deepspeed="ds_configs/fp16_zero1.json"))


def test_an_output_that_is_taken_is_refused_unless_continued(recipe, tmp_path):
    config = recipe()
    folder(tmp_path / "run", "checkpoints/step-3/manifest.json")
    with pytest.raises(InputError, match="holds checkpoints; continue with --resume auto"):
        session.check(config)
    session.check(config, resume="auto")
    folder(tmp_path / "run", "model/manifest.json")
    with pytest.raises(InputError, match="holds a finished model already"):
        session.check(config)
    session.check(config, resume="auto")


def test_a_model_made_with_another_tokenizer_is_refused(recipe, shards_dir, model_dir, tmp_path):
    session.check(recipe(model=ModelConfig(init=str(model_dir))))
    other = write_model(tmp_path / "other", shards_dir, tokenizer_hash="0" * 64)
    with pytest.raises(InputError, match="other: was trained with another tokenizer"):
        session.check(recipe(model=ModelConfig(init=str(other))))


def test_a_finished_run_is_left_as_it_is(recipe, tmp_path, capsys):
    with artifact.create(tmp_path / "run" / "model", "model"):
        pass
    session.run(recipe(), resume="auto")
    assert "is finished: nothing to do" in capsys.readouterr().err


def test_a_model_from_scratch_fits_the_shards(tiny_shards):
    torch.manual_seed(3)
    lm = parts.build_lm(SCRATCH, tiny_shards)
    assert backbone.word_embeddings(lm).shape == (tiny_shards.vocab_size, 16)
    assert lm.config.pad_token_id == tiny_shards.special.pad
    torch.manual_seed(3)
    again = parts.build_lm(SCRATCH, tiny_shards)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))


def test_a_model_from_a_folder_keeps_its_weights(tiny_shards, model_dir):
    from transformers import AutoModelForMaskedLM

    expected = AutoModelForMaskedLM.from_pretrained(model_dir).state_dict()
    found = parts.build_lm(ModelConfig(init=str(model_dir)), tiny_shards).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_model_that_cannot_read_the_shards_is_refused(tiny_shards, tmp_path):
    short = ModelConfig(init="scratch", size={**SIZE, "max_position_embeddings": MAX_LENGTH - 1})
    with pytest.raises(InputError, match=f"reads {MAX_LENGTH - 1} tokens, the shards hold up to {MAX_LENGTH}"):
        parts.build_lm(short, tiny_shards)
    few = backbone.create_masked_lm("bert", 50, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, SIZE)
    few.save_pretrained(tmp_path / "few")
    with pytest.raises(InputError, match="knows 50 tokens, the shards use a vocabulary of"):
        parts.build_lm(ModelConfig(init=str(tmp_path / "few")), tiny_shards)


def test_what_may_change_between_a_run_and_its_continuation(recipe):
    learned = session._learned(to_dict(recipe()))
    assert {"output", "deepspeed", "logging"}.isdisjoint(learned)
    assert {"micro_batch", "micro_tokens"}.isdisjoint(learned["optimization"])
    assert {"packing", "compile", "activation_checkpointing"}.isdisjoint(learned["model"])
    assert learned["optimization"]["batch"] == 8 and learned["model"]["init"] == "scratch"


@pytest.fixture
def taught(recipe, tmp_path):
    """A recipe of fine-tuning whose teacher, first model and negatives are files of others."""
    for name in ("teacher/weights", "init/weights", "n.jsonl"):
        folder(tmp_path, name)
    return recipe(FinetuneRecipe, model=ModelConfig(init=str(tmp_path / "init")),
                  loss=LossConfig(distillation="kl", teacher=str(tmp_path / "teacher")),
                  negatives=NegativesConfig(path=str(tmp_path / "n.jsonl")))


def test_a_teacher_that_has_changed_is_another_input(taught, recipe, tmp_path):
    before = session._inputs(taught)
    assert before.keys() == {taught.data, str(tmp_path / "n.jsonl"), str(tmp_path / "teacher")}
    (tmp_path / "teacher" / "weights").write_text("trained again")
    after = session._inputs(taught)
    assert {path for path in after if after[path] != before[path]} == {str(tmp_path / "teacher")}
    assert session._inputs(recipe()).keys() == {recipe().data}
    hub = dataclasses.replace(taught, loss=LossConfig(distillation="kl", teacher="someone/teacher"))
    assert "someone/teacher" not in session._inputs(hub)


@pytest.mark.parametrize("changed", ["teacher/weights", "init/weights", "n.jsonl"])
def test_hosts_compare_the_contents_of_what_they_may_have_copies_of(taught, recipe, tmp_path, monkeypatch, changed):
    assert session._contents(taught) == {}, "one machine has one copy"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    before = session._contents(taught)
    assert before.keys() == {f"the content of {tmp_path / name}" for name in ("teacher", "init", "n.jsonl")}
    (tmp_path / changed).write_text("another copy")
    after = session._contents(taught)
    assert {name for name in after if after[name] != before[name]} == {
        f"the content of {tmp_path / changed.split('/')[0]}"}
    assert session._contents(recipe()) == {}, "from scratch"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert session._contents(taught) == {}, "the first rank of a host speaks for it"
