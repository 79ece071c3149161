"""The log of a run, also of one that was stopped and continued."""

from __future__ import annotations

import json

import pytest

from lexmae.train.metrics_log import MetricsLog


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def written(folder, steps, start: int = 0) -> None:
    log = MetricsLog(folder, start)
    for step in steps:
        log.write(step, {"loss": step / 2})
    log.close()


def scalars(folder) -> dict[int, float]:
    """The losses that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


def test_a_line_per_report_and_the_same_in_tensorboard(tmp_path):
    written(tmp_path, [10, 20])
    assert lines(tmp_path) == [{"step": 10, "loss": 5.0}, {"step": 20, "loss": 10.0}]
    assert scalars(tmp_path) == {10: 5.0, 20: 10.0}


def test_a_continued_run_replaces_what_lies_behind_its_checkpoint(tmp_path):
    written(tmp_path, [10, 20, 30])
    with open(tmp_path / "log.jsonl", "a") as out:
        out.write('{"step": 40, "lo')  # killed while writing
    written(tmp_path, [30, 40], start=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    assert sorted(scalars(tmp_path)) == [10, 20, 30, 40]


def test_a_log_is_replaced_as_a_whole_and_only_where_something_is_dropped(tmp_path, monkeypatch):
    written(tmp_path, [10, 20])
    file = tmp_path / "log.jsonl"
    before = file.stat()
    MetricsLog(tmp_path, start=20).close()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def full(*_):
        raise OSError("no room")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no room"):
        MetricsLog(tmp_path, start=10)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]


def test_a_new_run_begins_a_new_log(tmp_path):
    written(tmp_path, [10, 20])
    written(tmp_path, [5])
    assert [line["step"] for line in lines(tmp_path)] == [5]


def test_lines_are_on_disk_at_once_and_are_json(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "scale": None, "name": "x", "count": 3})
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "scale": None, "name": "x", "count": 3}]
    log.close()


@pytest.mark.parametrize("start", [0, 10])
def test_other_ranks_write_nothing(tmp_path, monkeypatch, start):
    monkeypatch.setenv("RANK", "1")
    written(tmp_path, [20], start)
    assert list(tmp_path.iterdir()) == []
