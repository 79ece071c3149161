"""The training engine: DeepSpeed behind the few calls that the loop needs, and what crosses ranks.

``deepspeed`` is imported here, nowhere else.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lexmae import lifeline, memory
from lexmae.config import OptimizationConfig
from lexmae.errors import InputError, one_line
from lexmae.ranks import Hosts
from lexmae.train import fragments
from lexmae.train.hardware import Hardware

if not torch.cuda.is_available():  # before deepspeed chooses for itself
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfigError  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes of a loss scaler
_PATIENCE = datetime.timedelta(minutes=2)  # for `lifeline` to name a hung rank before torch gives up
_FOR_EVER = datetime.timedelta(days=365)  # what torch waits where nothing counts as hung


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step tells: the gradient norm before clipping where it is known, the loss scale, and whether
    the update was applied: it is not where a gradient is not finite, on any rank."""

    grad_norm: float | None
    loss_scale: float
    applied: bool


def start_processes() -> torch.device:
    """Join the ranks that the launcher started (or stand alone) and return this rank's device."""
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    else:
        memory.keep_freed_blocks()
        # DeepSpeed's shared-memory operator serves inference alone, and would be compiled at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    seconds = lifeline.hung_limit()
    wait = datetime.timedelta(seconds=seconds) + _PATIENCE if 0 < seconds < _FOR_EVER.total_seconds() else _FOR_EVER
    patience = {"timeout": max(wait, deepspeed.constants.default_pg_timeout)}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, **patience)
    lifeline.begin()
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def stop_processes() -> None:
    """Leave the group of ranks."""
    lifeline.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Gather(torch.autograd.Function):
    """All ranks' rows, for a loss that every rank computes alike.

    Each rank holds the whole loss, and the engine averages gradients over the ranks. A rank's own slice of the
    gradient, times the number of ranks, is therefore the gradient of the loss that one rank would compute.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        ctx.count = len(rows)
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        start = dist.get_rank() * ctx.count
        return gradient[start:start + ctx.count] * dist.get_world_size()


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, …] of every rank in rank order, [world·B, …]; differentiable where all ranks compute the same loss."""
    return rows if not dist.is_initialized() or dist.get_world_size() == 1 else _Gather.apply(rows)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices, none on biases and normalisation weights (vectors).

    Parameters with an attribute ``lr_factor`` learn at that multiple of the learning rate; they have groups of their
    own, and the factor stands in each group.
    """
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (getattr(parameter, "lr_factor", 1.0), parameter.ndim <= 1)
            groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "weight_decay": 0.0 if is_vector else weight_decay, "lr_factor": factor}
            for (factor, is_vector), parameters in sorted(groups.items(), key=lambda item: item[0])]


class _AdamW(torch.optim.AdamW):
    """AdamW that leaves out an update where told so, as DeepSpeed's own optimizers do."""

    overflow = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the weights, unless ``overflow``."""
        if not self.overflow:
            super().step(closure)


def _reason(error: Exception) -> str:
    """The key and reason of a pydantic error's first part, or what another error says."""
    if callable(getattr(error, "errors", None)):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return one_line(error)


