from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from itertools import combinations

import pytest

from lexmae.data import builtin
from lexmae.data.builtin import Document, clean, near_pairs, parse, select, split_of, words_of
from lexmae.data.corpus import read_qrels

BODY = (
    "The solver walks over every node of the tree and keeps the cheapest branch seen so far, so that the "
    "cost of the whole search stays linear in the number of leaves."
)


def body(seed: int, length: int = 40) -> str:
    """Words that no other seed shares."""
    letters = "abcdefghij"
    return " ".join("w" + "".join(letters[int(d)] for d in f"{seed:03d}{i:02d}") for i in range(length))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Three importable packages of which one raises on import, and the list of packages reduced to them."""
    modules = {
        "alpha/__init__.py": f'"""Toolbox for sorting clocks. {BODY}"""\nraise RuntimeError("imported")\n',
        "alpha/_core/wheels.py": f'''
def spin(axis):
    """spin(axis) -> int

    Turn the wheel around one axis.

    {body(1, 20)} Turn the   wheel, around one axis. {body(2, 20)}
    """

class Wheel:
    """Round part of a wooden cart."""  # too short to be a passage
    def roll(self):
        """Move the cart down a steep hill.

        {body(3)}
        """
    def _hidden(self):
        """Private thing that nobody reads here.

        {body(4)}
        """

add_newdoc("alpha.gears", "Gear", (f"mesh", "Bring two toothed gears into contact.\\n\\n" + "{body(5)}"))
add_docstr(alpha.oil, r"""Pour fresh oil over dry bearings.

