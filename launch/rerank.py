#!/usr/bin/env python
"""Train a cross-encoder, the teacher of stage 3: shards and negatives in, checkpoints and model/ out.

  deepspeed launch/rerank.py recipes/msmarco/rerank.yaml
  deepspeed --hostfile hostfile launch/rerank.py RECIPE --set negatives.per_query=31 --resume auto
"""

from lexmae import cli
from lexmae.config import RerankRecipe
from lexmae.train import command


def main(argv: list[str] | None = None) -> None:
    command.main(RerankRecipe, cli.make_parser(__doc__), argv)


if __name__ == "__main__":
    cli.run(main)
