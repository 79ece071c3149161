"""From a collection to shards: what is written, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lexmae import artifact
from lexmae.data import corpus as c
from lexmae.data import tokenizer as tok
from lexmae.data.prepare import describe_lengths
from lexmae.data.shards import Shards, prepare
from lexmae.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
PASSAGES = [
    c.Passage("d1", "Foxes", "The quick brown fox jumps over the lazy dog."),
    c.Passage("d2", "", "Untitled, and rather longer than the limit of twenty tokens that is set for it here."),
    c.Passage("d3", "Only a title", ""),
    c.Passage("d4", "", ""),
    c.Passage("77", "Numbers", "one two three [SEP] four"),
]
QUERIES = [c.Query("q1", "which animal jumps?"), c.Query("q2", "numbers"), c.Query("q3", "a title " * 20)]
QRELS = {"dev": {"q3": {"d3": 1}}, "train": {"q2": {"77": 2, "d4": 0}, "q1": {"d1": 1}}}


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """The passages above as a BEIR folder."""
    folder = tmp_path_factory.mktemp("input") / "beir"
    c.write_beir(folder, PASSAGES, QUERIES, QRELS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """The folder of a small WordPiece."""
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    tok.train(lambda: [f"{p.title} {p.text}" for p in PASSAGES] * 3, 200).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def shards(collection, tokenizer, tmp_path_factory) -> Shards:
    """The collection in files of two documents, cut to 20 and 8 tokens."""
    output = tmp_path_factory.mktemp("output") / "shards"
    prepare(collection, output, tokenizer=tokenizer, max_length=20, query_length=8, shard_size=2)
    return Shards.open(output)


def test_rows_are_what_the_tokenizer_gives(shards, tokenizer):
    plain = tok.load(tokenizer)
    titles, texts = [p.title or "-" for p in PASSAGES], [p.text for p in PASSAGES]
    options = dict(truncation="longest_first", split_special_tokens=True)
    expected = plain(titles, texts, max_length=20, **options)
    assert shards.docs.ids() == [p.id for p in PASSAGES]
    assert [shards.docs.tokens(row).tolist() for row in range(5)] == expected["input_ids"]
    assert [shards.docs.first_length(row) for row in range(5)] == [t.count(0) for t in expected["token_type_ids"]]
    queries = plain([q.text for q in QUERIES], max_length=8, **options)["input_ids"]
    assert shards.queries("train").ids() == ["q1", "q2"] and shards.queries("dev").ids() == ["q3"]
    assert [shards.queries("train").tokens(row).tolist() for row in range(2)] == queries[:2]
    assert shards.queries("dev").tokens(0).tolist() == queries[2]
    assert shards.queries("dev").first_length(0) == 8


def test_shards_describe_themselves(shards, tokenizer):
    plain, extra = tok.load(tokenizer), shards.manifest.extra
    assert shards.vocab_size == len(plain) and shards.token_type_ids is True
    assert shards.special == tok.SpecialIds(cls=2, sep=3, pad=0, mask=4, unk=1, bos=2, eos=3)
    assert extra["tokenizer_hash"] == tok.fingerprint(tok.load(shards.tokenizer_dir)) == tok.fingerprint(plain)
    assert (extra["max_length"], extra["query_length"], extra["token_dtype"]) == (20, 8, "uint16")
    assert shards.splits == ["dev", "train"] and shards.qrels("train") == QRELS["train"]
    assert len(list(shards.path.glob("docs-*.arrow"))) == 3
    names = plain.convert_ids_to_tokens(range(len(plain)))
    assert shards.word_starts().tolist() == [not name.startswith("##") for name in names]
    counts = shards.manifest.counts
    assert (counts["documents"], counts["title_only"], counts["empty"], counts["judgements.train"]) == (5, 1, 1, 3)
    assert extra["lengths"]["docs"]["max"] == 20 and extra["lengths"]["docs"]["truncated"] == 0.2
    assert extra["lengths"]["queries-dev"]["truncated"] == 1.0
    artifact.verify(shards.path)
    with pytest.raises(InputError, match="has no queries of the split 'test'; it has dev, train"):
        shards.queries("test")
    again = pickle.loads(pickle.dumps(shards))
    assert again.docs.rows(["77"]).tolist() == shards.docs.rows(["77"]).tolist() == [4]


def test_reading_needs_neither_torch_nor_transformers(shards):
    code = (
        "import sys; from lexmae.data.shards import Shards; s = Shards.open(sys.argv[1]);"
        "s.docs.pad_batch([0, 1], s.special.pad); s.qrels('dev'); s.word_starts();"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(shards.path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_length_statistics():
    lengths = np.arange(1, 101, dtype=np.int32)
    found = describe_lengths(lengths, 25)
    assert found == {"rows": 100, "mean": 50.5, "p50": 50.5, "p95": 95.05, "max": 100, "truncated": 0.25}


def test_ms_marco_folder(tmp_path, tokenizer):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "collection.tsv").write_text("0\tthe quick fox\n1\tthe lazy dog\n")
    (folder / "collection.tsv.title.tsv").write_text("0\tFoxes\n1\t-\n")
    (folder / "dev.query.txt").write_text("9\twhich dog\n")
    (folder / "qrels.dev.tsv").write_text("9 0 1 1\n")
    (folder / "train.query.txt").write_text("8\twhich fox\n")
    prepare(folder, tmp_path / "s", tokenizer=tokenizer)
    found, plain = Shards.open(tmp_path / "s"), tok.load(tokenizer)
    rows = [plain.decode(found.docs.tokens(row)) for row in range(2)]
    assert rows == ["[CLS] foxes [SEP] the quick fox [SEP]", "[CLS] - [SEP] the lazy dog [SEP]"]
    assert found.qrels("dev") == {"9": {"1": 1}} and found.qrels("train") == {} and found.splits == ["dev", "train"]


@pytest.mark.parametrize(
    ("split", "line", "reason"),
    [
        ("train", "q1\tabsent\t1\nq2\tgone\t1\n", "judgement of an unknown document 'absent' (and 1 more such lines)"),
        ("dev", "q9\td1\t1\n", "unknown query 'q9'"),
        ("dev", "q3\td3\t0\n", "judged 1 before, 0 here"),
    ],
)
def test_wrong_judgements_leave_nothing(tmp_path, collection, tokenizer, split, line, reason):
    folder = tmp_path / "b"
    c.write_beir(folder, PASSAGES, QUERIES, QRELS)
    path = folder / "qrels" / f"{split}.tsv"
    before = path.read_text()
    path.write_text(before + line)
    with pytest.raises(InputError) as caught:
        prepare(folder, tmp_path / "s", tokenizer=tokenizer)
    assert str(caught.value) == f"{path}:{before.count(chr(10)) + 1}: {caught.value.reason}"
    assert reason in caught.value.reason
    assert os.listdir(tmp_path) == ["b"]


def test_settings_are_checked(tmp_path, collection, tokenizer):
    output = tmp_path / "s"
    for both in ({}, {"tokenizer": tokenizer, "train_tokenizer": 100}):
        with pytest.raises(InputError, match="either a tokenizer or the number of entries"):
            prepare(collection, output, **both)
    for wrong, reason in (
        ({"max_length": 4}, "maximum length 4: must be between 5 and 65535"),
        ({"max_length": 513}, "maximum length 513: the tokenizer is made for at most 512"),
        ({"query_length": 1}, "query length 1: must be between"),
        ({"workers": 0}, "0 workers"),
        ({"shard_size": 0}, "0 documents per file"),
    ):
        with pytest.raises(InputError, match=reason):
            prepare(collection, output, tokenizer=tokenizer, **wrong)
    assert os.listdir(tmp_path) == []


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    line = [sys.executable, str(ROOT / "tools" / "prepare.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def main(*arguments: str) -> None:
    """Run the command line here."""
    runpy.run_path(str(ROOT / "tools" / "prepare.py"))["main"]([str(argument) for argument in arguments])


def test_command_reports_what_it_wrote(tmp_path, collection, tokenizer, capsys):
    main("--input", collection, "--output", tmp_path / "s", "--tokenizer", tokenizer, "--max-length", 20)
    out, err = capsys.readouterr()
    assert "docs: 5 rows" in out and "cut 20.0%" in out and "judgements.train: 3" in out
    assert "1 documents have a title and no text" in err and "1 documents have neither" in err


def test_command_trains_what_the_text_supports(tmp_path, collection, capsys):
    main("--input", collection, "--output", tmp_path / "s", "--train-tokenizer", 3000)
    found = Shards.open(tmp_path / "s")
    assert found.vocab_size < 200 and found.special.pad == 0
    assert f"the text supports only {found.vocab_size} of 3000 entries" in capsys.readouterr().err


@pytest.mark.parametrize("choice", [[], ["--tokenizer", "t", "--train-tokenizer", "100"]])
def test_command_wants_one_tokenizer(tmp_path, collection, choice, capsys):
    with pytest.raises(SystemExit) as caught:
        main("--input", collection, "--output", tmp_path / "s", *choice)
    assert caught.value.code == 2 and "--train-tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_command_fails_with_one_line(tmp_path, collection, tokenizer):
    done = command("--input", tmp_path / "absent", "--output", tmp_path / "s", "--tokenizer", tokenizer)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'absent'}: no such folder, and no dataset name of the form owner/name"
    )


@pytest.mark.slow
def test_output_does_not_depend_on_the_workers(tmp_path, collection):
    written = []
    for workers in (1, 2):
        done = command("--input", collection, "--output", tmp_path / str(workers), "--train-tokenizer", "120",
                       "--workers", str(workers))  # fmt: skip
        assert done.returncode == 0, done.stderr
        written.append(json.loads((tmp_path / str(workers) / "manifest.json").read_text())["fingerprint"])
    assert written[0] == written[1]


@pytest.mark.slow
def test_shared_cranfield(tmp_path):
    if not (SHARED / "cranfield").is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    prepare(SHARED / "cranfield", tmp_path / "s", train_tokenizer=2000)
    found = Shards.open(tmp_path / "s")
    assert (len(found.docs), len(found.queries("test")), found.manifest.counts["empty"]) == (1400, 225, 2)
    assert sum(map(len, found.qrels("test").values())) == 1612 and found.vocab_size == 2000
    text = tok.load(found.tokenizer_dir).decode(found.docs.tokens(0))
    title = "experimental investigation of the aerodynamics of a wing in a slipstream."
    assert text.startswith(f"[CLS] {title} [SEP] an experimental study")
