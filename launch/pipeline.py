#!/usr/bin/env python
"""Run a recipe's whole cycle: corpus, shards, pre-training, every stage, search, evaluation, and a table.

  python launch/pipeline.py recipes/toy
  python launch/pipeline.py recipes/msmarco --deepspeed_config ds_configs/bf16_zero1.json
RECIPE is a pipeline's YAML file or the folder that holds its pipeline.yaml. Every step is a command of tools/ or
launch/, printed before it runs. A finished step is skipped as long as its command, settings and inputs are the same.
"""

from argparse import Namespace
from pathlib import Path

from lexmae import cli, cluster, locks, recipe, verification
from lexmae.cycle.config import PipelineRecipe
from lexmae.errors import InputError


def refuse_missing_splits(config: PipelineRecipe) -> None:
    """InputError where a folder of text lacks queries that are asked for, before anything is made of it."""
    from lexmae.data.corpus import Corpus

    asked = config.evaluation
    trained = [asked.train_split] if config.stages or config.reranker else []
    wanted = [(config.input, (asked.split, *asked.more_splits, *trained)),
              *((other.input, (other.split,)) for other in asked.zero_shot)]
    for source, splits in wanted:
        known = Corpus.open(source).splits() if Path(source).is_dir() else splits
        for split in splits:
            if split not in known:
                raise InputError(f"has no queries of the split '{split}'; it has {', '.join(known) or 'none'}", source)


def count_ranks(options: Namespace, gpus: int) -> int:
    """Processes that the launcher will start: those of the hostfile where there is one. InputError for fewer than 1."""
    if options.ranks is not None and options.ranks < 1:
        raise InputError(f"--ranks {options.ranks}: at least 1 is needed")
    if not options.hostfile:
        return options.ranks or gpus or 1
    slots = sum(cluster.read_hostfile(options.hostfile).values())
    if options.ranks not in (None, slots):
        raise InputError(f"has {slots} slots, and --ranks says {options.ranks}", options.hostfile)
    return slots


def main(argv: list[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("recipe", help="pipeline recipe: a YAML file, or a folder with pipeline.yaml")
    parser.add_argument("--until", metavar="STEP", help="stop after this step (--list shows their names)")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, and run nothing")
    parser.add_argument("--set", metavar="KEY=VALUE", action="extend", nargs="+", default=[], dest="overrides",
                        help="override keys of the pipeline recipe, such as input=FOLDER")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="in place of the training recipes' `deepspeed`")
    parser.add_argument("--ranks", type=int, help="processes that train and encode (default: the slots of the "
                                                   "hostfile, or one for each GPU, else 1)")
    parser.add_argument("--hostfile", help="DeepSpeed hostfile, to train and encode on several machines")
    parser.add_argument("--redo", action="store_true", help="replace steps made with other settings or inputs")
    verification.add_option(parser)
    options = parser.parse_args(argv)

    from lexmae.cycle import plan, report, runner
    from lexmae.retrieval import engines

    file = Path(options.recipe) / "pipeline.yaml" if Path(options.recipe).is_dir() else Path(options.recipe)
    config = recipe.load(file, PipelineRecipe, options.overrides)
    gpus = runner.visible_gpus()
    ranks = count_ranks(options, gpus)
    refuse_missing_splits(config)
    has_gpu = bool(gpus or options.hostfile or options.list)  # a plan may be printed on any machine
    planned = plan.Plan(config, file.parent, options.deepspeed_config, ranks, has_gpu).steps
    names = [step.name for step in planned]
    if options.until and options.until not in names:
        raise InputError(f"--until {options.until}: no such step; the steps are {', '.join(names)}")
    if options.list:
        print("\n".join(f"{step.name}: {' '.join(step.command)}" for step in planned))
        return
    engines.check(config.evaluation.engine)  # which is needed only after hours of training
    last = names.index(options.until) if options.until else len(planned) - 1
    with locks.writing(config.work):
        run = runner.Runner(Path(config.work), ranks, options.hostfile, options.redo)
        for i, step in enumerate(planned[:last + 1]):
            run.run(step, f"{i + 1}/{len(planned)}")
            if step.name == plan.TEACHER_MEASURED and (doubt := report.doubt(config)):
                cli.say(doubt)
        if options.until:
            return
        seconds = run.seconds(names)
        print(report.write(config, seconds))
        cli.say(f"{sum(seconds.values()) / 60:.1f} minutes in all; figures in {Path(config.work) / 'results.json'}")


if __name__ == "__main__":
    cli.run(main)
