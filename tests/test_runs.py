"""Runs: order, reading, writing and the errors of bad files."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pytest

from lexmae.errors import InputError
from lexmae.retrieval.runs import Run, check_tag, read_run, write_run


def test_order_is_score_then_docid():
    run = Run.from_pairs({"q": [("d2", 1), ("d10", 3), ("d1", 1), ("z", 7), ("a", 3)]})
    assert run["q"] == [("z", 7), ("a", 3), ("d10", 3), ("d1", 1), ("d2", 1)]
    assert run.documents("q") == ["z", "a", "d10", "d1", "d2"]


def test_written_lines(tmp_path):
    write_run(tmp_path / "r", {"q1": [("b", 2), ("a", 2), ("c", 5)], "q2": [("x", 0.1)], "empty": []}, tag="me")
    assert (tmp_path / "r").read_text() == ("q1 Q0 c 1 5 me\nq1 Q0 a 2 2 me\nq1 Q0 b 3 2 me\nq2 Q0 x 1 0.1 me\n")


def test_round_trip_keeps_order_and_scores(tmp_path):
    chance = random.Random(0)
    pairs = {f"q{i}": [(f"d{j}", chance.choice([1.0, 1.0 + 2**-50, 1 / 3, 1e-17, 123456789.123, 7]))
                       for j in range(40)] for i in range(20)}
    write_run(tmp_path / "r", pairs)
    read = read_run(tmp_path / "r")
    assert list(read) == list(pairs)
    for query, expected in pairs.items():
        assert read[query] == sorted(expected, key=lambda p: (-p[1], p[0]))


def test_lines_of_a_query_may_be_scattered_and_ranks_are_not_trusted(tmp_path):
    (tmp_path / "r").write_text("q1 Q0 a 1 1.0 t\nq2\tQ0\tb\t9\t2\tt\n\nq1 Q0 c 2 3e2 t\n")
    run = read_run(tmp_path / "r")
    assert dict(run) == {"q1": [("c", 300.0), ("a", 1.0)], "q2": [("b", 2.0)]}
    (tmp_path / "r.gz").write_bytes(gzip.compress((tmp_path / "r").read_bytes()))
    assert dict(read_run(tmp_path / "r.gz")) == dict(run)


@pytest.mark.parametrize(("line", "reason"), [
    ("q Q0 d 1 0.5", "r:2: has 5 columns"), ("q Q0 d 1 0.5 t x", "r:2: has 7 columns"),
    ("q Q0 d 1 high t", "r:2: the score 'high'"), ("q Q0 d 1 nan t", "r:2: the score 'nan'"),
    ("q0 Q0 d0 2 0.5 t", "document 'd0' occurs more than once for query 'q0'")])
def test_bad_lines(tmp_path, line, reason):
    (tmp_path / "r").write_text(f"q0 Q0 d0 1 1 t\n{line}\n")
    with pytest.raises(InputError, match=reason):
        read_run(tmp_path / "r")


def test_not_utf8(tmp_path):
    (tmp_path / "r").write_bytes(b"q Q0 d\xff 1 1 t\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_run(tmp_path / "r")


def test_ids_with_white_space_leave_no_file(tmp_path):
    with pytest.raises(InputError, match="white space"):
        write_run(tmp_path / "r", {"q": [("a", 1), ("b c", 2)]})
    assert not list(tmp_path.iterdir())


def test_whole_scores_take_eight_bytes_an_entry():
    run = Run([f"d{i}" for i in range(10)])
    run.add("q", np.arange(10), np.arange(10.0))
    run.add("p", np.arange(10), np.arange(10) / 7)
    assert run.scores("q").dtype == np.int32 and run.scores("p").dtype == np.float64
    assert run.n_entries == 20
    with pytest.raises(ValueError, match="already"):
        run.add("q", np.arange(1), np.ones(1))


def test_cut_and_without_self():
    run = Run.from_pairs({"a": [("a", 3), ("b", 2), ("c", 1)], "x": [("a", 3), ("b", 2), ("c", 1)]})
    assert dict(run.cut(2)) == {"a": [("a", 3), ("b", 2)], "x": [("a", 3), ("b", 2)]}
    assert dict(run.without_self()) == {"a": [("b", 2), ("c", 1)], "x": [("a", 3), ("b", 2), ("c", 1)]}
    assert len(run["a"]) == 3
    split = Run.from_pairs({"a": [("a#1", 3), ("b#0", 2), ("a#0", 1)]})
    assert split.without_self().documents("a") == ["a#1", "b#0", "a#0"]
    assert split.without_self(passages=True).documents("a") == ["b#0"]


def test_a_byte_order_mark_is_no_part_of_the_first_query(tmp_path):
    (tmp_path / "r").write_bytes(b"\xef\xbb\xbfq Q0 d1 1 2.5 t\nq Q0 d2 2 1.5 t\n")
    assert dict(read_run(tmp_path / "r")) == {"q": [("d1", 2.5), ("d2", 1.5)]}


@pytest.mark.parametrize("tag", ["", "my run", "a\tb"])
def test_a_tag_that_a_run_cannot_hold_is_refused(tag):
    with pytest.raises(InputError, match="cannot stand in a TREC run"):
        check_tag(tag)


def test_ids_that_can_be_read_can_be_written(tmp_path):
    write_run(tmp_path / "run", {"q\u00a01": [("d\u2028", 1.0)]})
    assert read_run(tmp_path / "run").documents("q\u00a01") == ["d\u2028"]
