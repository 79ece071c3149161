"""Checkpoints: ``checkpoints/step-N`` directories that are complete or absent, and finding the one to resume from.

A checkpoint holds the float32 weights and the moments of AdamW by parameter (``statefile``), each rank's random state,
and in its manifest the step, loss scaling and what objective and loop have to keep. It says nothing of ZeRO: it
continues at any stage, in any precision, on any number of ranks. Data order, learning rate and λ are functions of the
step, so nothing else is needed.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lexmae import artifact
from lexmae.cli import is_main_rank, say
from lexmae.errors import InputError, RunError
from lexmae.ranks import Hosts, several_hosts
from lexmae.renaming import remove
from lexmae.train import engine as engines
from lexmae.train import fragments, statefile
from lexmae.train.engine import Engine
from lexmae.train.statefile import Stretch

KIND = "checkpoint"
PROBE = "probe_mrr_10"  # the fact by which the best checkpoint is told
PROBED = "probed"  # the fact on which the figures of probes depend
INPUTS = "inputs"  # the fact of what is trained on: path → fingerprint or checksum
_RECEIVED = ".received"  # a checkpoint of rank 0's host, on a host that does not see its folder
_RANDOM = "random"


@dataclass(frozen=True)
class Resumed:
    """Where a continued run stands.

    Attributes:
        step: optimizer steps done.
        facts: what ``save`` was given.
    """

    step: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, ascending."""
    return sorted(step for step, path in _named(folder) if artifact.exists(path))


def _named(folder: Path) -> Iterator[tuple[int, Path]]:
    """Directories with the name of a checkpoint: all that were finished, some perhaps damaged since."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"step-(\d+)", path.name):
            yield int(match[1]), path


# ---------------------------------------------------------------------------------------------------------- saving


def save(engine: Engine, folder: Path, step: int, config: Mapping[str, Any], keep: int,
         facts: Mapping[str, Any]) -> None:
    """Write ``folder/step-N`` from all ranks; when it has been read back, remove older ones.

    Kept are the newest ``keep`` and the best: the one whose facts have the highest ``probe_mrr_10``.

    Args:
        facts: what objective and loop have to keep, as JSON values.

    Raises:
        RunError: on every rank: it could not be written or read back. Older ones are as they were.
    """
    target, hosts = folder / f"step-{step}", engine.hosts
    draft = artifact.Draft(artifact.partial_path(target), counts={"step": step},
                           extra={**facts, "world": engine.world, "zero_stage": engine.hardware.zero_stage,
                                  "precision": engine.hardware.precision, "updates": 0.0, "scaler": {}})
    leads = engine.rank == 0 if hosts is None else hosts.leads
    name = statefile.file_name(engine.rank, engine.world)
    try:
        _together(engine, target, lambda: _fresh(draft.path) if leads else None)
        known = _together(engine, target, lambda: _write(engine, draft.path / name))
        draft.known.update((statefile.file_name(rank, engine.world), digest) for rank, digest in enumerate(known))
        draft.extra.update(updates=fragments.updates(engine.deepspeed.optimizer), scaler=engine.scaler_state())
        if hosts is not None and hosts.apart:
            hosts.collect(draft.path)
            if engine.rank in hosts.apart:
                shutil.rmtree(draft.path)
        _together(engine, target, lambda: _finish(draft, target, config, keep) if engine.rank == 0 else None)
    except RunError:
        if leads:
            shutil.rmtree(draft.path, ignore_errors=True)
        raise


def _together(engine: Engine, target: Path, action: Callable[[], str | None]) -> list[str]:
    """Run ``action`` on every rank; returns what each of them gave, or raises on all what failed on one."""
    given, reason, own = "", "", None
    try:
        given = action() or ""
    except OSError as error:
        own, reason = error, error.strerror or str(error)
    answers = engine.gather_texts(f"!{reason}" if own is not None else given)
    if failed := next((answer[1:] for answer in answers if answer.startswith("!")), None):
        known = steps(target.parent)
        last = f"the last good one is {target.with_name(f'step-{known[-1]}')}" if known else "there is none before it"
        raise RunError(f"{target}: the checkpoint could not be written: {failed}; {last}") from own
    return answers


def _fresh(path: Path) -> None:
    remove(path)
    path.mkdir(parents=True)


def _write(engine: Engine, path: Path) -> str:
    """This rank's part of the state; returns its checksum."""
    random = engines.rng_state(engine.device)
    buffers = _buffers(engine) if engine.rank == 0 else {}
    plan = [Stretch(f"{_RANDOM}.{engine.rank}", kind, 0, len(state), torch.uint8) for kind, state in random.items()]
    plan += [Stretch(name, "buffer", 0, buffer.numel(), buffer.dtype) for name, buffer in buffers.items()]
    for one in fragments.fragments(engine.deepspeed):
        first, count = _own_part(one, engine)
        plan += [Stretch(one.name, key, one.start + first, count) for key in fragments.KEYS if count]

    def values() -> Iterator[torch.Tensor]:
        yield from random.values()
        yield from buffers.values()
        for one in fragments.fragments(engine.deepspeed):
            first, count = _own_part(one, engine)
            yield from (one.view(key)[first:first + count] for key in fragments.KEYS if count)

    return statefile.write(path, plan, values())


