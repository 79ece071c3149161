"""What a pipeline recipe may say, as frozen dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lexmae.config import require

ENGINES = ("exact", "anserini")


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the shards that a pipeline makes: a tokenizer to use, or the entries of one to train."""

    tokenizer: str | None = None
    train_tokenizer: int | None = None
    max_length: int = 144
    query_length: int = 32

    def __post_init__(self):
        require((self.tokenizer is None) != (self.train_tokenizer is None),
                 "tokenizer or train_tokenizer: exactly one of the two is needed")


@dataclass(frozen=True)
class StageConfig:
    """One fine-tuning stage of a pipeline.

    Attributes:
        name: its name in the results and under the work folder.
        recipe: recipe file, relative to the pipeline's.
        init: ``pretrain`` or the name of an earlier stage.
        negatives: ``bm25``, the name of an earlier stage, or a file of negatives.
        mine_depth: depth of the list of negatives that is mined for it.
    """

    name: str
    recipe: str
    init: str = "pretrain"
    negatives: str = "bm25"
    mine_depth: int = 512

    def __post_init__(self):
        require(re.fullmatch(r"\w[\w.-]*", self.name) is not None,
                 f"name: '{self.name}' names a folder; letters, digits, '.', '_' and '-' are needed")
        require(self.mine_depth >= 1, "mine_depth: at least 1 is needed")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a pipeline measures: the split with judgements, the engine, documents retrieved, top-k pruning."""

    split: str = "dev"
    train_split: str = "train"
    engine: str = "exact"
    hits: int = 1000
    top_k_docs: int | None = None
    top_k_queries: int | None = None
    batch_tokens: int = 16384

    def __post_init__(self):
        require(self.engine in ENGINES, f"engine: one of {', '.join(ENGINES)} is needed")
        for name in ("hits", "top_k_docs", "top_k_queries", "batch_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: at least 1 is needed")


@dataclass(frozen=True)
class PipelineRecipe:
    """The whole cycle: ``input`` is ``builtin`` or what ``tools/prepare.py --input`` takes."""

    input: str
    work: str
    prepare: PrepareConfig
    pretrain: str | None = "pretrain.yaml"
    stages: tuple[StageConfig, ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    builtin_passages: int | None = None

    def __post_init__(self):
        known = {"pretrain"}  # without pre-training, it stands for the stage recipe's own weights
        for stage in self.stages:
            taken = known | {"bm25", "corpus", "shards"}
            require(stage.name not in taken, f"stages: the name '{stage.name}' is taken")
            require(stage.init in known,
                     f"stages: {stage.name} starts from '{stage.init}', which is not an earlier step")
            known.add(stage.name)
