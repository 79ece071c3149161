"""Times the fused LM head against the plain one, in ms.

    OMP_NUM_THREADS=1 python benchmarks/bench_head.py [--batch 64 --length 96 --vocab 8192 --hidden 192]

Four cases: the masked maximum forward only; forward and backward with the gradient of the pre-training
bottleneck, `softmax`, not zero anywhere; with that of the saturated lexicon, `sparse`, not zero for `--active`
entries of each sequence; and `loss`, the cross entropy of 40 % of the tokens, forward and backward. The plain
head is `F.linear` with a masked amax or `F.cross_entropy`. `--form chunked` and `--form triton` on a GPU compare
two forms of the fused maximum.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


def best_ms(run: Callable[[], object], repeats: int, device: str) -> float:
    """The shortest of `repeats` runs after one to warm up, in ms."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3


def measure(head: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None, args) -> float:
    """ms of a forward pass, followed by a backward pass where `grad` is given."""

    def run() -> None:
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            with torch.set_grad_enabled(grad is not None):
                pooled = head(*inputs)
        if grad is not None:
            torch.autograd.grad(pooled, inputs[:3], grad)

    return best_ms(run, args.repeats, args.device)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"batch": 64, "length": 96, "vocab": 8192, "hidden": 192, "active": 500, "repeats": 3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--ragged", action="store_true", help="texts of 1/3 to all of it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--form", default="auto", choices=IMPLEMENTATIONS, help="of the fused maximum")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    return parser.parse_args()


def report(name: str, slow: float, fast: float) -> None:
    """One line of the table."""
    print(f"{name:8} plain {slow:8.1f} ms   fused {fast:8.1f} ms   ratio {slow / fast:.2f}")


def main() -> None:
    """Print one line for each case."""
    args = parse()
    torch.manual_seed(0)
    hidden = torch.randn(args.batch, args.length, args.hidden, device=args.device, requires_grad=True)
    weight = (0.05 * torch.randn(args.vocab, args.hidden, device=args.device)).requires_grad_()
    bias = torch.zeros(args.vocab, device=args.device, requires_grad=True)
    least = args.length // 3 if args.ragged else args.length
    lengths = torch.randint(least, args.length + 1, (args.batch, 1), device=args.device)
    mask = torch.arange(args.length, device=args.device) < lengths
    dense = torch.randn(args.batch, args.vocab, device=args.device)
    sparse = dense * (torch.rand_like(dense) < args.active / args.vocab)
    print(f"{args} torch {torch.__version__} threads {torch.get_num_threads()}")
    fused = functools.partial(max_logits, implementation=args.form)
    for name, grad in {"forward": None, "softmax": dense, "sparse": sparse}.items():
        slow = measure(plain, [hidden, weight, bias, mask], grad, args)
        fast = measure(fused, [hidden, weight, bias, mask], grad, args)
        report(name, slow, fast)
    rows = hidden.detach().flatten(0, 1)[: int(0.4 * args.batch * args.length)].requires_grad_()
    targets = torch.randint(0, args.vocab, rows.shape[:1], device=args.device)
    one = torch.ones((), device=args.device)
    slow, fast = (measure(h, [rows, weight, bias, targets], one, args) for h in (plain_loss, fused_loss))
    report("loss", slow, fast)


if __name__ == "__main__":
    main()
