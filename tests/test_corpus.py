"""Collections, judgements and negatives: each layout read, each kind of bad input named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

from lexmae.data import corpus as c
from lexmae.data.hub import HubDataset
from lexmae.data.qrels import QRELS_HEADER
from lexmae.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def beir(folder: Path, corpus: str | None = None, queries: str | None = None, **qrels: str) -> Path:
    """A small BEIR folder; parts can be replaced."""
    (folder / "qrels").mkdir(parents=True)
    docs = '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": 2, "text": "two"}\n'
    (folder / "corpus.jsonl").write_text(docs if corpus is None else corpus)
    rows = '{"_id": "q1", "text": "what"}\n{"_id": "q2", "text": "who"}\n{"_id": "q3", "text": "unjudged"}\n'
    (folder / "queries.jsonl").write_text(rows if queries is None else queries)
    for split, text in (qrels or {"dev": "q2\td1\t1\n", "train": "q1\t2\t1\nq1\td1\t0\n"}).items():
        (folder / "qrels" / f"{split}.tsv").write_text(QRELS_HEADER + "\n" + text)
    return folder


def marco(folder: Path, full: bool = False) -> Path:
    """A small MS MARCO folder, titled by a second file or in `fullpsgs.tsv`."""
    folder.mkdir()
    if full:
        (folder / "fullpsgs.tsv").write_text("0\tTitle 0\tzero\n1\t\tone\n")
    else:
        (folder / "collection.tsv").write_text("0\tzero\n1\tone\n2\ttwo\n")
        (folder / "collection.tsv.title.tsv").write_text("2\tTitle 2\n0\tTitle 0\n")
    (folder / "train.query.txt").write_text("10\tten\n11\televen\n")
    (folder / "queries.dev.small.tsv").write_text("12\ttwelve\n")
    (folder / "qrels.train.tsv").write_text("10 0 1 1\n11\t0\t0\t1\n")
    return folder


def error(action, *parts) -> str:
    """The message of the InputError that the action raises."""
    with pytest.raises(InputError) as caught:
        result = action(*parts)
        list(result if result is not None else [])
    return str(caught.value)


def test_beir_folder(tmp_path):
    found = c.Corpus.open(beir(tmp_path / "b"))
    assert list(found.passages()) == [c.Passage("d1", "T", "one"), c.Passage("2", "", "two")]
    assert found.splits() == ["dev", "train"]
    assert list(found.queries("train")) == [c.Query("q1", "what")]
    assert list(found.queries("dev")) == [c.Query("q2", "who")]
    assert found.qrels("train") == {"q1": {"2": 1, "d1": 0}}
    assert found.size_hint() == 2
    assert "no split 'test'; there are: dev, train" in error(found.qrels, "test")


def test_beir_folder_without_judgements_has_one_split(tmp_path):
    folder = beir(tmp_path / "b")
    for file in (folder / "qrels").iterdir():
        file.unlink()
    found = c.Corpus.open(folder)
    assert found.splits() == [c.ALL] and found.qrels(c.ALL) is None
    assert [query.id for query in found.queries(c.ALL)] == ["q1", "q2", "q3"]
    (folder / "queries.jsonl").unlink()
    assert found.splits() == [] and len(list(found.passages())) == 2


def test_marco_folder(tmp_path):
    found = c.Corpus.open(marco(tmp_path / "m"))
    titles = {passage.id: passage.title for passage in found.passages()}
    assert titles == {"0": "Title 0", "1": "", "2": "Title 2"}
    assert found.splits() == ["dev.small", "train"]
    assert list(found.queries("train")) == [c.Query("10", "ten"), c.Query("11", "eleven")]
    assert found.qrels("train") == {"10": {"1": 1}, "11": {"0": 1}} and found.qrels("dev.small") is None


def test_marco_full_passages_and_gzip(tmp_path):
    folder = marco(tmp_path / "m", full=True)
    plain = folder / "fullpsgs.tsv"
    (folder / "fullpsgs.tsv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    found = c.Corpus.open(folder)
    assert list(found.passages()) == [c.Passage("0", "Title 0", "zero"), c.Passage("1", "", "one")]
    assert found.size_hint() is None


def documents(folder: Path) -> Path:
    """A small folder of MS MARCO documents under the official names."""
    folder.mkdir()
    rows = "D1\thttp://a\tOne\tfirst body\nD2\thttp://b\t\tsecond\nD3\t\tThree\t\n"
    (folder / "msmarco-docs.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    for split, qid in (("train", 3), ("dev", 4)):
        (folder / f"msmarco-doc{split}-queries.tsv").write_text(f"{qid}\twhat is {qid}\n")
        (folder / f"msmarco-doc{split}-qrels.tsv").write_text(f"{qid} 0 D{qid - 1} 1\n")
    (folder / "msmarco-doctrain-top100.gz").write_bytes(gzip.compress(b"3 Q0 D3 1 -5.1 Indri\n3 Q0 D1 2 -5.2 Indri\n"))
    return folder


def test_marco_documents(tmp_path):
    found = c.Corpus.open(documents(tmp_path / "m"))
    assert list(found.passages()) == [c.Passage("D1", "One", "first body"), c.Passage("D2", "", "second"),
                                      c.Passage("D3", "Three", "")]
    assert (found.title_only, found.empty, found.splits()) == (1, 0, ["dev", "train"])
    assert list(found.queries("train")) == [c.Query("3", "what is 3")]
    assert found.qrels("train") == {"3": {"D2": 1}} and found.qrels("dev") == {"4": {"D3": 1}}
    (row,) = c.read_negatives(tmp_path / "m" / "msmarco-doctrain-top100.gz")
    assert (row.qid, row.negatives) == ("3", ["D3", "D1"])
    with pytest.raises(InputError, match="no split 'test'; there are: dev, train"):
        found.qrels("test")


def test_bad_marco_documents(tmp_path):
    folder = documents(tmp_path / "m")
    (folder / "msmarco-docs.tsv.gz").unlink()
    (folder / "msmarco-docs.tsv").write_text("D1\tu\tOne\tbody\nD2\tu\tno body\n")
    assert "msmarco-docs.tsv:2: expected 4 tab-separated columns (docid, url, title, body), found 3" in error(
        c.Corpus.open(folder).passages)
    (folder / "msmarco-docs.tsv").write_text("D1\tu\tOne\tbody\nD1\tu\tOne\tbody\n")
    assert "msmarco-docs.tsv:2: repeated document id 'D1'" in error(c.Corpus.open(folder).passages)
    (folder / "collection.tsv").write_text("0\tx\n")
    assert "holds both collection.tsv (passages) and msmarco-docs.tsv (documents)" in error(c.Corpus.open, folder)


def test_titles_must_belong_to_the_collection(tmp_path):
    folder = marco(tmp_path / "m")
    (folder / "collection.tsv.title.tsv").write_text("0\tA\n7\tB\n")
    assert "title.tsv:2: title of unknown" in error(c.Corpus.open(folder).passages)
    (folder / "collection.tsv.title.tsv").write_text("1\tA\n1\tB\n")
    assert "title.tsv:2: repeated document id '1'" in error(c.Corpus.open(folder).passages)


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\x85c\x1cd\x0be\u00a0"
    line = json.dumps({"_id": "x", "title": "", "text": text}, ensure_ascii=False)
    folder = beir(tmp_path / "b", corpus="")
    (folder / "corpus.jsonl").write_bytes("\ufeff".encode() + line.encode() + b"\r\n\r\n")
    assert list(c.Corpus.open(folder).passages()) == [c.Passage("x", "", text)]
    crlf = marco(tmp_path / "m")
    (crlf / "collection.tsv").write_bytes(b"0\tzero\rstill\r\n1\tone\r\n2\tt\xe2\x80\xa8wo")
    assert [passage.text for passage in c.Corpus.open(crlf).passages()] == ["zero\rstill", "one", "t\u2028wo"]


def test_documents_without_text_are_kept_and_counted(tmp_path):
    rows = [
        {"_id": "a", "title": "T", "text": " "},
        {"_id": "b", "title": "", "text": ""},
        {"_id": "c", "text": "x"},
    ]
    found = c.Corpus.open(beir(tmp_path / "b", corpus="".join(json.dumps(row) + "\n" for row in rows)))
    for _ in range(2):
        assert len(list(found.passages())) == 3
        assert (found.title_only, found.empty) == (1, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"_id": "d1", "text": "again"}', "repeated document id 'd1'"),
        ('{"_id": 2.5, "text": "x"}', "document id must be a string, found a fractional number"),
        ('{"_id": true, "text": "x"}', "document id must be a string, found a truth value"),
        ('{"text": "x"}', "document id is missing"),
        ('{"_id": "", "text": "x"}', "document id is empty"),
        ('{"_id": "a b", "text": "x"}', "document id 'a b' contains white space"),
        ('{"_id": "e"}', 'no "text" in this object'),
        ('{"_id": "e", "text": ["x"]}', "text must be a string, found a list"),
        ('{"_id": "e", "text": "x"', "invalid JSON at column 25"),
        ('["e"]', "expected a JSON object, found a list"),
        ('{"_id": "e", "text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_document_lines(tmp_path, line, reason):
    folder = beir(tmp_path / "b", corpus='{"_id": "d1", "text": "one"}\n\n' + line + "\n")
    message = error(c.Corpus.open(folder).passages)
    assert message.startswith(f"{folder / 'corpus.jsonl'}:3: ") and reason in message


def test_bad_bytes_and_broken_gzip(tmp_path):
    folder = beir(tmp_path / "b")
    good = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").write_bytes(good + b'{"_id": "\xff"}\n')
    assert f"{folder / 'corpus.jsonl'}:3: not UTF-8: byte 0xff at column 10" in error(
        c.Corpus.open(folder).passages
    )
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(good)[:-9])
    assert "corpus.jsonl.gz: broken gzip file" in error(c.Corpus.open(folder).passages)


def test_bad_tsv_queries_and_empty_files(tmp_path):
    folder = marco(tmp_path / "m")
    (folder / "collection.tsv").write_text("0\tzero\n1 one\n")
    message = error(c.Corpus.open(folder).passages)
    assert "collection.tsv:2: expected 2 tab-separated columns (pid, text), found 1" in message
    (folder / "train.query.txt").write_text("10\tten\n11\t \n")
    assert "train.query.txt:2: query '11' is empty" in error(c.Corpus.open(folder).queries, "train")
    (folder / "train.query.txt").write_text("10\tten\n10\televen\n")
    assert "train.query.txt:2: repeated query id '10'" in error(c.Corpus.open(folder).queries, "train")
    (folder / "train.query.txt").write_text("")
    assert "no queries in split 'train'" in error(c.Corpus.open(folder).queries, "train")
    assert "no documents" in error(c.Corpus.open(beir(tmp_path / "b", corpus="\n")).passages)


def test_judged_query_that_is_unknown(tmp_path):
    folder = beir(tmp_path / "b", dev="q2\td1\t1\nq9\td1\t1\n")
    assert (
        error(c.Corpus.open(folder).queries, "dev") == f"{folder / 'qrels' / 'dev.tsv'}:3: unknown query 'q9'"
    )


def test_open_tells_the_layouts_apart(tmp_path):
    assert "neither a BEIR folder" in error(c.Corpus.open, tmp_path)
    assert "no such folder, and no dataset name" in error(c.Corpus.open, str(tmp_path / "absent"))
    assert isinstance(c.Corpus.open("owner/name"), HubDataset)
    both = beir(tmp_path / "b")
    assert "is a file" in error(c.Corpus.open, both / "corpus.jsonl")
    (both / "collection.tsv").write_text("0\tzero\n")
    assert "holds both corpus.jsonl (BEIR) and collection.tsv" in error(c.Corpus.open, both)


@pytest.mark.parametrize(
    "text",
    [
        "1 0 a 1\n1 0 b 0\n",
        "1\t0\ta\t1\n1\t0\tb\t0",
        "query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\t0\n",
        "1 a 1\n1 b 0\n",
    ],
)
def test_read_qrels_layouts(tmp_path, text):
    (tmp_path / "q").write_text(text)
    assert c.read_qrels(tmp_path / "q") == {"1": {"a": 1, "b": 0}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1 0 a 1\n1 a\n", "q:2: expected `qid 0 pid rel`"),
        ("1 0 a 1\n1 0 b yes\n", "q:2: relevance 'yes' is not a whole number"),
        ("1 0 a 1\n1 0 a 2\n", "q:2: query '1', document 'a': judged 1 before, 2 here"),
        ("query-id\tcorpus-id\tscore\n", "q: no judgements"),
    ],
)
def test_bad_qrels(tmp_path, text, reason):
    (tmp_path / "q").write_text(text)
    assert reason in error(c.read_qrels, tmp_path / "q")


def test_written_folder_reads_back(tmp_path):
    passages = [c.Passage("a\u00a0b", "", 'quote " and \u2028'), c.Passage("2", "é", "")]
    queries = [c.Query("q", "tab\there")]
    qrels = {"dev": {"q": {"2": 1, "a\u00a0b": -1}}}
    c.write_beir(tmp_path / "w", passages, queries, qrels)
    found = c.Corpus.open(tmp_path / "w")
    assert list(found.passages()) == passages and list(found.queries("dev")) == queries
    assert found.qrels("dev") == qrels["dev"]

    def failing():
        yield passages[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        c.write_beir(tmp_path / "f", failing(), queries, qrels)
    assert sorted(os.listdir(tmp_path)) == ["w"]


def test_shared_collection_agrees_with_csv_and_json():
    folder = SHARED / "squad-small"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    found = c.Corpus.open(folder)
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().split("\n") if line]
    assert [(p.id, p.title, p.text) for p in found.passages()] == [
        (r["_id"], r["title"], r["text"]) for r in rows
    ]
    with open(folder / "qrels" / "dev.tsv", newline="") as file:
        judged = [(row["query-id"], row["corpus-id"]) for row in csv.DictReader(file, delimiter="\t")]
    assert [(q, d) for q, docs in found.qrels("dev").items() for d in docs] == judged
    assert {query.id for query in found.queries("dev")} == {q for q, _ in judged}


def hub(folder: Path) -> HubDataset:
    """A dataset folder of the hub's shape, with its `-qrels` sibling."""
    import yaml

    def dataset(path: Path, configs: list[dict], **files: list[dict]) -> None:
        path.mkdir(parents=True)
        for name, rows in files.items():
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")

    parts = [
        {"config_name": n, "data_files": [{"split": n, "path": f"{n}.jsonl"}]} for n in ("corpus", "queries")
    ]
    dataset(folder / "name", parts,
            corpus=[{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}],
            queries=[{"_id": "7", "text": "what"}, {"_id": "8", "text": "who"}])  # fmt: skip
    splits = {"config_name": "default", "data_files": [{"split": "test", "path": "test.jsonl"}]}
    dataset(folder / "name-qrels", [splits], test=[{"query-id": 7, "corpus-id": "d2", "score": 1}])
    return HubDataset(str(folder / "name"))


