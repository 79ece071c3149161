#!/usr/bin/env python
"""Fine-tune the lexicon encoder: shards and negatives in, checkpoints and model/ out.

  deepspeed launch/finetune.py recipes/msmarco/stage1.yaml
  deepspeed --hostfile hostfile launch/finetune.py RECIPE --set loss.lambda_docs=0.004 --resume auto
"""

from lexmae import cli
from lexmae.config import FinetuneRecipe
from lexmae.train import command


def main(argv: list[str] | None = None) -> None:
    command.main(FinetuneRecipe, cli.make_parser(__doc__), argv)


if __name__ == "__main__":
    cli.run(main)
