"""Times a pre-training step (forward and backward) with the fused LM head and with the plain one, in ms.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_step.py [--batch 64 --length 96 --layers 4 --hidden 192 --vocab 8192]

A scratch BERT, full-length texts, 30 % of the tokens labelled for the encoder and 50 % for the decoder.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from lexmae.model import backbone
from lexmae.model.pretrainer import IGNORE, Pretrainer

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"batch": 64, "length": 96, "layers": 4, "hidden": 192, "vocab": 8192, "repeats": 3}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    return parser.parse_args()


def example(args: argparse.Namespace) -> dict[str, Tensor]:
    """Arguments of `Pretrainer.forward`."""
    ids = torch.randint(5, args.vocab, (args.batch, args.length))
    text = torch.ones_like(ids, dtype=torch.bool)
    text[:, 0] = text[:, -1] = False
    labels = [torch.where((torch.rand(ids.shape) < share) & text, ids, IGNORE) for share in (0.3, 0.5)]
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "text_mask": text,
        "token_type_ids": torch.zeros_like(ids), "enc_labels": labels[0], "dec_input_ids": ids,
        "dec_labels": labels[1],
    }  # fmt: skip
    return {name: value.to(args.device) for name, value in batch.items()}


def step_ms(head: str, args: argparse.Namespace) -> tuple[float, float]:
    """The shortest step in ms, and the loss."""
    torch.manual_seed(0)
    size = {
        "hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 64,
        "intermediate_size": 4 * args.hidden, "max_position_embeddings": args.length,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    lm = backbone.create_masked_lm("bert", args.vocab, SPECIAL, size)
    model, batch, times = Pretrainer(lm, head=head).to(args.device), example(args), []
    for _ in range(args.repeats + 1):
        start = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            out = model(**batch)
        loss = out["enc_loss_sum"] / out["enc_count"] + out["dec_loss_sum"] / out["dec_count"]
        loss.backward()
        value = loss.item()
        times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3, value


def main() -> None:
    """Print both times, their ratio and both losses."""
    args = parse()
    print(f"{args} torch {torch.__version__} threads {torch.get_num_threads()}")
    (slow, one), (fast, other) = step_ms("reference", args), step_ms("auto", args)
    print(f"plain {slow:.0f} ms   fused {fast:.0f} ms   ratio {slow / fast:.2f}   losses {one:.5f} {other:.5f}")


if __name__ == "__main__":
    main()
