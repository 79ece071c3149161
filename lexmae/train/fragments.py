"""Where DeepSpeed keeps the float32 weights and the moments of AdamW: by parameter, whatever the ZeRO stage.

| optimizer | a rank holds |
|---|---|
| AdamW itself (fp32 at stage 0) | everything |
| ``FP16_UnfusedOptimizer`` (fp16 and bf16 at stage 0) | a float32 copy of everything |
| ZeRO 1 and 2, ``BF16_Optimizer`` | a stretch of all parameters of a group, laid one behind the other |
| ZeRO 3 | the same share of every parameter, in groups that may lie on an NVMe disk |

Read here, a rank's share is a list of fragments: flat stretches of single parameters. Nothing crosses ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

KEYS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of one parameter.

    Attributes:
        start: first element held, of the parameter laid flat.
        count: elements held.
        size: elements of the whole parameter.
        shared: whether every rank holds the same.
        view: key → the elements, flat; writing into it changes the optimizer's own.
    """

    name: str
    start: int
    count: int
    size: int
    shared: bool
    view: Callable[[str], torch.Tensor]


def fragments(engine: Any) -> Iterator[Fragment]:
    """The fragments of a DeepSpeed engine on this rank, one after the other.

    A fragment may be read and changed until the next one is asked for (at stage 3 its group may leave the memory
    then).
    """
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _split(optimizer, names)
    if hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_groups_flat_partition"):
        return _linked(optimizer, names)
    return _whole(optimizer, names)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """The tensors that AdamW updates; their states are its own."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    groups = getattr(optimizer, "fp32_groups", None)
    return [p for group in (groups or [g["params"] for g in optimizer.param_groups]) for p in group]


def updates(optimizer: Any) -> float:
    """How many updates AdamW has made."""
    adam = _adam(optimizer)
    return max((float(adam.state[master]["step"]) for master in masters(optimizer) if "step" in adam.state[master]),
               default=0.0)


def set_updates(optimizer: Any, count: float) -> None:
    """Let AdamW go on after ``count`` updates."""
    for master in masters(optimizer):
        _state(_adam(optimizer), master)["step"].fill_(count)


def refresh(engine: Any, read: Callable[[str], torch.Tensor]) -> None:
    """Give the model the weights that the optimizer has been given.

    Args:
        read: name → the whole parameter in float32, flat.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for name, parameter in engine.module.named_parameters():
            parameter.data.copy_(read(name).view_as(parameter))
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        with _swapped_in(optimizer, group):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    kept = optimizer.persistent_parameters  # small ones, whole on every rank
    if kept:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def copies(optimizer: Any) -> dict[int, torch.Tensor]:
    """The whole float32 copies that ``FP16_UnfusedOptimizer`` keeps, by the id of their parameter; else empty."""
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(one): copy for group, kept in pairs for one, copy in zip(group, kept, strict=True)}


def _adam(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _state(adam: torch.optim.Optimizer, master: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a tensor, made where no update has made it."""
    state = adam.state[master]
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    return state


def _whole(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    adam = _adam(optimizer)
    low = getattr(optimizer, "fp16_groups", None)
    parameters = [p for group in (low or [g["params"] for g in optimizer.param_groups]) for p in group]
    for parameter, master in zip(parameters, masters(optimizer), strict=True):
        values = {**_state(adam, master), "weight": master}
        yield Fragment(names[id(parameter)], 0, master.numel(), master.numel(), True,
                       lambda key, values=values: values[key].data.view(-1))


def _linked(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    for group, master in zip(groups, masters(optimizer), strict=True):
        values = {**_state(optimizer.optimizer, master), "weight": master}
        for parameter in group:
            linked = parameter._hp_mapping
            if linked is not None:  # else it lies on other ranks
                here, there = linked.lp_fragment_address, linked.hp_fragment_address
                yield Fragment(names[id(parameter)], here.start, here.numel, parameter.numel(), False,
                               lambda key, values=values, there=there:
                               values[key].data.narrow(0, there.start, there.numel))


def _split(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for number, group in enumerate(optimizer.fp16_groups):
        with _swapped_in(optimizer, number):
            master = optimizer.fp32_partitioned_groups_flat[number]
            values = {**_state(optimizer.optimizer, master), "weight": master}
            for parameter in group:
                _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = optimizer._get_param_partition_rank(parameter) * share
                count = min(share, parameter.ds_numel - start)  # the last share is filled up
                if count > 0:
                    yield Fragment(names[id(parameter)], start, count, parameter.ds_numel, False,
                                   lambda key, values=values, offset=offset, count=count:
                                   values[key].data.narrow(0, offset, count))


@contextlib.contextmanager
def _swapped_in(optimizer: Any, group: int) -> Iterator[None]:
    swapped = optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)
