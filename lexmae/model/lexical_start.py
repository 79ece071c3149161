"""Starting points for a lexicon encoder: a model from scratch that names its own tokens, rare tokens that weigh more.

A lexicon encoder learns from the words that query and document share. With the usual initial weights a model made
from scratch has to find out first that the output entry of a token belongs to its input embedding, which costs more
steps than a small machine has. These weights start there: layers change the residual stream little, the LM head's
transform is close to the identity, and the tied output matrix then gives a token's own entry the largest logit. The
architecture is unchanged; nothing of it is fixed in training.

A masked language model expects frequent tokens everywhere, while a lexicon wants them to weigh little. Lowering the
output bias of a token by how frequent it is gives fine-tuning the inverse document frequency that BM25 has, in place
of letting it find out.

It also compares logits with each other alone: the same number added to all of them changes no loss, of the encoder or
of a decoder that reads their softmax, and they drift. relu, however, keeps what is above zero. Shifting all output
biases until documents have as many terms as wanted puts zero where it belongs.

Shapes: B sequences, L tokens, H hidden size, V vocabulary, N texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lexmae.errors import InputError
from lexmae.model import backbone
from lexmae.model.head import max_logits

_RESIDUAL_GAIN = 0.2
_POSITION_GAIN = 0.3
LINEAR_SHIFT = 3.0  # gelu(x + 3) is nearly x + 3 for |x| < 3; the LayerNorm behind it removes the 3
_OUTPUT_BIAS = -4.0  # about what chance reaches for an unrelated entry: relu then keeps the tokens of the text


@torch.no_grad()
def start_lexical(lm: PreTrainedModel) -> None:
    """Overwrite the weights of ``lm``, a model made from scratch, in place; a function of torch's generator.

    Word embeddings have standard deviation 1/√H; position embeddings 0.3 of it; segment embeddings 0; layers reading
    the residual stream 1/√fan-in, those writing to it 0.2 of it.
    """
    words = lm.get_input_embeddings()
    scale = 1 / math.sqrt(words.weight.shape[1])
    for name, module in lm.base_model.named_modules():
        if isinstance(module, nn.Embedding):
            gain = 1.0 if module is words else _POSITION_GAIN if "position" in name else 0.0
            nn.init.normal_(module.weight, 0.0, gain * scale) if gain else nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            gain = _RESIDUAL_GAIN if backbone.writes_to_residual(name) else 1.0
            nn.init.normal_(module.weight, 0.0, gain / math.sqrt(module.in_features))
    dense, output = backbone.head_layers(lm)[0], lm.get_output_embeddings()
    nn.init.eye_(dense.weight)
    if dense.bias is not None:
        nn.init.constant_(dense.bias, LINEAR_SHIFT)
    if output.bias is not None:
        nn.init.constant_(output.bias, _OUTPUT_BIAS)


@torch.no_grad()
def penalise_frequency(lm: PreTrainedModel, document_frequency: Tensor, documents: int, penalty: float) -> None:
    """Lower the output bias of token v by ``penalty · (1 − idf_v)``, in place.

    idf is that of BM25, ``log(1 + (N − df + 0.5) / (df + 0.5))``, divided by its largest possible value: a token
    of no document keeps its bias, one of every document loses nearly ``penalty``.

    Args:
        document_frequency: [≤ V], documents that hold each token; tokens beyond it count as unseen.
        documents: number of documents N.

    Raises:
        InputError: the backbone's output has no bias.
    """
    bias = output_bias(lm, "frequency_penalty")
    df = document_frequency.to(bias)
    idf = torch.log1p((documents - df + 0.5) / (df + 0.5)) / math.log1p((documents + 0.5) / 0.5)
    bias[:len(df)] -= penalty * (1 - idf)


@torch.no_grad()
def level_bias(lm: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], terms: int,
               only_lower: bool = False) -> float:
    """Shift all output biases alike, in place, so that the texts have ``terms`` active terms on average.

    Args:
        lm: the masked language model, whose other weights are left as they are.
        batches: texts as arguments of `SparseEncoder.forward`, [B, L] each.
        only_lower: leave texts with fewer terms as they are.

    Returns:
        What was added.

    Raises:
        InputError: the output has no bias, the vocabulary no more than ``terms`` entries, or no text a token.
    """
    bias = output_bias(lm, "start_terms")
    weight = backbone.output_matrix(lm)[0]
    if terms >= len(bias) and not only_lower:
        raise InputError(f"start_terms {terms}: the vocabulary has {len(bias)} entries")
    was_training = lm.training
    lm.eval()
    pooled = []
    for batch in batches:
        batch = {name: tensor.to(bias.device) for name, tensor in batch.items()}
        hidden = backbone.hidden_states(lm, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        logits = max_logits(backbone.transform(lm, hidden), weight, bias, batch["text_mask"])
        pooled.append(logits[batch["text_mask"].any(1)].cpu())
    lm.train(was_training)
    values = torch.cat(pooled)  # [N, V]
    if not len(values):
        if only_lower:
            return 0.0
        raise InputError("start_terms: there is no text whose terms could be counted")
    added = -cut(values, terms)
    if only_lower:
        added = min(added, 0.0)
    bias += added
    return added


def cut(values: Tensor, terms: int) -> float:
    """The number that ``terms`` entries of each of the rows [N, V] exceed on average; their smallest for too many."""
    return values.flatten().topk(min(terms * len(values) + 1, values.numel())).values[-1].item()


def output_bias(lm: PreTrainedModel, setting: str) -> Tensor:
    """The output bias [V]; raises InputError, which names the setting that needs it, where there is none."""
    bias = backbone.output_matrix(lm)[1]
    if bias is None:
        raise InputError(f"{setting}: this backbone's LM head has no output bias")
    return bias
