"""Long work over many texts in blocks: shared among ranks, restartable block by block, in batches of bounded size.

Blocks are of fixed size, whatever the number of ranks; block ``i`` belongs to rank ``i mod world`` and becomes one part
file of an unfinished output. A run that was stopped goes on with the parts that are missing, also on another number of
ranks, and the result is the same.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexmae import artifact, lifeline, locks, memory
from lexmae.cli import is_main_rank, say
from lexmae.errors import InputError
from lexmae.ranks import Hosts, several_hosts

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Padded tokens of a batch: a CPU's activations stay in its cache, a GPU has much to do at once."""
STATE = "begun.json"
"""The file among the parts that says what they are made of."""
_PARTS = "part-*"


@contextlib.contextmanager
def ranks() -> Iterator[tuple[int, int, torch.device]]:
    """This process's rank, the number of ranks, and its device; ranks only ever wait for each other."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        memory.keep_freed_blocks()
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        lifeline.begin()
    try:
        yield rank, world, device
    except Exception as error:
        lifeline.blame(error)
    finally:
        lifeline.end()
        if world > 1:
            torch.distributed.destroy_process_group()


def hosts(output: Path, **same: Any) -> Hosts:
    """The hosts of the run and the folder of the output; every rank calls it.

    Args:
        same: fingerprints of what every host reads, perhaps from a copy of its own.

    Raises:
        InputError: two hosts read something different.
    """
    found = Hosts(artifact.partial_path(output).parent)
    found.refuse_difference(**same)
    return found


def refuse_existing(output: Path, overwrite: bool) -> None:
    """As ``artifact.refuse_existing``, where this process would write the output."""
    if is_main_rank() or not several_hosts():
        artifact.refuse_existing(output, overwrite)


@contextlib.contextmanager
def writing(output: Path, overwrite: bool = False) -> Iterator[None]:
    """From the checks to the end of the work: rank 0 keeps other commands away from the output (see ``lexmae.locks``).

    Raises:
        InputError: on rank 0, where another command writes the output, or has finished it meanwhile.
    """
    with locks.writing(output, here=is_main_rank()):
        if is_main_rank() and not overwrite and artifact.is_taken(output):
            raise InputError("already exists: another command has made it meanwhile", output)
        yield


def own(count: int, block: int, rank: int, world: int) -> list[int]:
    """The blocks of a rank, of ``count`` items in blocks of ``block``."""
    return list(range(rank, -(-count // block), world))


def missing(own: Sequence[int], there: Collection[str], name: Callable[[int], str]) -> list[int]:
    """The blocks of a rank whose part, by its file's ``name``, is not there yet."""
    left = [block for block in own if name(block) not in there]
    if len(left) < len(own):
        say(f"{len(own) - len(left)} of {len(own)} parts are there already")
    return left


def precision(name: str, device: torch.device) -> str:
    """A key of ``PRECISIONS``; ``auto`` is bf16 on a GPU that has it, fp32 elsewhere."""
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def open_partial(output: Path, state: Mapping[str, Any], hosts: Hosts) -> tuple[Path, set[str]]:
    """The folder of finished parts to go on with, emptied where it was begun from other inputs or settings.

    Every rank calls it.

    Args:
        output: what is to be made.
        state: JSON values; everything that the parts depend on.

    Returns:
        the folder, and the names of the parts that need not be made again.
    """
    partial = artifact.partial_path(output)
    if hosts.leads:
        begun = partial / STATE
        if partial.exists() and _read_state(begun) != state:
            say(f"{partial} was begun from other inputs: starting again")
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        for unfinished in partial.glob(".*"):  # what a killed run was writing
            unfinished.unlink()
        with artifact.atomic_file(begun) as out:
            json.dump(state, out)
    hosts.barrier()
    names = {part.name for part in partial.glob(_PARTS)}
    return partial, names | hosts.agree(names)


def _read_state(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def collect(hosts: Hosts, partial: Path, count: int) -> None:
    """Wait for all ranks; then all ``count`` parts are in rank 0's folder, and nowhere else.

    Raises:
        InputError: on rank 0, where one is missing.
    """
    hosts.barrier()
    hosts.collect(partial, [part.name for part in partial.glob(_PARTS)] if hosts.apart else [])
    if hosts.rank in hosts.apart:
        shutil.rmtree(partial)
    if hosts.leads and hosts.rank not in hosts.apart:
        found = len(list(partial.glob(_PARTS)))
        if found != count:
            raise InputError(f"holds {found} parts of {count}; the same command again makes the others", partial)


def with_batch_tokens(config: Any, device: torch.device) -> Any:
    """An encoding's or scoring's configuration with the size of batches that suits the device, where it has none."""
    return replace(config, batch_tokens=config.batch_tokens or BATCH_TOKENS[device.type])


def by_length(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Positions in batches of similar length, longest first, each at most ``batch_tokens`` with padding."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start:start + size]
        start += size