{{input}} {body(6)}""".format(input=""))
''',
        "alpha/tests/test_wheels.py": f'"""Checks of the wheel that are skipped.\n\n{body(7)}"""\n',
        "alpha/broken.py": "def (:\n",
        "beta.py": '"""Not a package."""\n',
    }
    for name, source in modules.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(builtin, "PACKAGES", ("alpha", "beta", "absent_package_of_nobody"))
    return tmp_path


def read_folder(folder):
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    qrels = {split: read_qrels(folder / "qrels" / f"{split}.tsv") for split in ("train", "dev")}
    return {p["_id"]: p for p in corpus}, {q["_id"]: q["text"] for q in queries}, qrels


def test_build_reads_sources_without_importing(package, tmp_path, capsys):
    builtin.build(tmp_path / "out")
    passages, queries, qrels = read_folder(tmp_path / "out")
    assert queries == {
        "q:alpha": "Toolbox for sorting clocks",
        "q:alpha.wheels.spin": "Turn the wheel around one axis",
        "q:alpha.wheels.Wheel.roll": "Move the cart down a steep hill",
        "q:alpha.gears.Gear.mesh": "Bring two toothed gears into contact",
        "q:alpha.oil": "Pour fresh oil over dry bearings",
    }
    assert set(passages) == {query.removeprefix("q:") for query in queries}
    assert passages["alpha.wheels.spin"]["text"] == f"{body(1, 20)} {body(2, 20)}"
    assert passages["alpha.wheels.Wheel.roll"]["title"] == "alpha wheels Wheel roll"
    judged = qrels["train"] | qrels["dev"]
    assert judged == {query: {query.removeprefix("q:"): 1} for query in queries}
    assert not set(qrels["train"]) & set(qrels["dev"])
    assert "absent_package_of_nobody" in capsys.readouterr().err
    assert "alpha" not in sys.modules


def test_max_passages_is_a_subset(package, tmp_path):
    builtin.build(tmp_path / "all")
    builtin.build(tmp_path / "some", max_passages=3)
    everything, some = read_folder(tmp_path / "all")[0], read_folder(tmp_path / "some")[0]
    assert len(some) == 3 and some.items() <= everything.items()


def test_hash_seed_does_not_matter():
    code = (
        "from pathlib import Path; from lexmae.data import builtin as b; import json.decoder as m;"
        "files = [Path(m.__file__).with_name(f) for f in ('decoder.py', 'encoder.py')];"
        "docs = [d for f in files for d in b.read_documents(f.stem, f)];"
        "print(b.select(docs * 2), b.split_of('json.decoder'))"
    )
    first, second = (
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    )
    assert first == second and b"Document(" in first


def test_the_standard_library_has_passages():
    files = dict(builtin.module_files(builtin.STDLIB))
    assert {"textwrap", "json.decoder", "asyncio"} <= set(files)
    assert not any("test" in name.split(".") or "site-packages" in name for name in files)
    found = {d.name: d for d in builtin.read_documents("textwrap", files["textwrap"])}
    assert found["textwrap.shorten"].query == "Collapse and truncate the given text to fit in the given width"
    assert "Collapse and truncate the given text" not in found["textwrap.shorten"].text


def test_parse_takes_the_first_sentence():
    document = parse("m", "m._x.f", f"Compute the e.g. weighted mean of rows. It is fast.\n\n    {BODY}\n")
    assert document == Document("m", "m.f", "Compute the e.g. weighted mean of rows", f"It is fast. {BODY}")


@pytest.mark.parametrize(
    "summary",
    ["See the other class.", "Alias for the long name.", "Sort things.", "x = {a: b[0], c: [1, 2, 3, 4]} + y",
     "1 plus one more than two", "It is the of and to a", " ".join(["word"] * 40)],
)  # fmt: skip
def test_unusable_summaries_leave_a_distractor(summary):
    document = parse("m", "m.f", f"{summary}\n\n{BODY}")
    assert document is not None and document.query == ""


@pytest.mark.parametrize("docstring", ["", "Sort the rows.", "f(a) -> c\n\n" + " ".join(BODY.split()[:12])])
def test_short_docstrings_are_no_passages(docstring):
    assert parse("m", "m.f", docstring) is None


def test_long_bodies_are_cut():
    document = parse("m", "m.f", "Sort the rows of a table.\n\n" + body(1, 90))
    assert document.text == " ".join(body(1, 90).split()[: builtin.MAX_BODY_WORDS])


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        (":func:`~torch.nn.relu` and :class:`text <a.b>`", "torch.nn.relu and text"),
        (":py:meth:`go` ``code`` `plain` **bold**", "go code plain bold"),
        ("Notes\n-----\nSee `site <https://x.org/a>`__.", "Notes See site."),
        (".. versionadded:: 1.2\n.. note::\n   Careful.", "Careful."),
        ("[`BertModel`] in [the docs](https://x.y) <Tip>", "BertModel in the docs"),
        (":param x: number\n:type x: int\n{keepdim}", "x: number"),
        ("shape `(n, m)` and x < y > z", "shape (n, m) and x < y > z"),
    ],
)
def test_markup_is_removed(markup, plain):
    assert clean(markup) == plain


def test_doctests_and_fences_are_bounded():
    lines = [">>> a1", "... a2", ">>> a3", ">>> a4", "out", "```python", "b1", "b2", "b3", "```", "end"]
    kept = builtin._bound_doctests("\n".join(lines)).splitlines()
    assert kept == [">>> a1", "... a2", ">>> a3", "out", "```python", "b1", "b2", "end"]


def test_words_of():
    assert words_of("torch.nn.LayerNorm.extra_repr") == "torch nn Layer Norm extra repr"
    assert words_of("http.HTTPServer_v2.parseURL") == "http HTTP Server v2 parse URL"


def test_near_duplicates_and_ambiguous_queries_are_removed():
    base = body(1, 60).split()
    documents = [
        Document("b", "b.longer", "Remove the trailing rows of a table", " ".join(base[:-4] + ["other"])),
        Document("a", "a.f", "Remove the leading columns of a table", " ".join(base)),
        Document("c", "c.f", "Sorts the rows of this table quickly", body(2)),
        Document("d", "d.f", "sort rows of the tables quickly", body(3)),
        Document("d", "d.f", "A name that was there before", body(4)),
    ]
    assert [(d.name, d.query) for d in select(documents)] == [
        ("a.f", "Remove the leading columns of a table"), ("c.f", ""), ("d.f", "")
    ]  # fmt: skip


def test_near_pairs_agree_with_all_pairs():
    sets = [frozenset(range(start, start + 60)) for start in (0, 3, 200, 203, 206, 500)] + [frozenset()]
    pairs = combinations(enumerate(sets), 2)
    expected = {(i, j) for (i, a), (j, b) in pairs if a and b and len(a & b) >= 0.7 * len(a | b)}
    found = list(near_pairs(sets, 0.7))
    assert set(found) == expected and expected and len(found) == len(set(found))
    assert [later for _, later in found] == sorted(later for _, later in found)


def test_split_is_by_module_and_about_a_tenth():
    splits = [split_of(f"package.module_{i}") for i in range(2000)]
    assert 140 <= splits.count("dev") <= 260 and set(splits) == {"train", "dev"}


def test_literals_of_string_expressions():
    source = '("a" + "b", "x {}".format(1), f"c{d}e", "n %s" % k, 3, name)'
    values = [builtin._literal(node) for node in ast.parse(source, mode="eval").body.elts]
    assert values == ["ab", "x {}", "ce", "n %s", "", ""]
