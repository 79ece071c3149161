"""Ranks that train a small model for a few steps after each other under several configurations; see test_elastic.py.

Started as one process per rank, with a JSON list of jobs. Each continues from a checkpoint or begins, saves at its end,
and adds a line with its losses and the exact weights to FOLDER/results.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from lexmae.config import OptimizationConfig
from lexmae.train import checkpoint
from lexmae.train import engine as engines
from lexmae.train.hardware import Hardware

BATCH = 8
OPTIMIZATION = OptimizationConfig(lr=1e-2, batch=BATCH, clip=1.0, weight_decay=0.1)


class Model(nn.Module):
    """Odd sizes, so that nothing divides evenly; a tied weight, a group with its own rate, an unused weight, a buffer.
    """

    def __init__(self, dropout: float):
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(7, 13), nn.LayerNorm(13), nn.Dropout(dropout)
        self.outer = nn.Linear(13, 7, bias=False)
        self.tied = self.outer.weight
        self.factor = nn.Parameter(torch.ones(3))
        self.factor.lr_factor = 3.0
        self.unused = nn.Parameter(torch.ones(5))
        self.register_buffer("offset", torch.full((2,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.norm(self.inner(x))))
        again = nn.functional.linear(hidden, self.tied)
        return (self.outer(hidden) + x).pow(2).mean(1) * self.factor.sum() + again.mean(1)


def data(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))


def hardware(stage: int, world: int, precision: str, accumulation: str | None, offload: bool) -> Hardware:
    config = {"train_batch_size": BATCH, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
              "train_micro_batch_size_per_gpu": BATCH // world // 2, "zero_allow_untested_optimizer": True,
              "steps_per_print": 10**9, "zero_optimization": {"stage": stage}}
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config[precision] |= {"initial_scale_power": 8}
        if not torch.cuda.is_available():  # slow there, but torch can
            get_accelerator().is_fp16_supported = lambda: True
    if offload:
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if accumulation:
        config["data_types"] = {"grad_accum_dtype": accumulation}
    return Hardware(world, BATCH // world // 2, 2, config)


def job(folder: Path, name: str, steps: int, stage: int, resume: str | None = None, precision: str = "fp32",
        accumulation: str | None = None, dropout: float = 0.0, poison: int | None = None,
        offload: bool = False) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(3)
    model = Model(dropout)
    torch.manual_seed(4 + rank)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    engine = engines.Engine(model, hardware(stage, world, precision, accumulation, offload), OPTIMIZATION, device)
    start = checkpoint.load(engine, folder / resume).step if resume else 0
    losses, norms, applied = [], [], []
    for step in range(start, start + steps):
        rows = data(step).split(BATCH // world)[rank]
        total = torch.zeros((), device=device)
        halves = rows.chunk(2)
        engine.expect(len(halves))
        for i, half in enumerate(halves):
            loss = engine(half.to(device, next(engine.module.parameters()).dtype)).float().sum() / BATCH
            if poison == step and rank == world - 1 and i == 1:
                loss = loss * torch.inf
            engine.backward(loss)
            total += loss.detach()
            if i == 0:
                engine.end_micro_batch()
        report = engine.step(1e-2 * (1 + step % 3))
        applied.append(report.applied)
        norms.append(report.grad_norm)
        losses.append(engine.sum(total).item())
    checkpoint.save(engine, folder / name, start + steps, {"name": name}, 2, {"skipped": 0})
    exact = {key: digest(engine, folder / name / f"step-{start + steps}", key) for key in ("weight", "exp_avg_sq")}
    with checkpoint.statefile.Reader(folder / name / f"step-{start + steps}") as reader:
        moment = sum(reader.read(key, "exp_avg_sq").sum().item() for key, _ in engine.module.named_parameters())
    state = engine.full_state(engine.module)
    if rank == 0:
        low = torch.float16 if precision == "fp16" else torch.bfloat16
        exported = all(torch.equal(value, value.to(low).float()) for value in state.values())
        with open(folder / "results.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps({"name": name, "start": start, "losses": losses, "norms": norms, "applied": applied,
                                  "moment": moment, "exported_low": exported, **exact}) + "\n")
    engine.barrier()


def digest(engine: engines.Engine, folder: Path, key: str) -> str:
    """One checksum over all values of a key in a checkpoint."""
    total = hashlib.sha256()
    with checkpoint.statefile.Reader(folder) as reader:
        for name, _ in sorted(engine.module.named_parameters()):
            total.update(reader.read(name, key).numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    engines.start_processes()
    for one in jobs:
        job(folder, **one)
    engines.stop_processes()


if __name__ == "__main__":
    main()
