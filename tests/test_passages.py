"""Long documents: windows against the tokenizer itself, rows by document, training and search on top of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import LONG_LENGTH, LONG_STRIDE
from test_shards import FAMILIES, TEXTS, TITLES, split_rows

from lexmae import artifact
from lexmae.config import NegativesConfig, NegativeSource
from lexmae.data import draws, negative_rows, passages
from lexmae.data import tokenizer as tok
from lexmae.data.batches import RankingData
from lexmae.data.corpus import Passage, Query, write_beir
from lexmae.data.negatives import Row, write_negatives
from lexmae.data.randomness import KeyedRandom
from lexmae.data.shards import Shards, prepare
from lexmae.errors import InputError
from lexmae.retrieval import anserini, engines, maxp, metrics
from lexmae.retrieval.mining import Statistics, mine_run
from lexmae.retrieval.runs import Run
from lexmae.retrieval.vectors import SparseVectors, quantise

TOOLS = Path(__file__).parents[1] / "tools"

def command(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------------- the windows


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Each kind of tokenizer."""
    return FAMILIES[request.param]()


def plain(tokenizer, text: str) -> list[int]:
    """Ids of a text alone; ids of special tokens in it become the unknown token."""
    special = tok.special_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [special.unk if i in special.structural else i for i in ids]


