"""What a plan refuses before its first step: recipes that this machine, or their stage, cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lexmae.config import FinetuneRecipe, PretrainRecipe, RerankRecipe
from lexmae.cycle.config import RerankerConfig, StageConfig
from lexmae.errors import InputError
from lexmae.train import hardware


def refuse_machine(config: PretrainRecipe | FinetuneRecipe | RerankRecipe, file: Path, deepspeed_config: str | None,
                   ranks: int, has_gpu: bool) -> None:
    """InputError for an unknown, contradictory or impossible ds_config, and for a batch that the ranks cannot share.

    Args:
        file: the recipe's.
        deepspeed_config: takes the place of the recipe's own.
    """
    path = hardware.find(deepspeed_config or config.deepspeed)
    try:
        spread = hardware.compose(path, config.optimization, ranks, accumulate=hardware.accumulates(config))
    except InputError as error:
        raise InputError(error.reason, error.path or file, error.line) from None
    hardware.refuse_precision(spread, has_gpu, path)


def refuse_sources(config: FinetuneRecipe | RerankRecipe, file: Path, name: str, user: StageConfig | RerankerConfig,
                   ranked: Sequence[str], split_documents: bool, on_the_fly: bool) -> None:
    """InputError for a recipe that has not as many sources, with their shares and ranks, as its stage names, or needs
    a ranking of passages where there is none, or a teacher's scores that nothing makes or that are of documents.

    Args:
        name: of the stage.
        ranked: the sources that are rankings of the pipeline; others are files.
        on_the_fly: the stage's teacher scores its batches and no list.
    """
    if config.passages == "best" and split_documents and set(user.sources) == {"bm25"}:
        raise InputError(f"passages: 'best' needs negatives of an earlier stage, and {name} has those of BM25, "
                         "which ranks whole documents", file)
    teacher = "no teacher" if not on_the_fly else "one that scores its batches alone (score_depth: 0)"
    taught = isinstance(user, StageConfig) and user.teacher is not None and not on_the_fly
    filtered = config.negatives.filter_margin is not None or config.negatives.filter_ratio is not None
    distils = (isinstance(config, FinetuneRecipe) and config.loss.distillation != "none"
               and not config.loss.teacher and not on_the_fly)
    ranked_alone = set(user.sources) <= set(ranked)  # files may have a teacher's scores, also those of passages
    if (filtered or distils) and not taught and ranked_alone:
        raise InputError(f"{'negatives: filters need' if filtered else 'loss: a distillation needs'} a teacher's "
                         f"scores, and {name} has {teacher}", file)
    if taught and config.loss.teacher:
        raise InputError(f"loss.teacher: the teacher of {name} scores its negatives beforehand: leave the key out, or "
                         "set reranker.score_depth to 0", file)
    if distils and split_documents and ranked_alone and ("bm25" in user.sources or config.passages != "best"):
        raise InputError("loss: where documents are split, a file has scores of whole ones, and distillation needs "
                         "those of passages: 'passages: best' with the negatives of a stage, or reranker.score_depth 0",
                         file)
    found = len(config.negatives.sources)
    if not isinstance(user.negatives, str) and found != len(user.sources):
        raise InputError(f"negatives.sources: {len(user.sources)} are needed, one for each of "
                         f"{', '.join(user.sources)} of stage {name}, and there are {found}", file)