@pytest.mark.slow
def test_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = hub(tmp_path / "owner")
    assert [passage.id for passage in found.passages()] == ["d1", "d2"]
    assert found.splits() == ["test"] and found.qrels("test") == {"7": {"d2": 1}}
    assert list(found.queries("test")) == [c.Query("7", "what")]


def negatives(path: Path, text: str) -> list:
    """Rows of a file with this text."""
    path.write_text(text)
    return list(c.read_negatives(path))


def test_negatives_own_format_reads_back(tmp_path):
    rows = [("q1", ["a", "b"], [1.5, -2.0], {"p": 3.0}, None), ("q2", [], None, None, None),
            ("q3", ["c"], None, None, ["p#1"])]
    c.write_negatives(tmp_path / "n.jsonl", rows)
    assert list(c.read_negatives(tmp_path / "n.jsonl")) == rows
    with pytest.raises(ValueError, match="2 negatives but 1 scores"):
        c.write_negatives(tmp_path / "m.jsonl", [("q", ["a", "b"], [1.0])])
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("positives", [["p"], {"p": "high"}, {"": 1.0}, {"p": None}])
def test_scores_of_positives_are_checked(tmp_path, positives):
    path = tmp_path / "n.jsonl"
    path.write_text(json.dumps({"qid": "q", "negatives": ["a"], "positives": positives}))
    assert "n.jsonl:1: " in error(c.read_negatives, path)


