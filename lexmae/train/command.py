"""The command line that every training command shares; torch is imported once the recipe is known to be good."""

from __future__ import annotations

import argparse
import dataclasses

from lexmae import cli, locks, ranks, recipe, verification


def main(kind: type, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
    """Add the arguments to ``parser``, parse them, read the recipe of dataclass ``kind``, and train.

    Raises:
        InputError: the recipe is wrong, or what it names cannot work.
    """
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("--set", metavar="KEY=VALUE", action="extend", nargs="+", default=[], dest="overrides",
                        help="override keys of the recipe, such as optimization.lr=1e-4")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="in place of the recipe's `deepspeed`")
    parser.add_argument("--resume", metavar="auto|STEP|PATH", help="continue from a checkpoint")
    verification.add_option(parser)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    arguments = parser.parse_args(argv)
    with ranks.together() as held:
        config = recipe.load(arguments.recipe, kind, arguments.overrides)
        if arguments.deepspeed_config:
            config = dataclasses.replace(config, deepspeed=arguments.deepspeed_config)

        from lexmae.train import session

        session.ready(config, arguments.resume)
        held.enter_context(locks.writing(config.output, here=cli.is_main_rank()))
    with held:
        session.run(config, arguments.resume)
