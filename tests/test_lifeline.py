"""Signs of life: a store in memory stands for the network, time runs fast."""

from __future__ import annotations

import threading
import time

import pytest

from lexmae import lifeline
from lexmae.lifeline import Lifeline


class Memory:
    """A store of one process; ``silent`` makes every call hang, as when the network is gone."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.silent = threading.Event()

    def set(self, key: str, value: str) -> None:
        self._hang()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._hang()
        return self.values[key]

    def _hang(self) -> None:
        while self.silent.is_set():
            time.sleep(0.01)


class View:
    """A rank's own connection to the store, which can be cut."""

    def __init__(self, store: Memory):
        self.store, self.silent = store, threading.Event()

    def __getattr__(self, name: str):
        while self.silent.is_set():
            time.sleep(0.01)
        return getattr(self.store, name)


def make(world: int, limit: float = 0.3) -> tuple[list[Lifeline], list[View], list[list[str]]]:
    store, stopped = Memory(), [[] for _ in range(world)]
    views = [View(store) for _ in range(world)]
    lines = [Lifeline(view, rank, world, limit, every=0.02, stop=stopped[rank].append)
             for rank, view in enumerate(views)]
    for line in lines:
        line._hosts = {rank: f"host-{rank}" for rank in range(world)}
    return lines, views, stopped


def start(lines: list[Lifeline]) -> None:
    for line in lines:
        line.start()
        line._hosts = {rank: f"host-{rank}" for rank in range(line.world)}


def until(condition, seconds: float = 3.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_silent_rank_is_named_by_the_others_and_the_store_rank_by_it():
    lines, views, stopped = make(3)
    start(lines)
    time.sleep(0.5)
    assert stopped == [[], [], []] and all(line.lost() is None for line in lines)
    views[2].silent.set()
    assert until(lambda: all(stopped))
    assert stopped[0][0].startswith("rank 2 on host-2 has given no sign of life for 0 s")
    assert stopped[1][0].startswith("rank 2 on host-2")
    assert stopped[2][0].startswith("rank 0 on host-0")  # from where it stands, the store is silent
    views[2].silent.clear()
    for line in lines:
        line.close()


def test_a_rank_that_has_finished_is_not_missed():
    lines, _, stopped = make(2)
    start(lines)
    lines[1].close()
    time.sleep(0.7)
    assert stopped == [[], []] and lines[0].lost() is None
    lines[0].close()


def test_the_reason_of_a_failed_rank_reaches_the_others():
    lines, _, stopped = make(2, limit=5)
    start(lines)
    lines[1].close("the data is damaged")
    assert lines[0].wait_for_verdict() == "rank 1 on host-1 failed: the data is damaged"
    assert stopped == [[], []]  # the broken connection is reported by who meets it
    lines[0].close()


def test_no_verdict_where_all_are_well():
    lines, _, _ = make(2, limit=0.1)
    start(lines)
    assert lines[0].wait_for_verdict() is None
    for line in lines:
        line.close()


@pytest.mark.parametrize(("text", "seconds"), [("7.5", 7.5), ("0", 0.0), ("-3", 0.0), ("often", 40.0)])
def test_limit_of_the_environment(monkeypatch, text, seconds):
    monkeypatch.setenv(lifeline.LIMIT, text)
    assert lifeline.limit() == seconds


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("0", 0.0), ("never", 1800.0)])
def test_limit_of_a_hung_run(monkeypatch, text, seconds):
    monkeypatch.setenv(lifeline.HUNG, text)
    assert lifeline.hung_limit() == seconds


def test_one_rank_or_no_limit_needs_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    lifeline.begin()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_SIZE", "2"), (lifeline.HUNG, "0")):
        monkeypatch.setenv(name, value)
    lifeline.begin()
    assert lifeline._current is None
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        lifeline.blame(RuntimeError("Connection closed by peer"))


def told(line: Lifeline, seconds: float, **places: str) -> str | None:
    """The verdict of a rank whose others stay at these places, as `rank0="marks place"`, for so long."""
    begin = line._heard
    for beat, moment in ((1, begin), (2, begin + seconds)):
        line._note({int(rank[-1]): f"{beat} {place}" for rank, place in places.items()}, moment, slept=False)
    return line.lost()


def hung_line(rank: int = 1) -> Lifeline:
    line = Lifeline(Memory(), rank, 2, limit=1e6, hung=60.0)
    line._hosts = {0: "host-0", 1: "host-1"}
    return line


def test_the_rank_that_is_behind_has_hung():
    places = {"rank0": "7 step 3, waiting for data", "rank1": "8 step 3, exchange before it"}
    assert told(hung_line(), 61.0, **places).startswith(
        "rank 0 on host-0 has hung at 'step 3, waiting for data' for 61 s, while others wait at 'step 3, exchange")
    assert told(hung_line(), 59.0, **places) is None
    assert told(hung_line(), 61.0, rank0="8 step 3, update", rank1="8 step 3, update").startswith(
        "all ranks have been at 'step 3, update' for 61 s: stopping")


def test_before_the_first_step_and_while_one_moves_nothing_hangs():
    assert told(hung_line(), 61.0, rank0="0 ", rank1="1 step 1, update") is None
    line = hung_line()
    assert told(line, 61.0, rank0="3 a", rank1="3 a") is not None
    line._note({0: "3 4 b", 1: "3 3 a"}, line._heard, slept=False)
    assert line.lost() is None


def test_after_its_own_sleep_a_rank_starts_to_count_anew():
    line = hung_line()
    assert told(line, 61.0, rank0="3 a", rank1="4 b") is not None
    line._note({0: "3 3 a", 1: "3 4 b"}, line._heard + 600, slept=True)
    assert line.lost() is None


def test_a_silent_rank_is_named_with_the_place_it_was_last_at():
    line = Lifeline(Memory(), 1, 2, limit=30.0)
    line._hosts = {0: "host-0", 1: "host-1"}
    begin = line._heard
    line._note({0: "5 9 step 4, update", 1: "5 9 step 4, update"}, begin, slept=False)
    line._note({0: "5 9 step 4, update", 1: "6 9 step 4, update"}, begin + 31, slept=False)
    assert line.lost().startswith("rank 0 on host-0 has given no sign of life for 31 s (last at 'step 4, update')")


def test_blame_leaves_with_the_name_of_the_lost_rank(monkeypatch, capsys):
    lines, views, _ = make(2, limit=0.2)
    start(lines)
    assert until(lambda: 1 in lines[0]._seen)
    monkeypatch.setattr(lifeline, "_current", lines[0])
    views[1].silent.set()
    with pytest.raises(SystemExit) as left:
        lifeline.blame(RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711"))
    assert left.value.code == 1 and "error: rank 1 on host-1 has given no sign" in capsys.readouterr().err
    views[1].silent.clear()
    lines[1].close()
