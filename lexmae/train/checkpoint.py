"""Checkpoints: ``checkpoints/step-N`` directories that are complete or absent, and finding the one to resume from.

A checkpoint holds DeepSpeed's state (weights, optimizer, loss scale), each rank's random state, and the step. Data
order, learning rate and λ are functions of the step, so nothing else is needed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lexmae import artifact
from lexmae.cli import is_main_rank, say
from lexmae.errors import InputError
from lexmae.ranks import Hosts, several_hosts
from lexmae.train import engine as engines
from lexmae.train.engine import Engine

KIND = "checkpoint"
_TAG = "engine"
_RECEIVED = ".received"  # a checkpoint of rank 0's host, on a host that does not see its folder


def steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(m[1]) for m in found if m and artifact.exists(folder / m[0]))


def save(engine: Engine, folder: Path, step: int, config: Mapping[str, Any], keep: int,
         objective: Mapping[str, Any] | None = None) -> None:
    """Write ``folder/step-N`` from all ranks, then remove all but the newest ``keep`` checkpoints.

    Args:
        objective: what the objective has to keep, as JSON values.
    """
    target, hosts = folder / f"step-{step}", engine.hosts
    exists = artifact.exists(target)
    if exists if hosts is None else hosts.agree(exists):
        return
    draft = artifact.Draft(artifact.partial_path(target), counts={"step": step},
                           extra={"world": engine.world, "zero_stage": engine.hardware.zero_stage,
                                  "precision": engine.hardware.precision, "objective": dict(objective or {})})
    engines.on_rank_zero(lambda: _fresh(draft.path), hosts)
    engine.deepspeed.save_checkpoint(str(draft.path), tag=_TAG, save_latest=False)
    torch.save(engines.rng_state(engine.device), draft.path / f"random-{engine.rank:05d}.pt")
    engine.barrier()
    if hosts is not None and hosts.apart:
        hosts.collect(draft.path)
        if engine.rank in hosts.apart:
            shutil.rmtree(draft.path)

    def finish() -> None:
        artifact.seal(draft, target, KIND, config=config)
        for old in steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")

    engines.on_rank_zero(finish)


def _fresh(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def choose(folder: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` names: ``auto`` is the newest one if any, otherwise a step or a path.

    On another host than rank 0's the folder may be another: what rank 0 finds counts (see ``fetch``).

    Raises:
        InputError: the named checkpoint does not exist.
    """
    if resume == "auto":
        known = steps(folder)
        return folder / f"step-{known[-1]}" if known else None
    path = folder / f"step-{resume}" if resume.isdigit() else Path(resume)
    if several_hosts() and not is_main_rank() and not artifact.exists(path):
        return None
    artifact.read(path, KIND)
    return path


def fetch(hosts: Hosts, chosen: Path | None) -> Path | None:
    """Rank 0's choice on every rank: on hosts that do not see it, a copy that ``load`` removes."""
    name = hosts.agree(None if chosen is None else str(chosen))
    if name is None or len(hosts.names) == 1:
        return chosen
    found = Hosts(Path(name).parent)
    return found.hand_out(Path(name), Path(name).with_name(_RECEIVED))


def refuse_mismatch(path: Path, config: Mapping[str, Any], world: int, zero_stage: int) -> None:
    """Refuse a checkpoint of another recipe, number of ranks or ZeRO stage.

    Raises:
        InputError: names the first setting that differs.
    """
    manifest = artifact.read(path, KIND)
    differing = _first_difference(manifest.config, config)
    if differing:
        key, old, new = differing
        raise InputError(f"was made with {key} = {old!r}, the recipe now says {new!r}", path)
    for name, now in (("world", world), ("zero_stage", zero_stage)):
        if manifest.extra[name] != now:
            what = {"world": "ranks", "zero_stage": "as ZeRO stage"}[name]
            raise InputError(f"was made with {manifest.extra[name]} {what}, now there is {now}", path)


def _first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return None
    same = list(old) == list(new) if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) else old == new
    return None if same else (where, old, new)


def load(engine: Engine, path: Path) -> tuple[int, dict[str, Any]]:
    """Restore weights, optimizer and random state; returns the number of steps done and the objective's state."""
    say(f"resuming from {path}")
    loaded = engine.load(path, _TAG)
    if loaded is None:
        raise InputError("DeepSpeed could not load this checkpoint", path)
    engines.set_rng_state(torch.load(path / f"random-{engine.rank:05d}.pt", weights_only=True), engine.device)
    manifest = artifact.read(path, KIND)
    engine.barrier()
    if path.name == _RECEIVED:
        shutil.rmtree(path, ignore_errors=True)
    return manifest.fact("step", int, "counts"), dict(manifest.fact("objective", dict))
