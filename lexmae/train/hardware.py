"""What belongs to the machine: reads a file of ``ds_configs/`` and joins it with the recipe's batch and clipping.

No torch and no deepspeed here, so that a wrong combination is refused within a second.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lexmae.config import FinetuneRecipe, OptimizationConfig
from lexmae.errors import InputError

_MICRO = "train_micro_batch_size_per_gpu"
_ALLREDUCE = "gradient_allreduce_op"
# Keys of a DeepSpeed configuration that say how a model learns: the recipe owns them.
_RECIPE_KEYS = {"train_batch_size": "optimization.batch", "gradient_accumulation_steps": "optimization.batch",
                "managed_gradient_accumulation": "optimization.micro_batch",
                "optimizer": "optimization.lr and its siblings", "scheduler": "optimization.warmup",
                "gradient_clipping": "optimization.clip"}


@dataclass(frozen=True)
class Hardware:
    """How a run is spread over ranks.

    Attributes:
        world: number of ranks.
        micro_batch: texts that a rank computes at a time; 0 where tokens say how many.
        accumulation: micro-batches per optimizer step; 0 where their number differs between steps.
        config: the complete DeepSpeed configuration.
        micro_tokens: tokens that a rank computes at a time; 0 where texts are counted.
    """

    world: int
    micro_batch: int
    accumulation: int
    config: dict[str, Any]
    micro_tokens: int = 0

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """``fp16``, ``bf16`` or ``fp32``."""
        return next((name for name in ("fp16", "bf16") if self.config.get(name, {}).get("enabled")), "fp32")

    @property
    def lowest_scale(self) -> float:
        """The smallest loss scale of fp16."""
        return float(self.config.get("fp16", {}).get("min_loss_scale", 1))


def find(name: str) -> Path:
    """A configuration by path, or by its path relative to the project that this file belongs to."""
    for base in (Path(), Path(__file__).resolve().parents[2]):
        if (base / name).is_file():
            return base / name
    raise InputError("no such DeepSpeed configuration", name)


def read(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration without the keys that a recipe owns.

    Raises:
        InputError: not JSON, or it sets what the recipe owns.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", path, getattr(error, "lineno", None)) from error
    if not isinstance(config, dict):
        raise InputError("a JSON object is needed", path)
    for key, owner in _RECIPE_KEYS.items():
        if key in config:
            raise InputError(f"sets {key}, which the recipe owns ({owner})", path)
    _check_sections(config, path)
    return config


def _check_sections(config: dict[str, Any], path: Path) -> None:
    """Refuse a precision or ZeRO stage that cannot be told."""
    for name in ("fp16", "bf16"):
        section = config.get(name, {})
        if not isinstance(section, dict) or not isinstance(section.get("enabled", False), bool):
            raise InputError(f'{name}: an object with "enabled" true or false is needed', path)
    if all(config.get(name, {}).get("enabled") for name in ("fp16", "bf16")):
        raise InputError("enables both fp16 and bf16: keep one of the two", path)
    if not isinstance(config.get("fp16", {}).get("min_loss_scale", 1), (int, float)):
        raise InputError("fp16.min_loss_scale: a number is needed", path)
    if config.get(_ALLREDUCE, "mean") != "mean":
        raise InputError(f"{_ALLREDUCE}: 'mean' is needed, losses are means over the ranks", path)
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError('zero_optimization: an object with "stage" 0, 1, 2 or 3 is needed', path)


def compose(path: Path, optimization: OptimizationConfig, world: int, *, accumulate: bool) -> Hardware:
    """Join the machine's configuration with the recipe's batch.

    Args:
        accumulate: whether micro-batches are steps of gradient accumulation or chunks of one computation: see
            ``accumulates``.

    Raises:
        InputError: a key is set on both sides, or the global batch cannot be divided as asked.
    """
    config = read(path)
    for name in ("micro_batch", "micro_tokens"):
        if _MICRO in config and getattr(optimization, name) is not None:
            raise InputError(f"sets {_MICRO} while the recipe sets optimization.{name}: keep one of the two", path)
    batch = optimization.batch
    if batch % world:
        raise InputError(f"optimization.batch {batch} cannot be shared evenly by {world} ranks")
    share = batch // world
    micro = optimization.micro_batch or config.get(_MICRO)
    if micro is not None and not (type(micro) is int and micro > 0):
        raise InputError(f"{_MICRO}: a positive whole number is needed, not {micro!r}", path)
    if accumulate:
        micro = min(micro or share, share)
        if share % micro:
            raise InputError(f"optimization.batch {batch} over {world} ranks is {share} per rank, "
                             f"which is not a multiple of the micro-batch {micro}")
    accumulation = share // micro if accumulate else 1
    tokens = optimization.micro_tokens or 0
    if tokens and accumulate:  # the engine is told where each step ends; these are the most micro-batches there can be
        accumulation = share
    config |= {"train_batch_size": batch, "gradient_accumulation_steps": accumulation,
               _MICRO: share // accumulation, "zero_allow_untested_optimizer": True,
               "steps_per_print": config.get("steps_per_print", 10**9)}
    if optimization.clip:
        config["gradient_clipping"] = optimization.clip
    if tokens:
        return Hardware(world, 0, 0 if accumulate else 1, config, tokens)
    return Hardware(world, micro or 0, accumulation, config)


def with_profile(hardware: Hardware, step: int, output: Path) -> Hardware:
    """With DeepSpeed's FLOPS profiler for one optimizer step, counted from 1; as it was for step 0.

    Args:
        output: the folder where it writes ``flops.txt``.
    """
    if not step:
        return hardware
    section = {"enabled": True, "profile_step": step - 1, "output_file": str(output / "flops.txt")}
    return replace(hardware, config={**hardware.config, "flops_profiler": section})


def accumulates(recipe: object) -> bool:
    """Whether a recipe's micro-batches are steps of gradient accumulation (pre-training, reranking) rather than chunks
    of one computation (fine-tuning, where every query meets every document of the global batch)."""
    return not isinstance(recipe, FinetuneRecipe)


def world_size() -> int:
    """Number of ranks that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_budget(hardware: Hardware, longest: int, what: str) -> None:
    """Refuse a budget of tokens that does not hold ``longest`` tokens, which ``what`` says in words."""
    if 0 < hardware.micro_tokens < longest:
        raise InputError(f"optimization.micro_tokens {hardware.micro_tokens}: {what}, so at least {longest} are needed")


def refuse_precision(hardware: Hardware, has_gpu: bool, path: Path) -> None:
    """Refuse fp16 where no GPU would compute it."""
    if hardware.precision == "fp16" and not has_gpu:
        raise InputError("asks for fp16, which needs a GPU; on a CPU use --deepspeed_config ds_configs/fp32_zero1.json",
                         path)
