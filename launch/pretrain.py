#!/usr/bin/env python
"""Pre-train a LexMAE encoder: shards in, checkpoints and model/ out.

  deepspeed launch/pretrain.py recipes/msmarco/pretrain.yaml
  deepspeed --hostfile hostfile launch/pretrain.py RECIPE --set optimization.batch=1024 --resume auto
"""

from lexmae import cli
from lexmae.config import PretrainRecipe
from lexmae.train import command


def main(argv: list[str] | None = None) -> None:
    command.main(PretrainRecipe, cli.make_parser(__doc__), argv)


if __name__ == "__main__":
    cli.run(main)