@pytest.mark.parametrize("passages", ["p#1", [None], [""], {"p": "p#1"}])
def test_best_passages_are_checked(tmp_path, passages):
    path = tmp_path / "n.jsonl"
    path.write_text(json.dumps({"qid": "q", "negatives": ["a"], "passages": passages}))
    assert "n.jsonl:1: " in error(c.read_negatives, path)


def test_negatives_of_ms_marco(tmp_path):
    assert negatives(tmp_path / "train.negatives.tsv", "1\t5,6\n2\t7\n") == [
        ("1", ["5", "6"], None, None, None),
        ("2", ["7"], None, None, None),
    ]
    text = "1\t5\tq\tp\n2\t6\tq\tp\n1\t4\tq\tp\n"
    assert negatives(tmp_path / "top1000.dev", text) == [
        ("1", ["5", "4"], None, None, None), ("2", ["6"], None, None, None)]


def test_negatives_of_a_run_are_ordered_by_score_then_id(tmp_path):
    text = "1 Q0 c 3 1.0 t\n2 Q0 z 1 9 t\n1 Q0 b 2 2e0 t\n1 Q0 a 1 1.0 t\n"
    assert negatives(tmp_path / "run.trec", text) == [
        ("1", ["b", "a", "c"], None, None, None), ("2", ["z"], None, None, None)]