class Engine:
    """A model under DeepSpeed.

    Args:
        model: module in float32, equal on all ranks.
        hardware: ZeRO stage, precision, micro-batch.
        optimization: AdamW settings; the learning rate is set at every step.
        hosts: those of the run, and which see the folder of its checkpoints; one host by default.
    """

    def __init__(self, model: torch.nn.Module, hardware: Hardware, optimization: OptimizationConfig,
                 device: torch.device, hosts: Hosts | None = None):
        kind = _AdamW if hardware.zero_stage == 0 else torch.optim.AdamW  # DeepSpeed warns of what it does not know
        optimizer = kind(
            parameter_groups(model, optimization.weight_decay), lr=0.0,  # some wrappers make an empty step at once
            betas=(optimization.beta1, optimization.beta2), eps=optimization.epsilon, fused=True)
        self.hardware, self.device, self.hosts = hardware, device, hosts
        try:
            deepspeed.DeepSpeedConfig(dict(hardware.config))
        except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
            raise InputError(f"DeepSpeed refuses the configuration: {_reason(error)}") from error
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(hardware.config),
                                                  dist_init_required=False)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world == 1 and hardware.zero_stage == 0:  # no copy of all gradients for an exchange with nobody
            self.deepspeed.enable_backward_allreduce = False
        wrapper = self.deepspeed.optimizer
        if hasattr(wrapper, "check_grad_overflow") and not (
                hardware.precision == "fp32" and wrapper.compute_grad_norm):  # else the norm tells
            wrapper.check_grad_overflow = True
        scaler = self._scaler()
        if hasattr(scaler, "raise_error_at_min_scale"):  # `health.Skips` has more to say
            scaler.raise_error_at_min_scale = False
        # Without ZeRO, DeepSpeed divides gradients by the loss scale of fp16, and their norm is that before; whether it
        # multiplies the loss with it depends on its version (github.com/deepspeedai/DeepSpeed/pull/8393).
        self._scales_itself = hardware.precision == "fp16" and hardware.zero_stage == 0
        if fragments.updates(wrapper):  # that empty step would count in AdamW's bias correction
            fragments.set_updates(wrapper, 0.0)
        self._left = 0

    @property
    def module(self) -> torch.nn.Module:
        """The model itself."""
        return self.deepspeed.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's loss.

        The shares of all micro-batches and ranks sum to the loss of the step; DeepSpeed averages over both, which is
        undone here. A share that is not finite makes every gradient not a number, so that no rank applies the step.
        """
        with torch.no_grad():
            factor = torch.where(torch.isfinite(loss), float(self.world), torch.nan)
        share = loss * factor
        if self._scales_itself:
            share.register_hook(lambda gradient: torch.full_like(gradient, self.deepspeed.optimizer.loss_scale))
        self.deepspeed.backward(share, scale_wrt_gas=False)

    def expect(self, micro_batches: int) -> None:
        """Say how many micro-batches the step that begins has; the same number on every rank."""
        self._left = micro_batches
        self.deepspeed.set_gradient_accumulation_boundary(micro_batches == 1)

    def end_micro_batch(self) -> None:
        """Close a micro-batch that is not the last of its step."""
        self.deepspeed.step()
        self._count_down(self._left > 1)
        self.deepspeed.set_gradient_accumulation_boundary(self._left == 1)

    def _count_down(self, right: bool) -> None:
        if not right:  # DeepSpeed would have taken the gradients of this micro-batch for those of another step
            raise RuntimeError("a step has another number of micro-batches than `expect` was told")
        self._left -= 1

    def step(self, lr: float) -> StepReport:
        """Close the last micro-batch and update the weights with learning rate ``lr``."""
        self._count_down(self._left == 1)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        wrapper = self.deepspeed.optimizer
        own_norm = None if hasattr(wrapper, "_global_grad_norm") else self._grad_norm()
        if own_norm is not None:
            wrapper.overflow = not bool(torch.isfinite(own_norm))
        scaled_by = wrapper.loss_scale if self._scales_itself else 1.0
        self.deepspeed.step()
        memory.tidy()
        norm = self.deepspeed.get_global_grad_norm() if own_norm is None else own_norm
        scale = getattr(wrapper, "cur_scale", getattr(wrapper, "loss_scale", 1.0))
        return StepReport(None if norm is None else float(norm) / scaled_by, float(scale),
                          bool(self.deepspeed.was_step_applied()))

    def _grad_norm(self) -> torch.Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients inside; afterwards mode and random state are what they were."""
        was, state = self.module.training, rng_state(self.device)
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(was)
            set_rng_state(state, self.device)

    def scaler_state(self) -> dict[str, float]:
        """What the loss scaling of fp16 has come to, as JSON values; empty in other precisions."""
        scaler = self._scaler()
        return {name: getattr(scaler, name) for name in _SCALER if getattr(scaler, name, None) is not None}

    def set_scaler_state(self, state: dict[str, float]) -> None:
        """Restore what ``scaler_state`` gave, as far as this precision and stage have a use for it."""
        scaler = self._scaler()
        for name in _SCALER:
            if getattr(scaler, name, None) is not None and name in state:
                setattr(scaler, name, state[name])

    def _scaler(self) -> Any:
        wrapper = self.deepspeed.optimizer
        return getattr(wrapper, "loss_scale_config", getattr(wrapper, "loss_scaler", None)) if (
            self.hardware.precision == "fp16") else None

    def gather_texts(self, text: str) -> list[str]:
        """A short text of every rank, in the order of the ranks; the first 400 bytes of each."""
        if self.world == 1:
            return [text]
        own = torch.zeros(1, 400, dtype=torch.uint8)
        data = text.encode()[:own.shape[1]]
        own[0, :len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = gather(own.to(self.device)).cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def full_state(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """float32 state dict of a part of the model on the CPU of rank 0, empty elsewhere. Every rank must call it.

        Weights are the optimizer's float32 copies where the precision is lower, gathered where ZeRO splits them.
        """
        state, seen, copies = {}, {}, fragments.copies(self.deepspeed.optimizer)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) not in seen:
                split = _is_split(parameter)
                full = safe_get_full_fp32_param(parameter) if split else copies.get(id(parameter))
                full = parameter.detach() if full is None else full.detach()
                seen[id(parameter)] = full.float().cpu().clone() if self.rank == 0 else None
            state[name] = seen[id(parameter)]
        persistent = module.state_dict().keys()
        state |= {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in persistent}
        return state if self.rank == 0 else {}


def _is_split(parameter: torch.nn.Parameter) -> bool:
    # The mapping is None on ranks that hold no part of the parameter; they take part in gathering it all the same.
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def on_rank_zero(action: Callable[[], Any], hosts: Hosts | None = None) -> None:
    """Run ``action`` on rank 0 while the others wait; an error of it stops every rank.

    Args:
        hosts: run it also on the hosts that have a folder of their own, once on each.
    """
    failed = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    error: BaseException | None = None
    if dist.get_rank() == 0 if hosts is None else hosts.leads:
        try:
            action()
        except Exception as caught:  # raised again below, once the other ranks know
            error, failed = caught, failed + 1
    dist.all_reduce(failed)
    if error is not None:
        raise error
    if failed.item():
        raise SystemExit(1)


def rng_state(device: torch.device) -> dict[str, Any]:
    """This rank's random state of torch (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``rng_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
