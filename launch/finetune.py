#!/usr/bin/env python
"""Fine-tune the lexicon encoder: shards and negatives in, checkpoints and model/ out.

  deepspeed launch/finetune.py recipes/msmarco/stage1.yaml
  deepspeed --hostfile hostfile launch/finetune.py RECIPE --set loss.lambda_docs=0.004 --resume auto
"""

from lexmae import cli
from lexmae.config import FinetuneRecipe


def main(argv: list[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    from lexmae.train import session

    session.main(FinetuneRecipe, argv, parser)


if __name__ == "__main__":
    cli.run(main)
