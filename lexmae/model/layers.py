"""How the transformer layers of a model are computed: compiled, or with their activations computed again.

Both change the model in place, and neither what it computes nor the names of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(lm: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile what stands between token ids and last hidden states, for batches of any size.

    Args:
        backend: of `torch.compile`.
    """
    lm.base_model.compile(dynamic=True, backend=backend)


def recompute_layers(lm: PreTrainedModel) -> None:
    """Keep the input of each layer alone in training, and compute the layer again in the backward pass.

    transformers' own switch looks for word embeddings, which a decoder has not.
    """
    for module in lm.base_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, recomputed


def recomputed(compute: Callable[..., Any], *inputs: Any) -> Any:
    """What ``compute(*inputs)`` gives; of its activations the inputs alone are kept until the backward pass.

    Not reentrant, so that each parameter accumulates once, as ZeRO's reduction needs, and as a whole again, so that the
    hooks of ZeRO-3, where a parameter has another shape while it is split, see modules end.

    Args:
        inputs: a tensor among them: torch restores the random state (of dropout) of those GPUs alone whose tensors are
            positional arguments.
    """
    with set_checkpoint_early_stop(False):
        return checkpoint(compute, *inputs, use_reentrant=False, determinism_check="none")