def test_negatives_of_sentence_transformers(tmp_path):
    plain = {"qid": 1, "pos": [9], "neg": {"bm25": [5, 9, 6], "dense": [7, 5]}}
    scored = {"qid": 2, "pos": [], "neg": {"x": [{"pid": 3, "ce-score": 0.5}, {"pid": 4, "ce-score": -1}]}}
    path = tmp_path / "msmarco-hard-negatives.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, (plain, scored))).encode()))
    assert list(c.read_negatives(path)) == [
        ("1", ["5", "7", "6"], None, None, None), ("2", ["3", "4"], [0.5, -1.0], None, None)]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_negatives_pickle(tmp_path, protocol):
    path = tmp_path / "qid2negatives.pkl"
    path.write_bytes(pickle.dumps({1: [5, "6"], "2": [(7, 0.5)], 3: {"8": 1.0}}, protocol))
    rows = [("1", ["5", "6"], None, None, None), ("2", ["7"], None, None, None), ("3", ["8"], None, None, None)]
    assert list(c.read_negatives(path)) == rows


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_no_code(tmp_path, protocol):
    path = tmp_path / "n.pkl"
    path.write_bytes(pickle.dumps({1: [Harmful(str(tmp_path / "harm"))]}, protocol))
    message = error(c.read_negatives, path)
    assert "only dict, list, tuple, int, float and str are admitted" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "value", [{1: {5}}, {1: [b"5"]}, {1: [True]}, [1], {1: 5}, {(1,): [5]}, {1: [None]}, {1: [1.5]}]
)
def test_pickles_of_another_shape(tmp_path, value):
    (tmp_path / "n.pkl").write_bytes(pickle.dumps(value))
    assert "n.pkl: " in error(c.read_negatives, tmp_path / "n.pkl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "n: the file is empty"),
        ("one two three\n", "n:1: unknown format of negatives"),
        ('{"qid": "1", "negatives": ["a"]}\n{"qid": "1", "negatives": []}\n', "n:2: repeated query '1'"),
        ('{"qid": "1", "negatives": ["a"], "scores": []}\n', "n:1: scores: expected one for each of 1"),
        ('{"qid": "1", "negatives": ["a"], "scores": ["x"]}\n', "n:1: score 'x' is not a finite number"),
        ('{"qid": "1", "negatives": ["a"], "scores": [NaN]}\n', "n:1: score nan is not a finite number"),
        ('{"qid": "1"}\n', 'n:1: expected a list "negatives"'),
        ('{"negatives": []}\n', "n:1: qid is missing"),
        ("1\t5,6\n2 7\n", "n:2: expected 2 tab-separated columns"),
        ("1\t5,,6\n", "n:1: document id is empty"),
        ("1 Q0 a 1 2.0 t\n1 Q0 a 2 1.0 t\n", "n:2: repeated document 'a' for query '1'"),
        ("1 Q0 a 1 2.0 t\n1 Q0 b 2\n", "n:2: expected `qid Q0 docid rank score tag`"),
    ],
)
def test_bad_negatives(tmp_path, text, reason):
    assert reason in error(negatives, tmp_path / "n", text)


def test_documents_alone_are_a_collection(tmp_path):
    c.write_beir(tmp_path / "beir", [c.Passage("d", "", "text")], [], {})
    found = c.Corpus.open(tmp_path / "beir")
    assert list(found.passages()) == [c.Passage("d", "", "text")] and found.splits() == []
