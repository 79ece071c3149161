"""Losses of ranks in numbers: `kill -9` of one of two ranks at a random moment, again and again, until a run ends.

    python tests/faults/losses.py --seed 1 --losses 12        pre-training at ZeRO 1 and fine-tuning at ZeRO 2, 12 each

The other rank must end within a minute, with an exit code other than 0; `--resume auto` must go on from the last
checkpoint; and the finished run must have the losses and the weights, bit by bit, of two ranks that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import conftest  # noqa: E402
from launching import TINY, log, run  # noqa: E402
from test_launch import SECTIONS, weights, write_recipe  # noqa: E402
from test_stopping import Launched  # noqa: E402

from lexmae.data.corpus import write_beir  # noqa: E402
from lexmae.data.shards import prepare  # noqa: E402
from lexmae.train import checkpoint  # noqa: E402

LIMIT = 60.0  # seconds until the other rank has ended
STEPS = {"pretrain": 1, "finetune": 2}  # kind → ZeRO stage


def lose(kind: str, shards: Path, folder: Path, losses: int, chosen: random.Random) -> Iterator[str]:
    """Train with and without losses; yields what is wrong."""
    steps = 8 * (losses + 1)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    changes = {"deepspeed": f"ds_configs/fp32_zero{STEPS[kind]}.json",
               "model": {**TINY, "size": {**TINY["size"], **dropout}},
               "optimization": {**SECTIONS[kind]["optimization"], "steps": steps},
               "logging": {"every": 1, "checkpoint_every": 1, "keep": 2}}
    script = f"launch/{kind}.py"
    run([script, str(write_recipe(folder / "whole", kind, shards, **changes))], ranks=2)
    recipe, output = write_recipe(folder / "broken", kind, shards, **changes), folder / "broken" / "run"
    slowest, reached = 0.0, 0
    for number in range(losses):
        launched = Launched([script, str(recipe), "--resume", "auto"], output)
        goal = reached + chosen.randint(1, 4)
        launched.until(lambda goal=goal: max(checkpoint.steps(output / "checkpoints"), default=0) >= goal)
        time.sleep(chosen.random() * 0.3)
        victim = chosen.randint(0, 1)
        launched.rank(victim).send_signal(signal.SIGKILL)
        begun = time.monotonic()
        code = launched.end()
        slowest = max(slowest, time.monotonic() - begun)
        reached = max(checkpoint.steps(output / "checkpoints"), default=0)
        print(f"{kind}: loss {number + 1} of {losses}, rank {victim}, step {reached} of {steps}, exit code {code}, "
              f"{time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        if code == 0:
            yield f"{kind}: the launcher ended with 0 although rank {victim} was lost"
        if reached >= steps:
            yield f"{kind}: {number + 1} losses in place of {losses}: the run was through"
            break
    run([script, str(recipe), "--resume", "auto"], ranks=2)
    if slowest > LIMIT:
        yield f"{kind}: the other rank ended after {slowest:.0f} s"
    if [line["loss"] for line in log(output)] != [line["loss"] for line in log(folder / "whole" / "run")]:
        yield f"{kind}: other losses than those of the undisturbed run"
    expected, got = weights(folder / "whole" / "run"), weights(output)
    if not all((got[name] == tensor).all() for name, tensor in expected.items()):
        yield f"{kind}: other weights than those of the undisturbed run"
    print(f"| {kind}, ZeRO {STEPS[kind]} | {losses} | {slowest:.1f} |")


def main() -> int:
    """1 where something was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--losses", type=int, default=12, help="of each kind of training; default 12")
    asked = parser.parse_args()
    chosen, failures = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_beir(folder / "beir", conftest.passages(), conftest.queries(), conftest.judgements())
        prepare(folder / "beir", folder / "shards", train_tokenizer=140, max_length=conftest.MAX_LENGTH,
                query_length=conftest.QUERY_LENGTH, workers=1, shard_size=16)
        print("| training | losses of a rank | slowest end of the other, s |\n|---|--:|--:|")
        for kind in STEPS:
            failures += lose(kind, folder / "shards", folder / kind, asked.losses, chosen)
    print("\n".join(f"FAILURE {text}" for text in failures) or "no failures", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
