"""The demo without a browser: its explanations against brute force, its pages, its refusals."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import write_model
from demo_data import EVIL, Folders, build
from transformers import AutoTokenizer

from lexmae import artifact, cli
from lexmae.data.corpus import Corpus, Passage
from lexmae.demo import app as web
from lexmae.demo import explain
from lexmae.demo.explain import Segment
from lexmae.demo.service import Service
from lexmae.demo.texts import TextStore
from lexmae.errors import InputError
from lexmae.retrieval import engines, updates
from lexmae.retrieval.vectors import SparseVectors

pytest.importorskip("flask", reason="the demo's package flask is absent")
ROOT = Path(__file__).parents[1]
STATIC = ROOT / "lexmae" / "demo" / "static"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return build(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def service(folders):
    opened = Service(*folders)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(service):
    return web.create_app(service).test_client()


# ------------------------------------------------------------------------------------------------ explanations


def test_scores_and_matches_are_dot_products(service, folders):
    answer = service.search("silver bridges remember", hits=42)
    found = SparseVectors.open(folders.vectors)
    matrix = found.to_scipy().toarray()
    query = np.zeros(matrix.shape[1], np.int64)
    vector = service._encode("silver bridges remember")[0]
    query[vector.indices] = vector.weights
    scores = matrix @ query
    expected = sorted(zip(-scores, found.ids, strict=True))
    assert [(result.id, round(result.score * 10000)) for result in answer.results] == [
        (name, -score) for score, name in expected if score]
    for result in answer.results:
        row = matrix[list(found.ids).index(result.id)]
        products = sorted((row * query)[(row * query) > 0].tolist(), reverse=True)
        assert [round(match.product * 10000) for match in result.matches] == products
        assert sum(match.product for match in result.matches) == pytest.approx(result.score)
        assert result.terms == (row > 0).sum() and result.matches[0].share == 100
    assert sorted(round(100 * term.weight) for term in answer.terms) == sorted(vector.weights.tolist())
    assert answer.encode_ms > 0 and answer.search_ms > 0


def test_added_terms_are_those_whose_token_is_not_in_the_text(service, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders.model)
    found = SparseVectors.open(folders.vectors)
    for result in service.search("silver", hits=10).results:
        tokens = set(tokenizer(result.title or "-", result.text)["input_ids"])
        indices, weights = found.row(list(found.ids).index(result.id))
        expected = sorted((w / 100 for i, w in zip(indices.tolist(), weights.tolist(), strict=True) if i not in tokens),
                          reverse=True)
        assert [term.weight for term in result.added] == pytest.approx(expected)
        page = service.document(result.id)
        assert [term for term in page.terms if not term.in_text] == result.added and len(page.terms) == len(indices)
        weights = [term.weight for term in page.terms]
        assert weights == sorted(weights, reverse=True) and page.terms[0].share == 100


def test_words_that_match_are_marked(service):
    answer = service.search("silver bridges")
    for result in answer.results:
        page = service.document(result.id, "silver bridges")
        assert "".join(segment.text for segment in page.marked) == result.text
        hits = {match.name for match in result.matches if match.in_text}
        words = {segment.text for segment in page.marked if segment.marked}
        if "silver" in hits and "silver" in result.text:
            assert "silver" in words
    assert not any(segment.marked for segment in service.document("d3").marked)


def test_snippets_show_the_densest_part():
    text = " ".join(["a", "y", "y", "y"] + ["b"] * 6 + ["x", "x", "c"])  # three light words, two heavy ones
    weights = {"x": 5.0, "y": 1.0}
    words = [(found.start(), found.end(), weights.get(found[0], 0.0)) for found in re.finditer(r"\w", text)]
    assert explain.snippet(text, words, 3) == [Segment("… ", False), Segment("b ", False), Segment("x", True),
                                               Segment(" ", False), Segment("x", True), Segment(" …", False)]
    assert explain.snippet(text, words, 99) == explain.segments(text, words)
    assert explain.snippet("", [], 3) == []


def test_names_of_pieces():
    class Tokenizer:
        def convert_tokens_to_string(self, tokens):
            return tokens[0].replace("Ġ", " ")

    names = explain.Names(["river", "##ing", "Ġstone", "ware", "##"], Tokenizer(), np.array([1, 0, 1, 0, 1], bool))
    assert [names[i] for i in range(5)] == ["river", "…ing", "stone", "…ware", "##"]


# ------------------------------------------------------------------------------------------------------- texts


class Source(Corpus):
    """A collection in memory."""

    def __init__(self, passages):
        super().__init__("memory")
        self.rows = passages

    def _passage_rows(self):
        yield from (("memory", i, one.id, one.title, one.text) for i, one in enumerate(self.rows, 1))

    def _query_rows(self, split):
        yield from ()

    def splits(self):
        return []

    def judgements(self, split):
        return None


def test_texts_by_id_and_by_passage():
    store = TextStore(Source([Passage("a", "A", "one"), Passage("b", "", "two")]), ["a#0", "a#1", "b#0"])
    assert store.text("a#1") == store.text("a") == Passage("a", "A", "one") and store.text("c") is None
    assert store.row("b#0") == 2 and store.row("b") is None
    folder = Path(store._folder.name)
    assert folder.is_dir()
    store.close()
    assert not folder.exists()


def test_texts_of_another_collection_are_refused():
    with pytest.raises(InputError, match="memory: has no document 'z', of which there is a vector"):
        TextStore(Source([Passage("a", "A", "one")]), ["a", "z"])


# ------------------------------------------------------------------------------------------------------- pages


def test_texts_are_never_markup(client, service):
    query = '<script>document.title="caught"</script> silver'
    result = client.get("/", query_string={"q": query, "hits": 42})
    page = result.get_data(as_text=True)
    assert result.status_code == 200 and html.escape(EVIL.title).replace("&#x27;", "&#39;").replace(
        "&quot;", "&#34;") in page
    document = client.get("/document", query_string={"id": EVIL.id, "q": query}).get_data(as_text=True)
    error = client.get("/document", query_string={"id": "none", "q": query}).get_data(as_text=True)
    for text in (page, document, error, client.get("/", query_string={"hits": "<b>x"}).get_data(as_text=True)):
        assert not re.search(r"<script>|<img|<b>x|evil\"><b>", text) and text.count("<script") == 1
        assert not re.search(r"\son\w+=|\sstyle=|javascript:|https?://(?!www\.w3\.org)", text.replace(
            html.escape(EVIL.text), "").replace("onerror=&#34;", ""))


def test_headers_are_strict(client):
    for path in ("/", "/?q=silver", "/api/search?q=silver", "/document?id=none", "/static/style.css", "/nothing"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_api_answers_json(client, service):
    answer = client.get("/api/search?q=silver+bridges&hits=3").get_json()
    assert answer["query"] == "silver bridges" and len(answer["results"]) == 3
    first, expected = answer["results"][0], service.search("silver bridges", 3).results[0]
    assert first["id"] == expected.id and first["score"] == pytest.approx(expected.score)
    assert set(first["matches"][0]) == {"name", "query", "document", "product", "in_text", "share"}
    for asked, reason in (("", "the parameter q is missing or empty"), ("q=a&hits=0", "from 1 to"),
                          ("q=a&hits=²", "from 1 to"), ("q=a&hits=00000000199999999", "from 1 to"),
                          ("q=a&hits=" + "9" * 6000, "from 1 to"), ("q=" + "a" * 2001, "at most 2000")):
        got = client.get("/api/search?" + asked)
        assert got.status_code == 400 and reason in got.get_json()["error"]
    assert client.get("/api/nothing").get_json()["error"] and client.get("/api/nothing").status_code == 404


def test_pages_of_bad_requests(client):
    assert client.get("/?q=a&hits=1000").status_code == 400
    assert "There is no document of that id" in client.get("/document?id=none").get_data(as_text=True)
    assert client.get("/document?id=none").status_code == client.get("/nothing").status_code == 404
    assert client.get("/?q=%F0%9F%92%A9").status_code == 200  # nothing but an unknown character


def test_other_host_names_are_refused(client, service):
    assert client.get("/", headers={"Host": "attacker.example:8080"}).status_code == 400
    for name in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        assert client.get("/", headers={"Host": name}).status_code == 200
    everyone = web.create_app(service, "0.0.0.0").test_client()
    assert everyone.get("/", headers={"Host": "machine.example"}).status_code == 200


def luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme):
    """WCAG 2.2, level AA: 4.5 to 1 for text, 3 to 1 for bars."""
    style = (STATIC / "style.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))

    def contrast(one: str, other: str) -> float:
        dark, light = sorted(luminance(colours[name]) for name in (one, other))
        return (light + 0.05) / (dark + 0.05)

    pairs = [("ink", ground) for ground in ("ground", "sheet", "mark")]
    pairs += [(text, ground) for text in ("soft", "own", "added") for ground in ("ground", "sheet")]
    pairs += [("added", "added-ground"), ("on-own", "own")]
    assert {pair: contrast(*pair) for pair in pairs if contrast(*pair) < 4.5} == {}
    bars = [("own-bar", "sheet"), ("own-bar", "ground")]
    assert {pair: contrast(*pair) for pair in bars if contrast(*pair) < 3} == {}


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    other = write_model(tmp_path / "model", folders.model.parent / "shards", seed=1, tokenizer_hash="0" * 64)
    with pytest.raises(InputError, match="another tokenizer than the model that encoded the documents"):
        Service(other, *folders[1:])
    SparseVectors.open(folders.vectors).pruned(3).save(tmp_path / "vectors")
    with pytest.raises(InputError, match="is not what .*index was made of"):
        Service(folders.model, folders.index, tmp_path / "vectors", folders.corpus)
    shutil.copytree(folders.model, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "bare" / artifact.MANIFEST).unlink()
    (tmp_path / "bare" / "modules.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        Service(tmp_path / "bare", *folders[1:])


def test_an_index_that_was_changed_is_refused_though_it_has_as_many_documents(folders, tmp_path):
    vectors = SparseVectors.open(folders.vectors)
    engines.build(folders.vectors, "exact", tmp_path / "i")
    (tmp_path / "gone").write_text(vectors.ids[0])
    rows = vectors.pruned(2)
    SparseVectors(rows.ids[:1], rows.indptr[:2], rows.indices[:rows.indptr[1]], rows.weights[:rows.indptr[1]],
                  rows.vocabulary, rows.extra).save(tmp_path / "new")
    updates.replace(tmp_path / "i", tmp_path / "gone", tmp_path / "new")
    updates.compact(tmp_path / "i")
    with pytest.raises(InputError, match="is not what .*i was made of"):
        Service(folders.model, tmp_path / "i", folders.vectors, folders.corpus)


def test_a_pruned_index_is_explained_by_what_it_holds(folders, tmp_path):
    engines.build(folders.vectors, "exact", tmp_path / "i", top_k=3)
    pruned = Service(folders.model, tmp_path / "i", folders.vectors, folders.corpus)
    for result in pruned.search("silver bridges", hits=5).results:
        assert sum(match.product for match in result.matches) == pytest.approx(result.score)
    pruned.close()


def test_loopback_names():
    assert all(map(web.is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost", "a.localhost")))
    assert not any(map(web.is_loopback, ("0.0.0.0", "10.0.0.1", "localhost.example", "example", "")))


def command(folders: Folders, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "demo.py"), *folders.arguments(), *more]


def refused(folders: Folders, capsys, *more: str) -> str:
    from runpy import run_path

    with pytest.raises(SystemExit) as stopped:
        cli.run(run_path(str(ROOT / "tools" / "demo.py"))["main"], [*folders.arguments(), *more])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def test_bad_arguments_are_one_line(folders, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1, port {port}: Address already in use" in refused(folders, capsys,
                                                                                               "--port", port)
    assert "port 99999: must be between" in refused(folders, capsys, "--port", "99999")
    assert "cannot listen at no.such.host.invalid" in refused(folders, capsys, "--host", "no.such.host.invalid")
    assert "--hits must be a number from 1 to 100" in refused(folders, capsys, "--hits", "0")
    absent = folders._replace(index=Path("absent"))
    assert "absent: no such index" in refused(absent, capsys, "--port", "0")
    monkeypatch.setitem(sys.modules, "flask", None)
    assert 'the demo needs Flask: pip install -e ".[demo]"' in refused(folders, capsys, "--port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_stops(folders, stop, tmp_path):
    import os

    process = subprocess.Popen(command(folders, "--port", "0"), stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
                               # A shell's background job ignores Ctrl-C, and so would what it starts.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        with urllib.request.urlopen(address + "api/search?q=silver") as answer:
            assert json.load(answer)["results"]
        assert [path.name for path in tmp_path.glob("lexmae-demo-*/*")] == ["texts.sqlite"]
        process.send_signal(stop)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 0 and rest.strip() == "stopped"
        assert not list(tmp_path.glob("lexmae-demo-*"))
    finally:
        process.kill()