@pytest.mark.parametrize("length, stride", [(16, 5), (33, 33), (40, 1), (144, 72)])
def test_windows_by_hand(family, length, stride):
    encoder = tok.TextEncoder(family)
    rows, counts = passages.windows(encoder, TITLES, TEXTS, length, stride)
    found, at = split_rows(rows), 0
    special, around = tok.special_ids(family), len(family("a", "a")["input_ids"]) - 2 * len(plain(family, "a"))
    for title, text, count in zip(TITLES, TEXTS, counts.tolist(), strict=True):
        title, text = plain(family, title if title.strip() else "-"), plain(family, text)
        room = length - around
        if len(title) + len(text) <= room:
            expected = [(title, text)]
        else:
            title = title[:max(room // 2, 1)]
            width, expected = room - len(title), []
            step, start = min(stride, room - len(title)), 0
            while True:
                expected.append((title, text[start:start + width]))
                if start + width >= len(text):
                    break
                start += step
        assert count == len(expected)
        for first, second in expected:
            assert found[at] == [special.cls, *first, *[special.sep] * (around - 2), *second, special.sep]
            assert len(found[at]) <= length
            at += 1
    assert at == len(found)


def test_documents_that_fit_are_what_they_are_unsplit(family):
    encoder = tok.TextEncoder(family)
    rows, counts = passages.windows(encoder, TITLES, TEXTS, 400, 200)
    whole = encoder.pairs(TITLES, TEXTS, 400)
    assert counts.tolist() == [1] * len(TEXTS) and split_rows(rows) == split_rows(whole)
    assert rows.first_lengths.tolist() == whole.first_lengths.tolist() and not rows.truncated.any()


def test_every_token_is_in_some_window_and_first_segments_are_titles():
    encoder = tok.TextEncoder(FAMILIES["bert"]())
    text = " ".join(TEXTS)
    for length, stride in ((12, 3), (20, 20), (31, 7)):
        rows, (count,) = passages.windows(encoder, ["Foxes"], [text], length, stride)
        ids, _ = encoder.plain([text])
        title, _ = encoder.plain(["Foxes"])
        seen, width = {}, length - 3 - len(title)
        for number, row in enumerate(split_rows(rows)):
            for i, token in enumerate(row[2 + len(title):-1]):
                seen[number * min(stride, width) + i] = token
        assert [seen[i] for i in range(len(ids))] == ids.tolist() and len(seen) == len(ids) and count > 3
        assert (rows.first_lengths == 2 + len(title)).all() and (rows.lengths <= length).all()


def test_names():
    assert passages.passage_id("D1", 12) == "D1#12"
    assert [passages.document_of(name) for name in ("D1#12", "D#1#0", "C#", "x#y", "plain")] == [
        "D1", "D#1", "C#", "x#y", "plain"]
    for good in ("C#", "x#y", "#", "a#1b", "D#-1"):
        passages.check_document_id(good, "folder")
    for bad in ("D1#0", "#3", "a#1#22"):
        with pytest.raises(InputError, match="folder: document id .* ends like the number of a passage"):
            passages.check_document_id(bad, "folder")


# ------------------------------------------------------------------------------------------------- the shards


def test_rows_of_documents(long_shards):
    docs, documents = long_shards.docs, long_shards.documents
    names = docs.ids()
    assert len(documents) == 12 and len(docs) == long_shards.manifest.counts["passages"] > 24
    assert long_shards.manifest.counts["documents"] == 12 and long_shards.manifest.config["stride"] == LONG_STRIDE
    assert list(dict.fromkeys(name.partition("#")[0] for name in names)) == [f"D{i}" for i in range(12)]
    for i in range(12):
        own = [row for row, name in enumerate(names) if name.startswith(f"D{i}#")]
        assert [names[row] for row in own] == [f"D{i}#{n}" for n in range(len(own))]
        assert documents.rows(np.array([i])).tolist() == own and documents.sizes(np.array([i])).tolist() == [len(own)]
        assert documents.numbers([f"D{i}"]).tolist() == [i] and documents.ids(np.array([i])) == [f"D{i}"]
    assert documents.rows(np.array([4, 0]), "first").tolist() == [names.index("D4#0"), 0]
    assert documents.contains(["D3", "D3#0", "D99", "D"]).tolist() == [True, False, False, False]
    assert (docs.lengths <= LONG_LENGTH).all() and long_shards.manifest.extra["lengths"]["docs"]["truncated"] == 0
    with pytest.raises(InputError, match="unknown document 'D77'"):
        documents.numbers(["D1", "D77", "D78"])
    artifact.verify(long_shards.path)


def test_lists_may_name_documents_and_passages(long_shards):
    names, documents = long_shards.docs.ids(), long_shards.documents
    found = documents.rows_named(["D2", "D4#1", "D1", "D4#0", "D1#2", "D2"], "first")[0]
    assert [names[row] for row in found] == ["D2#0", "D4#1", "D1#0", "D4#0", "D1#2"]
    found = documents.rows_named(["D4#1", "D4", "D0"], "all")[0]
    count = sum(name.startswith("D4#") for name in names)
    assert [names[row] for row in found] == ["D4#1", *(f"D4#{n}" for n in range(count) if n != 1), "D0#0"]
    assert documents.rows_named([])[0].tolist() == []
    with pytest.raises(InputError, match="unknown document 'D4#99'"):
        documents.rows_named(["D4#99"])


def test_unsplit_documents_are_their_rows(tiny_shards):
    documents = tiny_shards.documents
    assert len(documents) == 41 and not tiny_shards.split_documents
    assert documents.rows_named(["d3", "d1"])[0].tolist() == documents.numbers(["d3", "d1"]).tolist() == [3, 1]
    assert documents.rows(np.array([5]), "first").tolist() == [5] and documents.sizes(np.array([5])).tolist() == [1]
    assert documents.ids(np.array([5])) == ["d5"] and documents.contains(["d5", "x"]).tolist() == [True, False]


@pytest.mark.parametrize("wrong, reason", [
    ({"stride": 5}, "a stride goes with splitting"),
    ({"split_documents": True, "stride": 0}, "stride 0: must be between 1 and the maximum length 28"),
    ({"split_documents": True, "stride": 29}, "stride 29: must be"),
])
def test_a_wrong_stride_is_refused(long_dir, tmp_path, wrong, reason):
    with pytest.raises(InputError, match=reason):
        prepare(long_dir, tmp_path / "s", train_tokenizer=140, max_length=28, **wrong)
    assert not list(tmp_path.iterdir())


def test_ids_that_look_like_passages_and_unknown_judgements_leave_nothing(tmp_path):
    options = {"train_tokenizer": 100, "split_documents": True}
    query, judged = [Query("q", "foxes")], {"dev": {"q": {"C#7": 1}}}
    write_beir(tmp_path / "b", [Passage("C#7", "", "a fox")], query, judged)
    with pytest.raises(InputError, match="b: document id 'C#7' ends like the number of a passage"):
        prepare(tmp_path / "b", tmp_path / "s", **options)
    write_beir(tmp_path / "c", [Passage("C", "", "a fox")], query, {"dev": {"q": {"C#0": 1}}})
    with pytest.raises(InputError, match="dev.tsv:2: judgement of an unknown document 'C#0'"):
        prepare(tmp_path / "c", tmp_path / "s", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_command(long_dir, tmp_path, capsys):
    command("prepare", "--input", long_dir, "--output", tmp_path / "s", "--train-tokenizer", 140, "--max-length", 28,
            "--split-documents")
    manifest = Shards.open(tmp_path / "s").manifest
    assert manifest.config["split_documents"] and manifest.config["stride"] == 14
    assert f"12 documents in {manifest.counts['passages']} passages, stride 14" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ fine-tuning


def build(shards, folder, rows, which="first", depth=100):
    source = folder / "n.jsonl"
    write_negatives(source, ((query, names, None) for query, names in rows.items()))
    negative_rows.build(shards, "train", NegativesConfig(str(source or ""), depth=depth), folder / "lists", which)
    return draws.NegativeLists(folder / "lists")


def named(shards, rows) -> list[str]:
    return shards.docs.ids(np.asarray(rows).ravel())


@pytest.mark.parametrize("which", ["first", "all"])
def test_positives_are_first_or_all_passages(long_shards, tmp_path, which):
    lists = build(long_shards, tmp_path, {"t0": ["D5"]}, which)
    queries = long_shards.queries("train").ids()
    pairs = {(queries[q], long_shards.docs.id(d)) for q, d in lists.judged_pairs().tolist()}
    positive = {"t0": ("D0", "D1"), "t1": ("D4",), "t2": ("D8",)}
    expected = {(q, name) for q, docs in positive.items() for name in long_shards.docs.ids()
                if name.partition("#")[0] in docs and (which == "all" or name.endswith("#0"))}
    assert pairs == expected and (len(pairs) > 8) == (which == "all")
    judged = named(long_shards, lists.judged(queries.index("t1")))
    assert judged == [name for name in long_shards.docs.ids() if name.startswith("D4#")]  # all, in either case


def test_ranks_are_of_documents_however_many_passages_they_have(long_shards, tmp_path):
    ranked = ["D4", "D5", "D6", "D7", "D8"]  # of t1, whose positive is D4
    lists = build(long_shards, tmp_path, {"t1": ranked}, "all", depth=3)
    found = {name.partition("#")[0] for name in named(long_shards, lists._sources[0].rows)}
    assert found == {"D5", "D6", "D7"}


def with_best(shards, folder, sources: list[list[Row]], name="lists") -> draws.NegativeLists:
    files = [folder / f"{name}-{i}.jsonl" for i in range(len(sources))]
    for file, rows in zip(files, sources, strict=True):
        write_negatives(file, rows)
    config = NegativesConfig(sources=tuple(NegativeSource(str(file)) for file in files))
    negative_rows.build(shards, "train", config, folder / name, "best")
    return draws.NegativeLists(folder / name)


def test_the_best_ranked_passage_stands_for_a_positive(long_shards, tmp_path, capsys):
    """The first source that notes one decides; a document of which none does is its first passage."""
    near = [Row("t0", ["D9#1", "D4"], passages=["D1#2", "D2#1"]), Row("t1", ["D5"])]  # D2 is not judged
    far = [Row("t0", ["D6"], passages=["D1#1"]), Row("t2", ["D6"], passages=["D8#1"])]
    lists = with_best(long_shards, tmp_path, [near, far])
    queries = long_shards.queries("train").ids()
    pairs = {(queries[q], long_shards.docs.id(d)) for q, d in lists.judged_pairs().tolist()}
    assert pairs == {("t0", "D0#0"), ("t0", "D1#2"), ("t1", "D4#0"), ("t2", "D8#1")}
    assert "2 of 4 positives are their best ranked passage" in capsys.readouterr().err
    drawn = lists.draw(np.array([queries.index("t0")]), 40, KeyedRandom(1, np.arange(1)), 8)[0]
    assert set(named(long_shards, drawn)) == {"D9#1", "D4#0", "D6#0"}  # documents by their first


def test_a_teachers_score_of_a_document_is_that_of_its_best_passage(long_shards, tmp_path):
    row = Row("t1", ["D9#1"], [0.5], {"D4": 2.5}, ["D4#1"])
    lists = with_best(long_shards, tmp_path, [[row]])
    at = [long_shards.docs.id(d) for _, d in lists.judged_pairs().tolist()].index("D4#1")
    assert lists.pair_scores()[at] == 2.5


@pytest.mark.parametrize(("passages", "row", "reason"), [
    ("first", Row("t1", ["D9#1", "D6"], [0.5, 0.2], {"D4": 2.5}, ["D4#1"]), "'D6' .* tools/mine.py --passages"),
    ("best", Row("t1", ["D9#1", "D6"], [0.5, 0.2], {"D4": 2.5}, ["D4#1"]), "'D6' .* tools/mine.py --passages"),
    ("first", Row("t1", ["D9#1"], [0.5], {"D4": 2.5}), "'D4' .* 'passages: best' .* loss.teacher"),
])
def test_distillation_refuses_scores_of_passages_that_it_does_not_read(long_shards, tmp_path, passages, row, reason):
    write_negatives(tmp_path / "scored.jsonl", [row])
    config = NegativesConfig(str(tmp_path / "scored.jsonl"))
    with pytest.raises(InputError, match=f"scored.jsonl: query 't1': the score of {reason}"):
        negative_rows.build(long_shards, "train", config, tmp_path / "lists", passages, distil=True)
    negative_rows.build(long_shards, "train", config, tmp_path / "lists", passages)  # where nothing learns from them


def test_distillation_takes_scores_of_positive_passages(long_shards, tmp_path):
    """A passage's own score is its own, whichever passages stand for documents; strangers are passed over."""
    row = Row("t1", ["D9#1"], [0.5], {"D4#0": 2.5, "D4#1": 1.5, "stranger": 9.0})
    for which, expected in (("first", {"D4#0": 2.5}), ("all", {"D4#0": 2.5, "D4#1": 1.5})):
        write_negatives(tmp_path / "n.jsonl", [row])
        negative_rows.build(long_shards, "train", NegativesConfig(str(tmp_path / "n.jsonl")), tmp_path / which,
                            which, distil=True)
        lists = draws.NegativeLists(tmp_path / which)
        found = dict(zip(named(long_shards, lists.judged_pairs()[:, 1]), lists.pair_scores().tolist(), strict=True))
        assert found == expected


def test_a_documents_score_is_not_learned_from_a_passage_that_nothing_ranked(long_shards, tmp_path):
    """t1's positive has no best passage: its first one would get the score of the whole document."""
    rows = [Row("t0", ["D9#1"], [0.5], {"D1": 2.5}, ["D1#2"]), Row("t1", ["D9#1"], [0.5], {"D4": 1.5})]
    write_negatives(tmp_path / "n.jsonl", rows)
    config = NegativesConfig(str(tmp_path / "n.jsonl"))
    negative_rows.build(long_shards, "train", config, tmp_path / "lists", "best", distil=True)
    lists = draws.NegativeLists(tmp_path / "lists")
    assert named(long_shards, lists.judged_pairs()[:, 1]) == ["D1#2"] and lists.pair_scores().tolist() == [2.5]


def test_distillation_takes_scores_of_passages_and_of_documents_that_are_one(long_shards, tmp_path):
    whole = next(name for name in long_shards.documents.ids(np.arange(12)) if name != "D4" and
                 long_shards.documents.sizes(long_shards.documents.numbers([name]))[0] == 1)
    write_negatives(tmp_path / "n.jsonl", [Row("t1", ["D9#1", whole], [0.5, 0.2], {"D4": 2.5}, ["D4#1"])])
    negative_rows.build(long_shards, "train", NegativesConfig(str(tmp_path / "n.jsonl")), tmp_path / "lists", "best",
                        distil=True)
    lists = draws.NegativeLists(tmp_path / "lists")
    drawn = lists.draw(np.array([long_shards.queries("train").ids().index("t1")]), 40,
                       KeyedRandom(1, np.arange(1)), 8)[0]
    assert set(named(long_shards, drawn)) == {"D9#1", f"{whole}#0"}


def test_best_passages_that_nothing_notes_or_nobody_knows_are_refused(long_shards, tmp_path):
    with pytest.raises(InputError, match="lists-0.jsonl: passages: 'best' needs .* tools/mine.py --passages"):
        with_best(long_shards, tmp_path, [[Row("t1", ["D5"])]])
    with pytest.raises(InputError, match="D4#99"):
        with_best(long_shards, tmp_path, [[Row("t1", ["D5"], passages=["D4#99"])]], "other")


@pytest.mark.parametrize("which", ["first", "all"])
def test_no_passage_of_a_judged_document_is_a_negative(long_shards, tmp_path, which):
    lists = build(long_shards, tmp_path, {"t0": ["D1", "D1#2", "D9#1", "D0", "D4"], "t1": ["D4#1", "D2"]}, which)
    row = long_shards.queries("train").ids().index
    drawn = lists.draw(np.array([row("t0"), row("t1"), row("t2")]), 40, KeyedRandom(1, np.arange(3)), 8)[0]
    first, second, third = (set(named(long_shards, rows)) for rows in drawn)
    assert first == {"D9#1", *(name for name in long_shards.docs.ids() if name.startswith("D4#")
                               and (which == "all" or name == "D4#0"))}
    assert second == {name for name in long_shards.docs.ids() if name.startswith("D2#")
                      and (which == "all" or name == "D2#0")}
    assert not any(name.startswith("D8#") for name in third) and len(third) > 10  # random


def test_other_passages_of_a_judged_document_take_no_part_in_the_batch(long_shards, tmp_path):
    lists = build(long_shards, tmp_path, {"t1": ["D1#1", "D1#2"], "t2": ["D4#1"]})
    data = RankingData(long_shards, "train", lists, NegativesConfig(per_query=2), seed=1, batch=4, micro_batch=8)
    batch = data(0)
    rows = data._stream.rows(0, 4)[1]
    pairs = data._pairs[rows]
    columns = named(long_shards, data._documents(np.arange(4), rows)[0].reshape(-1))
    queries = [long_shards.queries("train").ids()[q] for q in pairs[:, 0]]
    judged = {"t0": ("D0", "D1"), "t1": ("D4",), "t2": ("D8",)}
    expected = {(g, c) for g, query in enumerate(queries) for c, name in enumerate(columns)
                if name.partition("#")[0] in judged[query] and c != g * 3}
    assert set(map(tuple, batch.exclude.T.tolist())) == expected and expected


def test_mining_a_run_of_passages():
    run = Run.from_pairs({"q1": [("D1#3", 9), ("D2#0", 8), ("D1#0", 7), ("D3#1", 6), ("D2#4", 5)]})
    counts = Statistics()
    (row,) = mine_run(run, {"q1": {"D1": 1, "D3": 0}}, 2, counts, passages=True)
    assert row.negatives == ["D2#0", "D3#1"] and counts.dropped_positives == 2 and row.passages == ["D1#3"]
    (row,) = mine_run(run, {"q1": {"D1": 1}}, 9)  # a collection whose own ids look like that
    assert row.negatives[0] == "D1#3" and row.passages is None


# ------------------------------------------------------------------------------------------------------ search


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """60 documents of 1 to 40 passages with coarse random weights, so that many scores are equal; 25 queries."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 41, 60)
    ids = [f"D{i}#{n}" for i, size in enumerate(sizes) for n in range(size)]
    vocabulary = [f"tok{i}" for i in range(30)]
    dense = random.integers(0, 4, (len(ids), 30)) * (random.random((len(ids), 30)) < 0.15) / 100
    dense[np.array([name.startswith("D7#") for name in ids])] *= 5  # one document crowds the others out
    asked = (random.random((25, 30)) < 0.1) * random.integers(1, 3, (25, 30)) / 100
    docs = SparseVectors(ids, *quantise(dense, 0), vocabulary, {"side": "docs"})
    queries = SparseVectors([f"q{i}" for i in range(25)], *quantise(asked, 0), vocabulary, {"side": "queries"})
    folder = tmp_path_factory.mktemp("maxp")
    docs.save(folder / "docs")
    queries.save(folder / "queries")
    engines.build(folder / "docs", "exact", folder / "index")
    return folder, docs, queries


def brute_force(docs, queries, hits: int) -> dict[str, list[tuple[str, int]]]:
    """Every passage scored; best of each document; by score, then id."""
    scores = (queries.to_scipy() @ docs.to_scipy().T).toarray()
    found = {}
    for query, row in zip(queries.ids, scores, strict=True):
        best: dict[str, int] = {}
        for name, score in zip(docs.ids, row.tolist(), strict=True):
            document = name.split("#")[0]
            best[document] = max(best.get(document, 0), score)
        ranked = sorted(((d, s) for d, s in best.items() if s > 0), key=lambda pair: (-pair[1], pair[0]))
        found[query] = ranked[:hits]
    return found


@pytest.mark.parametrize("hits", [1, 3, 10, 59, 1000])
def test_the_best_passage_ranks_its_document(index, hits):
    folder, docs, queries = index
    found = maxp.search(engines.open_index(folder / "index"), queries, hits, threads=1)
    assert dict(found) == brute_force(docs, queries, hits)
    assert list(found) == queries.ids and found.seconds > 0


@pytest.mark.slow
def test_anserini_ranks_documents_alike(index, tmp_path):
    try:
        anserini.find_java(), anserini.find_jar()
    except InputError as error:
        pytest.skip(str(error))
    folder, docs, queries = index
    engines.build(folder / "docs", "anserini", tmp_path / "a")
    assert dict(maxp.search(engines.open_index(tmp_path / "a"), queries, 10)) == brute_force(docs, queries, 10)


def test_search_command_and_any_mrr(index, tmp_path):
    folder, docs, queries = index
    command("search", "--index", folder / "index", "--queries", folder / "queries", "--hits", 60, "--max-passage",
            "--output", tmp_path / "run", "--json", tmp_path / "run.json", "--threads", 1)
    expected = brute_force(docs, queries, 60)
    assert json.loads((tmp_path / "run.json").read_text())["max_passage"] is True
    lines = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
    assert {query: [(line[2], int(line[4])) for line in lines if line[0] == query] for query in expected} == expected
    qrels = {query: {"D7": 1, "D11": 1} for query in expected}
    names = tuple(f"MRR@{k}" for k in (1, 7, 23, 60, 100))
    result = metrics.evaluate(Run.from_pairs(expected), qrels, names)
    for k in (1, 7, 23, 60, 100):
        ranks = [min((i for i, (d, _) in enumerate(expected[q], 1) if d in qrels[q] and i <= k), default=0)
                 for q in expected]
        assert result.means[f"MRR@{k}"] == pytest.approx(np.mean([1 / rank if rank else 0 for rank in ranks]))


def test_an_index_of_whole_documents_is_refused(index, tmp_path):
    folder, docs, queries = index
    SparseVectors([name.replace("#", "-") for name in docs.ids], *docs.csr, docs.vocabulary).save(tmp_path / "docs")
    engines.build(tmp_path / "docs", "exact", tmp_path / "index")
    with pytest.raises(InputError, match="which is no passage of a split document"):
        maxp.search(engines.open_index(tmp_path / "index"), queries, 5, 1)


def test_subset_of_vectors(index):
    _, _, queries = index
    found = queries.subset([4, 0, 17])
    assert found.ids == ["q4", "q0", "q17"]
    assert (found.to_scipy() != queries.to_scipy()[[4, 0, 17]]).nnz == 0
    assert len(queries.subset([])) == 0
