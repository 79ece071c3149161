"""The fused LM head against full logits, at BERT-base's shapes on real text.

    python benchmarks/bench_head.py [--input FOLDER] [--size base|mini] [--batch 16] [--active 300] [--form auto]

Both sides get the same hidden states of a padded batch of passages, and the same gradient; results and gradients are
compared first. Four cases: the masked maximum `forward` alone; forward and backward with the gradient of the
pre-training bottleneck, `pretrain`, not zero anywhere; with that of the saturated lexicon, `finetune`, not zero for
`--active` entries of each text; and `loss`, the cross entropy of 40 % of the tokens, forward and backward. Full logits
are `F.linear` with a masked amax or `F.cross_entropy`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from lexmae.model import backbone
from lexmae.model.head import IMPLEMENTATIONS, max_logits
from lexmae.model.mlm import cross_entropy_sum


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """[B, L, H] -> [B, V] with the logits of all tokens in memory."""
    return F.linear(hidden, weight, bias).masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1).float()


def plain_loss(rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """[M, H] -> the sum of cross entropies, with the logits of all rows in memory."""
    return F.cross_entropy(F.linear(rows, weight, bias).float(), targets, reduction="sum")


def fused_loss(*inputs: Tensor) -> Tensor:
    """The same, in chunks of rows."""
    return cross_entropy_sum(*inputs)[0]


def step(head: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None, args: argparse.Namespace) -> list:
    """The head's result, and the gradients of its first three inputs where ``grad`` is given."""
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16), torch.set_grad_enabled(grad is not None):
        result = head(*inputs)
    return [result, *(() if grad is None else torch.autograd.grad(result, inputs[:3], grad))]


def main() -> None:
    """Compare, then time both sides of each case in turn."""
    parser = common.make_parser(__doc__, batch=16, active=300)
    parser.add_argument("--form", default="auto", choices=IMPLEMENTATIONS, help="of the fused maximum; default auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        hidden, weight, bias, mask = head_inputs(args, Path(name))
    texts, vocabulary = len(hidden), len(weight)
    torch.manual_seed(0)
    dense = torch.randn(texts, vocabulary, device=args.device)
    dense *= leads(hidden, weight, bias, mask)  # a near-tie may give its gradient to either token
    sparse = dense * (torch.rand_like(dense) < args.active / vocabulary)
    rows = hidden.detach()[mask][:int(0.4 * mask.sum())].requires_grad_()
    targets = torch.randint(0, vocabulary, rows.shape[:1], device=args.device)
    pooled, labelled = [hidden, weight, bias, mask], [rows, weight, bias, targets]
    maximum = partial(max_logits, implementation=args.form)
    cases = {"forward": (maximum, plain, pooled, None), "pretrain": (maximum, plain, pooled, dense),
             "finetune": (maximum, plain, pooled, sparse),
             "loss": (fused_loss, plain_loss, labelled, torch.ones((), device=args.device))}
    figures = {}
    for case, (fused, full, inputs, grad) in cases.items():
        runs = {name: partial(step, head, inputs, grad, args)
                for name, head in (("fused", fused), ("full logits", full))}
        compare(case, *(run() for run in runs.values()), args)
        sides = [common.Side(name, run, float(mask.sum()), "tokens/s") for name, run in runs.items()]
        figures |= {f"{case}: {name}": row for name, row in common.in_turn(sides, args.rounds, args.device).items()}
    common.report("LM head", figures, args, size=args.size, texts=texts, longest=hidden.shape[1],
                  tokens=int(mask.sum()), precision="bf16" if args.bf16 else "fp32")


def head_inputs(args: argparse.Namespace, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head of a BERT of random weights gets for real passages: hidden [B, L, H], weight [V, H], bias [V], mask
    of text tokens [B, L]."""
    sample, model = common.inputs(args, args.batch, folder)
    words, lm = common.tokenizer.load(model), backbone.load_masked_lm(str(model)).to(args.device)
    read = words(sample, padding=True, return_special_tokens_mask=True, return_tensors="pt").to(args.device)
    with torch.no_grad():
        hidden = backbone.transform(lm, backbone.hidden_states(lm, read["input_ids"], read["attention_mask"]))
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in backbone.output_matrix(lm))
    return hidden.requires_grad_(), weight, bias, read["special_tokens_mask"] == 0


def leads(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Where the largest logit of a text's tokens is ahead of the second by more than rounding, [texts, vocabulary]."""
    with torch.no_grad():
        logits = F.linear(hidden, weight, bias).masked_fill(~mask.unsqueeze(-1), -torch.inf)
        first, second = logits.topk(2, dim=1).values.unbind(1)
        return first - second > 1e-4 * first.abs().clamp_min(1.0)


def compare(case: str, own: list[Tensor], other: list[Tensor], args: argparse.Namespace) -> None:
    """Exit where results or gradients differ. Where two tokens have the same maximum but for rounding, either may get
    the gradient: a few entries of many in float32, so many in bfloat16 that only lengths are compared."""
    for place, (one, two) in enumerate(zip(own, other, strict=True)):
        one, two = one.detach().double(), two.detach().double()
        difference = (one.norm() - two.norm()).abs() if args.bf16 else (one - two).norm()
        common.refuse_difference(f"results of {case}", float(difference / two.norm()),
                                 0.02 if args.bf16 or place else 1e-4)


if __name__ == "__main__":
    main()
