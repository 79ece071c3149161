"""What does not belong together is refused, or warned of, with both values."""

from __future__ import annotations

import pytest
from conftest import MAX_LENGTH, write_model
from launching import reseal

from lexmae import artifact
from lexmae.data.shards import Shards
from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.retrieval import encode, encode_dense, engines, updates, vectors
from lexmae.retrieval.encode import EncodeConfig
from lexmae.retrieval.vectors import SparseVectors

DOCS = EncodeConfig("docs")


def test_tokenizers(shards_dir, tmp_path):
    ours = artifact.read(shards_dir).extra
    model = write_model(tmp_path / "model", shards_dir, tokenizer_hash="0" * 64, vocab_size=77)
    with pytest.raises(InputError) as error:
        Shards.open(shards_dir).refuse_other_tokenizer(model, "model")
    text = str(error.value)
    assert "(0000000000000000…, 77 tokens)" in text
    assert f"({ours['tokenizer_hash'][:16]}…, {ours['vocab_size']} tokens)" in text


def test_vocabularies():
    assert vectors.vocabularies_differ(["a", "b"], ["a"]) == "it has 2 tokens, but 1"
    assert vectors.vocabularies_differ(["a", "b", "c"], ["a", "x", "y"]) == "token 1 is 'b' (2 of 3 differ), but 'x'"


def test_texts_longer_than_the_model_reads(model_dir, shards_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone, "max_length", lambda lm: 20)
    for run in (lambda: encode.encode(model_dir, shards_dir, tmp_path / "v", DOCS),
                lambda: encode_dense.encode(model_dir, shards_dir, tmp_path / "v", DOCS, "cls")):
        with pytest.raises(InputError, match=f"reads 20 tokens, .* holds texts of up to {MAX_LENGTH}"):
            run()


def test_another_length_is_remembered_and_said(shards_dir, tmp_path, capsys):
    model = write_model(tmp_path / "model", shards_dir, max_length=99)
    encode.encode(model, shards_dir, tmp_path / "v", DOCS)
    assert f"was trained with max_length 99, {shards_dir} has {MAX_LENGTH}" in capsys.readouterr().err
    made = SparseVectors.open(tmp_path / "v")
    assert made.extra["max_length"] == MAX_LENGTH
    for name, rows in (("some", range(30)), ("rest", range(30, 41))):
        made.subset(rows).save(tmp_path / name)
    engines.build(tmp_path / "some", "exact", tmp_path / "i")
    reseal(tmp_path / "rest", lambda record: record["extra"].update(max_length=16))
    with pytest.raises(InputError, match=f"the max_length is 16, that of .* is {MAX_LENGTH}"):
        updates.add(tmp_path / "i", tmp_path / "rest")
