"""Blocks of texts through a model, so that the device never waits for the disk.

Four things go on at once:

- a thread reads and pads the batches to come, into page-locked memory where there is a GPU;
- the main thread gives them to the device;
- what the model makes of a batch is reduced on the device (``Job.select``) and copied to memory on a stream of its own,
  while the device computes the next batch;
- a thread takes what has arrived and writes a block when its last batch is there.

Both threads are bounded: a slow disk holds the device up rather than filling the memory. On a CPU the copies fall away.

A block is written as a whole or not at all. An error of a thread is raised in the main thread, and the blocks that are
written stay, so that the same command goes on with those that are missing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lexmae import memory
from lexmae.data.batches import pinned, prefetch

AHEAD, BEHIND = 4, 8
"""Batches that are read ahead of the model, and batches that may wait for the thread that writes."""


class Job(Protocol):
    """What is done with the texts of a block."""

    def batches(self, block: int) -> list[np.ndarray]:
        """The block's batches, as positions in the block."""

    def read(self, block: int, batch: np.ndarray) -> Any:
        """A batch of ``data.batches`` with these texts; called in a thread."""

    def compute(self, batch: Any) -> Tensor:
        """The model on a batch that is on the device."""

    def select(self, values: Tensor) -> tuple[Tensor, ...]:
        """What of ``compute``'s result is wanted in memory, found on the device."""

    def receive(self, block: int, batch: np.ndarray, arrays: tuple[np.ndarray, ...]) -> Any:
        """What to keep of a batch until its block is written, given ``select``'s tensors as arrays that are reused
        afterwards; called in the thread that writes."""

    def write(self, block: int, batches: list[np.ndarray], kept: list[Any]) -> None:
        """Write the part of the block, given what ``receive`` kept of each batch; called in the thread that writes."""


@torch.inference_mode()
def run(job: Job, blocks: Sequence[int], device: torch.device, dtype: torch.dtype | None,
        done: Callable[[int], Any]) -> None:
    """Do the job for these blocks, in this order.

    Args:
        dtype: of autocast; None leaves the model's own.
        done: called with the number of texts of each batch that the device has been given.

    Raises:
        whatever the job raises, in any of the threads.
    """
    fetch = _Fetch(device)
    with _Writer(job) as writer:
        waiting: list[_Computed] = []
        for block in blocks:
            batches = job.batches(block)
            for number, batch in enumerate(prefetch(_reader(job, block, batches, device), 0, len(batches), AHEAD)):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    values = job.compute(batch.to(device))
                waiting.append(_Computed(block, batches, number, values, fetch.mark()))
                while len(waiting) > fetch.behind:
                    writer.put(fetch.start(job, waiting.pop(0)))
                done(len(batches[number]))
                memory.tidy()
            if not batches:  # nothing to compute, but a part to write
                waiting = _all(job, fetch, writer, waiting)
                writer.put(_Parcel(block, batches, -1, (), None))
        _all(job, fetch, writer, waiting)


def _all(job: Job, fetch: _Fetch, writer: _Writer, waiting: list[_Computed]) -> list[_Computed]:
    """Send off everything that waits; what waits then."""
    for computed in waiting:
        writer.put(fetch.start(job, computed))
    return []


def _reader(job: Job, block: int, batches: list[np.ndarray], device: torch.device) -> Callable[[int], Any]:
    """Reads batch ``i`` of a block, into page-locked memory where there is a GPU."""

    def read(i: int) -> Any:
        batch = job.read(block, batches[i])
        if device.type != "cuda":
            return batch
        with torch.cuda.device(device):
            return pinned(batch)

    return read


class _Computed(NamedTuple):
    """A result on the device, and the event after which it is there; None on a CPU."""

    block: int
    batches: list[np.ndarray]
    number: int
    values: Tensor
    ready: Any


class _Parcel(NamedTuple):
    """Tensors on their way to memory, and the event after which they are there; None on a CPU. ``number`` is -1 for a
    block without batches."""

    block: int
    batches: list[np.ndarray]
    number: int
    tensors: tuple[Tensor, ...]
    arrived: Any


class _Fetch:
    """Reduces results on the device and copies what is left to memory: on a GPU on a stream of its own.

    Attributes:
        behind: how many results wait until the device has been given more work: sending one off needs the size of what
            is selected, and meanwhile a GPU should have something to do.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.behind = 0 if self.stream is None else 1

    def mark(self) -> Any:
        """An event after what the device has been given so far."""
        return None if self.stream is None else torch.cuda.current_stream().record_event()

    def start(self, job: Job, computed: _Computed) -> _Parcel:
        """Send a result off. Here the host may wait for the result itself, never for what the device was given
        after it."""
        block, batches, number, values, ready = computed
        if self.stream is None:
            return _Parcel(block, batches, number, job.select(values), None)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            found = job.select(values)
            values.record_stream(self.stream)  # its memory is not given away before this stream is through with it
            copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                           for t in found)
            return _Parcel(block, batches, number, copies, self.stream.record_event())


class _Writer:
    """The thread that takes parcels and writes blocks. Leaving it waits until everything is written, also after an
    error elsewhere: what the device has finished is not lost."""

    def __init__(self, job: Job):
        self._job, self._kept = job, []
        self._queue: queue.Queue[_Parcel | None] = queue.Queue(BEHIND)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def put(self, parcel: _Parcel) -> None:
        """Hand a parcel over; waits while too many are there. Raises what the thread has met with."""
        self._raise()
        self._queue.put(parcel)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (parcel := self._queue.get()) is not None:
            if self._error is None:  # after an error parcels are thrown away, so that nobody waits for room
                try:
                    self._take(parcel)
                except BaseException as error:  # raised in the main thread
                    self._error = error

    def _take(self, parcel: _Parcel) -> None:
        if parcel.arrived is not None:
            parcel.arrived.synchronize()
        arrays = tuple(tensor.numpy() for tensor in parcel.tensors)
        if parcel.number >= 0:
            self._kept.append(self._job.receive(parcel.block, parcel.batches[parcel.number], arrays))
        if parcel.number == len(parcel.batches) - 1:
            kept, self._kept = self._kept, []
            self._job.write(parcel.block, parcel.batches, kept)
