"""The model card: what training writes, what an evaluation adds, and that neither lets data write markup."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from runpy import run_path

import pytest
import yaml
from conftest import write_model

from lexmae import artifact, cli, recipe
from lexmae.config import FinetuneRecipe, PretrainRecipe
from lexmae.errors import InputError
from lexmae.model import card
from lexmae.model.card import BEGIN, END, Evaluation, Facts, plain
from lexmae.retrieval.runs import write_run

ROOT = Path(__file__).parents[1]


def facts(shards: artifact.Manifest, stage: str = "finetune", **changes) -> Facts:
    config = {"finetune": FinetuneRecipe, "pretrain": PretrainRecipe}[stage](data="shards", output="runs/x")
    known = {"title": "stage1", "stage": stage, "recipe": recipe.dump(config), "settings": recipe.to_dict(config),
             "shards": shards, "steps": 400, "weights": 1_700_000,
             "last": {"step": 400, "loss": 0.64123, "terms_docs": 67.7, "grad_norm": 3.0, "loss_contrastive": None}}
    return Facts(**{**known, **changes})


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_of_a_retriever(tiny_shards):
    text = card.render(facts(tiny_shards.manifest, base="owner/name"))
    assert text.startswith("---\nlibrary_name: sentence-transformers\n")
    assert header(text) == {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction",
                            "base_model": "owner/name", "tags": ["sentence-transformers", "sparse-encoder",
                                                                 "learned-sparse-retrieval", "lexmae"]}
    for row in ("Documents | 41", "Queries (train) | 13", "Judgements | 18", "Negatives | random passages",
                "Weights | 1,700,000", "Steps | 400", "Loss | 0.6412", "Active terms of a document | 67.7"):
        assert f"| {row} |" in text
    assert "grad" not in text.split("## Recipe")[0] and "Contrastive loss" not in text
    assert text.count("```python") == 3 and "Not evaluated yet." in text and "license:" in text
    composed = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(composed) == yaml.safe_load(facts(tiny_shards.manifest).recipe)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_a_card_names_every_file_of_negatives(tiny_shards):
    settings = facts(tiny_shards.manifest).settings
    named = {**settings["negatives"], "sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}
    text = card.render(facts(tiny_shards.manifest, settings={**settings, "negatives": named}))
    assert "| Negatives | a.jsonl, b.jsonl |" in text


def test_a_card_of_a_pretrained_model(tiny_shards):
    text = card.render(facts(tiny_shards.manifest, "pretrain", last={"loss_enc": 7.25, "probe_mrr_10": 0.5}))
    assert "pipeline_tag" not in header(text) and "base_model" not in header(text)
    assert "| Loss of the encoder | 7.25 |" in text and "those of a probe" in text and "Queries" not in text
    assert "not made for search yet" in text


def test_the_last_figures_come_from_several_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "probe_mrr_10": 0.5},
            {"step": 3, "loss": 1.0}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert card.last_figures(log, 2) == {"step": 2, "loss": 2.0, "probe_mrr_10": 0.5}
    assert card.last_figures(tmp_path / "none", 2) == {}


@pytest.mark.parametrize("name", [f"a{BEGIN}b", "<script>x</script>", "| a | b |", "**bold** [x](y) `c`", "a\n# b\r\nc",
                                  "x" * 500, "\x1b[31mred", "\u202ereversed"])
def test_names_from_data_stay_plain(name):
    shown = plain(name)
    assert "\n" not in shown and "<" not in shown and "\x1b" not in shown and "\u202e" not in shown
    assert not re.search(r"(?<!\\)[|`*\[\]#]", shown) and len(shown.replace("\\", "")) <= card.LONGEST


def test_a_recipe_cannot_leave_its_fence(tiny_shards):
    hostile = "data: |\n  ```\n  # heading\n  ````\n"
    text = card.render(facts(tiny_shards.manifest, recipe=hostile, title=f"{BEGIN}\n{END}"))
    assert f"`````yaml\n{hostile.strip()}\n`````\n" in text
    assert [line for line in text.split("\n") if line == BEGIN] == [BEGIN]


def test_the_base_of_a_chain_of_models(tmp_path):
    def model(name: str, init: str) -> str:
        with artifact.create(tmp_path / name, "model", config={"model": {"init": init}}):
            pass
        return str(tmp_path / name)

    assert card.base_model(model("b", model("a", "owner/name"))) == "owner/name"
    assert card.base_model("bert-base-uncased") == "bert-base-uncased"
    assert card.base_model(model("c", "scratch")) is None and card.base_model("scratch") is None
    assert card.base_model(model("e", str(tmp_path / "gone"))) is None
    assert card.base_model(model("f", str(tmp_path / "f"))) is None  # names itself


# --------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture
def model(shards_dir, tiny_shards, tmp_path) -> Path:
    """A finished model with a card."""
    folder = write_model(tmp_path / "run" / "model", shards_dir)
    artifact.annotate(folder, {}, {card.NAME: card.render(facts(tiny_shards.manifest))})
    return folder


def test_evaluations_are_added_and_replaced(model):
    before, identity = (model / card.NAME).read_text(encoding="utf-8"), artifact.read(model).fingerprint
    card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.51234, "MAP": 0.5}))
    card.add_evaluation(model, Evaluation("beir|<b>", "test", 1200, {"nDCG@10": 0.25}))
    card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.61}))
    text = (model / card.NAME).read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    table, tail = rest.split(END)
    assert table.strip().split("\n")[:4] == [
        "| Data set | Split | Queries | nDCG@10 | MRR@10 |", "| --- | --- | ---: | ---: | ---: |",
        "| beir\\|&lt;b&gt; | test | 1,200 | 0.2500 | – |", "| squad | dev | 5 | – | 0.6100 |"]
    assert (head, tail) == (before.split(BEGIN)[0], before.split(END)[1])
    artifact.verify(model)
    manifest = artifact.read(model)
    assert manifest.fingerprint == identity  # what is made with the model does not depend on its card
    assert manifest.files[card.NAME] == artifact.checksum(model / card.NAME)
    assert [row["data"] for row in manifest.extra["evaluations"]] == ["beir|<b>", "squad"]


def test_what_an_author_wrote_stays(model):
    file = model / card.NAME
    text = file.read_text(encoding="utf-8").replace("library_name", "license: mit\nlibrary_name")
    moved = text.replace(f"{BEGIN}\nNot evaluated yet.\n{END}", "") + f"\nMine.\n\n{BEGIN}\n{END}\nThe end.\n"
    for written in (text, moved):
        file.write_text(written, encoding="utf-8")
        card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
        changed = file.read_text(encoding="utf-8")
        assert changed.split(BEGIN)[0] == written.split(BEGIN)[0] and changed.split(END)[1] == written.split(END)[1]
        artifact.verify(model)
    file.write_text("# Mine\n", encoding="utf-8")
    card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
    assert file.read_text(encoding="utf-8").startswith(f"# Mine\n\n## Evaluation\n\n{BEGIN}\n| Data set")


def test_a_model_without_a_card_gets_one(shards_dir, tmp_path):
    folder = write_model(tmp_path / "old" / "model", shards_dir)
    card.add_evaluation(folder, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
    assert (folder / card.NAME).read_text(encoding="utf-8").startswith("# old\n")
    artifact.verify(folder)


def test_stopped_between_two_files_it_is_noticed_and_repaired(model, monkeypatch):
    replace, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
    with pytest.raises(InputError, match="README.md: does not have the checksum"):
        artifact.verify(model)
    card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
    artifact.verify(model)
    assert not list(model.glob(".*"))


def test_evaluations_at_the_same_time_do_not_lose_each_other(model, monkeypatch):
    """One begins when the other has read what is there: it is refused, and nothing is replaced unseen."""
    block, refused = card._block, []

    def other_begins(rows):
        with pytest.raises(InputError, match="is being written") as error, ThreadPoolExecutor(1) as pool:
            pool.submit(card.add_evaluation, model, Evaluation("other", "dev", 5, {"MRR@10": 0.4})).result()
        refused.append(error)
        return block(rows)

    with monkeypatch.context() as patch:
        patch.setattr(card, "_block", other_begins)
        card.add_evaluation(model, Evaluation("squad", "dev", 5, {"MRR@10": 0.5}))
    assert refused
    artifact.verify(model)


def test_content_is_not_documentation(model):
    with pytest.raises(ValueError, match="config.json is content"):
        artifact.annotate(model, {}, {"config.json": "{}"})
    artifact.verify(model)


@pytest.mark.parametrize("path, expected", [
    ("squad/qrels/dev.tsv", ("squad", "dev")), ("squad/qrels/dev.tsv.gz", ("squad", "dev")),
    ("msmarco/qrels.dev.small.tsv", ("msmarco", "dev.small")), ("trec/covid.txt", ("trec", "covid"))])
def test_a_data_set_is_known_by_its_place(tmp_path, path, expected):
    assert card.data_set(tmp_path / path, "test") == expected


def test_a_folder_is_a_data_set_of_the_split_that_is_read(tmp_path, shards_dir):
    (tmp_path / "nfcorpus").mkdir()
    assert card.data_set(tmp_path / "nfcorpus", "dev") == ("nfcorpus", "dev")
    assert card.data_set(shards_dir, "train") == ("beir", "train")


def test_shards_name_their_collection(shards_dir):
    assert card.data_set(shards_dir / "qrels" / "dev.tsv", "test") == ("beir", "dev")


def evaluate(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run(run_path(str(ROOT / "tools" / "evaluate.py"))["main"], list(arguments))
    return stopped.value.code


def test_the_command_adds_to_the_card(model, shards_dir, tmp_path, capsys):
    write_run(tmp_path / "run.trec", {"v0": [("d0", 2.0)], "v1": [("d9", 3.0), ("d4", 1.0)]})
    common = ["--run", str(tmp_path / "run.trec"), "--qrels", str(shards_dir / "qrels" / "dev.tsv"), "--measures",
              "MRR@10"]
    assert evaluate(*common, "--card", str(model)) == 0
    assert evaluate(*common, "--card", str(model), "--data-set", "mine") == 0
    text = (model / card.NAME).read_text(encoding="utf-8")
    assert "| beir | dev | 5 | 0.3000 |\n| mine | dev | 5 | 0.3000 |" in text
    artifact.verify(model)
    capsys.readouterr()
    for wrong, reason in ((["--card", str(tmp_path)], "has no manifest"), (["--data-set", "x"], "goes with --card"),
                          (["--card", str(shards_dir)], "is of kind 'shards'")):
        assert evaluate(*common, *wrong) == 2
        assert reason in capsys.readouterr().err
