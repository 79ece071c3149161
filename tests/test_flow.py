"""Blocks through a model: everything arrives in order, whatever is slow or fails, and a block is whole or absent."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lexmae.data.batches import Movable
from lexmae.retrieval import flow

CPU = torch.device("cpu")


@dataclass
class Numbers(Movable):
    values: torch.Tensor
    block: int


class Doubling:
    """Doubles the numbers of a block; block 3 has none."""

    def __init__(self, sizes: list[int], each: int = 2):
        self.sizes, self.each = sizes, each
        self.written: dict[int, list[int]] = {}
        self.threads: dict[str, str] = {}
        self.log: list[tuple[str, float]] = []

    def note(self, what: str, value: float) -> None:
        self.threads[what] = threading.current_thread().name
        self.log.append((what, value))

    def batches(self, block):
        return np.array_split(np.arange(self.sizes[block])[::-1], range(self.each, self.sizes[block], self.each)) \
            if self.sizes[block] else []

    def read(self, block, batch):
        self.note("read", 100 * block + batch[0])
        return Numbers(torch.from_numpy(100 * block + batch), block)

    def compute(self, batch):
        self.note("compute", int(batch.values[0]))
        return 2 * batch.values

    def select(self, values):
        self.note("select", int(values[0]) // 2)
        return values, values > 0

    def receive(self, block, batch, arrays):
        self.note("receive", 100 * block + batch[0])
        assert len(batch) == len(arrays[0]) and arrays[1].dtype == bool
        return arrays[0].copy()

    def write(self, block, batches, kept):
        self.note("write", block)
        found = np.zeros(self.sizes[block], np.int64)
        if batches:
            found[np.concatenate(batches)] = np.concatenate(kept)
        self.written[block] = found.tolist()


SIZES = [5, 1, 8, 0, 4]


def expected(blocks) -> dict[int, list[int]]:
    return {b: [2 * (100 * b + i) for i in range(SIZES[b])] for b in blocks}


def doubled(job: Doubling, blocks=range(5)) -> Doubling:
    flow.run(job, list(blocks), CPU, None, lambda n: job.note("done", n))
    return job


def leave(monkeypatch, behind: int) -> None:
    """As on a GPU, so many results wait until the device has more to do."""
    begin = flow._Fetch.__init__

    def later(self, device):
        begin(self, device)
        self.behind = behind

    monkeypatch.setattr(flow._Fetch, "__init__", later)


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("blocks", [range(5), [0], [3], [4, 3, 2], []])
def test_every_block_is_written_whole_and_in_order(monkeypatch, behind, blocks):
    leave(monkeypatch, behind)
    job = doubled(Doubling(SIZES), blocks)
    assert job.written == expected(blocks) and list(job.written) == list(blocks)
    assert sum(n for what, n in job.log if what == "done") == sum(SIZES[b] for b in blocks)
    here = threading.current_thread().name
    assert {what: job.threads[what] for what in job.threads if what in ("compute", "select")} == \
        {what: here for what in job.threads if what in ("compute", "select")}
    assert {job.threads.get(what, "writer") for what in ("receive", "write")} == {"writer"}
    assert job.threads.get("read", "prefetch") == "prefetch"


def test_a_gpu_has_the_next_batch_before_anyone_waits_for_the_size_of_a_result(monkeypatch):
    leave(monkeypatch, 1)
    log = [(what, int(value)) for what, value in doubled(Doubling([8]), [0]).log if what in ("compute", "select")]
    assert log == [("compute", 7), ("compute", 5), ("select", 7), ("compute", 3), ("select", 5), ("compute", 1),
                   ("select", 3), ("select", 1)]


@pytest.mark.parametrize("where", ["read", "compute", "select", "receive", "write"])
def test_an_error_anywhere_is_raised_here_and_leaves_whole_blocks(monkeypatch, where):
    job, calls = Doubling(SIZES), []
    work, last = getattr(job, where), {"write": 2}.get(where, 5)

    def fails(*args):
        calls.append(args)
        if len(calls) == last:
            raise ZeroDivisionError(where)
        return work(*args)

    monkeypatch.setattr(job, where, fails)
    with pytest.raises(ZeroDivisionError, match=where):
        doubled(job)
    assert job.written == (expected([0]) if where == "write" else expected([0, 1]))
    assert not {"writer", "prefetch"} & {thread.name for thread in threading.enumerate()}


def test_a_slow_disk_holds_the_device_up(monkeypatch):
    """No more batches wait than may, and an error behind them does not leave anybody waiting."""
    monkeypatch.setattr(flow, "BEHIND", 2)
    job = Doubling([60], each=1)
    receive = job.receive

    def slow(*args):
        time.sleep(0.01)
        if args[1][0] == 30:
            raise OSError("disk full")
        return receive(*args)

    job.receive = slow
    with pytest.raises(OSError, match="disk full"):
        doubled(job, [0])
    computed, received = (sum(what == name for what, _ in job.log) for name in ("compute", "receive"))
    assert received == 29 and computed <= received + 2 + 3 and job.written == {}


def test_the_model_runs_in_the_type_asked_for_and_without_gradients():
    class Product(Doubling):
        def compute(self, batch):
            assert torch.is_inference_mode_enabled()
            weights = torch.nn.Parameter(torch.ones(1, 1))
            values = batch.values.float()[:, None] @ weights
            self.note("half", values.dtype == torch.bfloat16)
            return values[:, 0]

    for dtype in (None, torch.bfloat16):
        job = Product([4])
        job.select = lambda values: (values.float(), values > 0)
        flow.run(job, [0], CPU, dtype, lambda n: None)
        assert job.log[-1] == ("write", 0)
        assert {bool(v) for what, v in job.log if what == "half"} == {dtype is not None}