def _own_part(one: fragments.Fragment, engine: Engine) -> tuple[int, int]:
    """First element and number of elements of a fragment that this rank writes: all, or a share of what all hold."""
    if not one.shared:
        return 0, one.count
    each = -(-one.count // engine.world)
    first = min(engine.rank * each, one.count)
    return first, min(each, one.count - first)


def _buffers(engine: Engine) -> dict[str, torch.Tensor]:
    kept = engine.module.state_dict().keys()
    return {name: buffer.float() if buffer.is_floating_point() else buffer
            for name, buffer in engine.module.named_buffers() if name in kept and buffer.numel()}


def _finish(draft: artifact.Draft, target: Path, config: Mapping[str, Any], keep: int) -> None:
    """Read the files back, give the checkpoint its name, and remove what is no longer needed."""
    for name, digest in draft.known.items():
        if artifact.checksum(draft.path / name) != digest:
            raise OSError(errno.EIO, f"{name} does not hold what was written into it")
    artifact.seal(draft, target, KIND, config=config)
    _remove_old(target.parent, draft.counts["step"], keep)


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints up to ``step`` but the newest ``keep`` and the best, and what stopped runs left."""
    known = [number for number in steps(folder) if number <= step]
    kept = {*known[-keep:], best(folder, known)}
    for number in known:
        if number not in kept:
            path = folder / f"step-{number}"
            path.rename(path.with_name(f"{path.name}.removed"))
    for path in folder.glob("step-*"):
        if path.suffix in (".removed", ".partial"):
            remove(path)


def best(folder: Path, known: Sequence[int]) -> int | None:
    """The earliest of the steps ``known`` whose checkpoint has the highest figure of a probe; None where none has.
    Figures of other probes than the newest one's do not count."""
    figures, probed = {}, None
    for step in sorted(known, reverse=True):
        try:
            manifest = artifact.read(folder / f"step-{step}", KIND)
            figure = manifest.fact(PROBE, float)
        except InputError:  # no probe at that step, or damaged
            continue
        if not figures:
            probed = manifest.extra.get(PROBED)
        if manifest.extra.get(PROBED) == probed:
            figures[step] = figure
    return max(figures, key=lambda step: (figures[step], -step), default=None)


# --------------------------------------------------------------------------------------------------------- resuming


def candidates(folder: Path, resume: str) -> list[Path]:
    """The checkpoints that ``--resume`` may mean, the first choice first.

    ``auto`` is the newest, and in its place those before it, one after the other; a step or a path names one. On
    another host than rank 0's the folder may be another: what rank 0 finds counts (see ``settle``).

    Raises:
        InputError: the named checkpoint does not exist.
    """
    if resume == "auto":
        return [path for _, path in sorted(_named(folder), reverse=True)]
    path = folder / f"step-{resume}" if resume.isdigit() else Path(resume)
    if several_hosts() and not is_main_rank() and not artifact.exists(path):
        return []
    artifact.read(path, KIND)
    return [path]


def refuse_mismatch(paths: Sequence[Path], config: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """Refuse checkpoints of another recipe or other data, by the first of them that can be read.

    Args:
        inputs: what is trained on now: path → fingerprint or checksum. A checkpoint of an earlier version does not
            say all of them.

    Raises:
        InputError: names the first setting, or the path of data, that differs.
    """
    for path in paths:
        try:
            manifest = artifact.read(path, KIND)
        except InputError:  # `settle` says so
            continue
        if differing := _first_difference(manifest.config, config):
            key, old, new = differing
            raise InputError(f"was made with {key} = {old!r}, the recipe now says {new!r}", path)
        before = manifest.extra.get(INPUTS, {})
        if changed := next((name for name in inputs if before.get(name, inputs[name]) != inputs[name]), None):
            raise InputError(f"was made with other data than {changed} now holds: choose another output", path)
        return


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    same = list(old) == list(new) if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) else old == new
    return None if same else (where, old, new)


def settle(hosts: Hosts, paths: Sequence[Path]) -> Path | None:
    """The first undamaged one of ``candidates`` as rank 0 finds it, for every rank; None where there are none.

    Every checksum is computed. What is damaged is passed over with a line that says so, and left as it is. On hosts
    that do not see rank 0's folder the path is that of a copy, which ``load`` removes.

    Raises:
        InputError: on every rank: all of them are damaged.
    """
    path, reason = _first_good(paths) if hosts.rank == 0 else (None, "")
    path, reason = hosts.agree((path, reason))
    if reason:
        raise InputError(reason)
    if path is None or len(hosts.names) == 1:
        return path
    return Hosts(path.parent).hand_out(path, path.with_name(_RECEIVED))


def _first_good(paths: Sequence[Path]) -> tuple[Path | None, str]:
    """An undamaged checkpoint, or none and why."""
    reasons: list[str] = []
    for path in paths:
        try:
            artifact.verify(path)
            artifact.read(path, KIND).fact("updates", float)
        except InputError as error:
            reasons.append(str(error))
            continue
        if reasons:
            say(f"warning: {reasons[0]}: passed over, continuing from {path}")
        return path, ""
    if len(reasons) > 1:
        return None, f"{reasons[0]}; none of the {len(reasons)} checkpoints is whole, nothing was changed"
    return None, reasons[0] if reasons else ""


def load(engine: Engine, path: Path) -> Resumed:
    """Restore weights, moments, loss scaling and random state from a checkpoint of any number of ranks and any stage.

    Dropout goes on as it would have where the number of ranks is the same; otherwise each rank draws anew.

    Raises:
        InputError: it is not a checkpoint of this model.
    """
    say(f"resuming from {path}")
    manifest = artifact.read(path, KIND)
    step, scaler = manifest.fact("step", int, "counts"), manifest.fact("scaler", dict)
    with statefile.Reader(path) as reader:
        for one in fragments.fragments(engine.deepspeed):
            if reader.size(one.name, fragments.KEYS[0]) != one.size:
                raise InputError(f"was made with another model: {one.name} does not have {one.size} weights", path)
            for key in fragments.KEYS:
                one.view(key).copy_(reader.read(one.name, key, one.start, one.count))
        fragments.set_updates(engine.deepspeed.optimizer, manifest.fact("updates", float))
        fragments.refresh(engine.deepspeed, lambda name: reader.read(name, fragments.KEYS[0]))
        for name, buffer in engine.module.named_buffers():
            if reader.size(name, "buffer") == buffer.numel() and buffer.numel():
                buffer.copy_(reader.read(name, "buffer").view_as(buffer))
        engine.set_scaler_state(scaler)
        engine.deepspeed.global_steps = step
        if manifest.extra["world"] == engine.world:
            own = f"{_RANDOM}.{engine.rank}"
            state = {kind: reader.read(own, kind) for kind in ("cpu", "cuda") if reader.size(own, kind)}
            engines.set_rng_state(state, engine.device)
        else:
            torch.manual_seed(torch.initial_seed() + step * engine.world)
    engine.barrier()
    if path.name == _RECEIVED:
        shutil.rmtree(path, ignore_errors=True)
    return Resumed(step, dict(manifest.extra))
