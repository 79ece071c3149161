"""How the transformer layers of a model are computed: compiled, or with their activations computed again.

Both change the model in place, and neither what it computes nor the names of its weights.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def compile_layers(lm: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile what stands between token ids and last hidden states, for batches of any size.

    Args:
        backend: of `torch.compile`.
    """
    lm.base_model.compile(dynamic=True, backend=backend)


def recompute_layers(lm: PreTrainedModel) -> None:
    """Keep the input of each layer alone in training, and compute the layer again in the backward pass.

    Not reentrant, so that each parameter accumulates once, as ZeRO's reduction needs, and whole layers again, so that
    the hooks of ZeRO-3 see them end.
    """
    lm.gradient_checkpointing_enable({"use_reentrant": False, "early_stop": False, "determinism_check": "none"})
