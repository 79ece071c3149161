"""What a pipeline recipe may say, as frozen dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lexmae.config import require

ENGINES = ("exact", "anserini", "seismic")  # those of sparse vectors
RERANKER, RERANKED = "reranker", "rerank"  # the cross-encoder's folder, and the row of what it reranks
BI_ENCODER = "bi_encoder"  # folder and row of a sentence encoder


def _require_name(name: str) -> None:
    require(re.fullmatch(r"\w[\w.-]*", name) is not None,
            f"name: '{name}' names a folder; letters, digits, '.', '_' and '-' are needed")


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of the shards that a pipeline makes: a tokenizer to use, the entries of one to train, or neither where
    the pipeline's backbone brings its own. ``split_documents`` and ``stride`` are those of ``tools/prepare.py``."""

    tokenizer: str | None = None
    train_tokenizer: int | None = None
    max_length: int = 144
    query_length: int = 32
    split_documents: bool = False
    stride: int | None = None

    def __post_init__(self):
        require(self.tokenizer is None or self.train_tokenizer is None,
                "tokenizer or train_tokenizer: only one of the two")
        require(self.stride is None or self.split_documents, "stride: goes with 'split_documents: true'")
        require(self.stride is None or 1 <= self.stride <= self.max_length,
                "stride: between 1 and max_length is needed")


@dataclass(frozen=True)
class StageConfig:
    """One fine-tuning stage of a pipeline.

    Attributes:
        name: its name in the results and under the work folder.
        recipe: recipe file, relative to the pipeline's.
        init: ``pretrain``, the name of an earlier stage, or ``backbone``: the pipeline's backbone, without
            pre-training.
        negatives: ``bm25``, ``bi_encoder``, the name of an earlier stage, or a file of negatives; or several of them,
            in the order of the recipe's ``negatives.sources``, whose paths they are.
        mine_depth: depth of the lists of negatives that are mined for it.
        teacher: ``reranker`` or ``bi_encoder``: its negatives carry the scores of the pipeline's cross-encoder, or of
            its bi-encoder.
        compare: what its results are tested against: ``bm25``, ``bi_encoder`` or an earlier stage; without it, the
            stage before it, or else ``bm25``.
    """

    name: str
    recipe: str
    init: str = "pretrain"
    negatives: str | tuple[str, ...] = "bm25"
    mine_depth: int = 512
    teacher: str | None = None
    compare: str | None = None

    def __post_init__(self):
        _require_name(self.name)
        require(bool(self.negatives), "negatives: at least one source is needed")
        require(len(set(self.sources)) == len(self.sources), "negatives: a source is named once")
        require(self.mine_depth >= 1, "mine_depth: at least 1 is needed")
        require(self.teacher in (None, RERANKER, BI_ENCODER), f"teacher: '{RERANKER}', '{BI_ENCODER}', or none")

    @property
    def sources(self) -> tuple[str, ...]:
        """All that ``negatives`` names."""
        return (self.negatives,) if isinstance(self.negatives, str) else self.negatives


@dataclass(frozen=True)
class RerankerConfig:
    """The cross-encoder of a pipeline.

    Attributes:
        recipe: recipe file, relative to the pipeline's.
        init: as of a stage.
        negatives: ``bm25`` or the name of a stage, behind which it is trained and whose run it reranks.
        mine_depth: depth of the list of negatives that is mined for it.
        score_depth: how many negatives of each query are scored for a stage that it teaches; with 0 none beforehand: it
            scores the batches of that stage as they come.
        rerank_depth: how many documents of each query of the evaluation are reranked.
    """

    recipe: str = "rerank.yaml"
    init: str = "pretrain"
    negatives: str = "bm25"
    mine_depth: int = 200
    score_depth: int = 200
    rerank_depth: int = 200

    def __post_init__(self):
        for name in ("mine_depth", "rerank_depth"):
            require(getattr(self, name) >= 1, f"{name}: at least 1 is needed")
        require(self.score_depth >= 0, "score_depth: cannot be negative")

    @property
    def sources(self) -> tuple[str, ...]:
        """As of a stage: one."""
        return (self.negatives,)


@dataclass(frozen=True)
class BiEncoderConfig:
    """A sentence encoder, which is not trained: it is measured, its ranking can be mined, and stages can learn from it.

    Attributes:
        model: hub name or folder, or ``backbone``: the pipeline's backbone.
        representation: ``mean`` or ``cls``, as of ``tools/encode.py``.
        max_length: tokens of a document that it reads, with its own tokenizer; without it, it reads the pipeline's
            shards and needs their tokenizer.
        scale: factor of its dot products where they teach; cosines between -1 and 1 need one of about 20.
        score_depth: how many negatives of each query are scored for a stage that it teaches.
    """

    model: str = "backbone"
    representation: str = "mean"
    max_length: int | None = None
    scale: float = 20.0
    score_depth: int = 200

    def __post_init__(self):
        require(self.representation in ("mean", "cls"), "representation: 'mean' or 'cls'")
        require(self.max_length is None or self.max_length >= 3, "max_length: at least 3 is needed")
        require(0 < self.scale < float("inf"), "scale: above 0 is needed")
        require(self.score_depth >= 1, "score_depth: at least 1 is needed")


@dataclass(frozen=True)
class CollectionConfig:
    """Another collection, on which every stage is measured and nothing is trained.

    Attributes:
        name: its name in the results and in folders.
        input: what ``tools/prepare.py --input`` takes.
        split: whose queries and judgements are taken.
    """

    name: str
    input: str
    split: str = "test"

    def __post_init__(self):
        _require_name(self.name)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a pipeline measures.

    Attributes:
        split: queries with judgements, the first to be measured.
        train_split: queries that are trained on.
        more_splits: further splits of the same collection to measure.
        zero_shot: further collections to measure.
        engine: search engine.
        hits: documents retrieved per query.
        top_k_docs, top_k_queries: keep this many of the largest weights.
        batch_tokens: padded tokens per batch when encoding; what suits the device where it is not given.
    """

    split: str = "dev"
    train_split: str = "train"
    more_splits: tuple[str, ...] = ()
    zero_shot: tuple[CollectionConfig, ...] = ()
    engine: str = "exact"
    hits: int = 1000
    top_k_docs: int | None = None
    top_k_queries: int | None = None
    batch_tokens: int | None = None

    def __post_init__(self):
        require(self.engine in ENGINES, f"engine: one of {', '.join(ENGINES)} is needed")
        splits = (self.split, *self.more_splits)
        require(len(set(splits)) == len(splits), "more_splits: a split is measured once")
        names = [collection.name for collection in self.zero_shot]
        require(len(set(names)) == len(names), "zero_shot: two collections have the same name")
        require(not set(names) & {*splits, self.train_split}, "zero_shot: a collection has the name of a split")
        taken = sorted(set(names) & {"model", "checkpoints", "negatives", "tensorboard", "index", "files"})
        require(not taken, f"zero_shot: the folder '{', '.join(taken)}' of a stage holds something else")
        for name in ("hits", "top_k_docs", "top_k_queries", "batch_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: at least 1 is needed")


@dataclass(frozen=True)
class PipelineRecipe:
    """The whole cycle.

    Attributes:
        input: ``builtin``, or what ``tools/prepare.py --input`` takes.
        work: folder of everything that is made.
        backbone: hub name or folder that takes the place of ``model.init`` in the recipes that start from no earlier
            step, and of ``prepare.tokenizer`` where that is not given.
        pretrain: recipe of pre-training, none without it.
        reranker: the cross-encoder, none without it.
        bi_encoder: a sentence encoder that is there already, none without it.
        builtin_passages: most passages of the built-in corpus.
    """

    input: str
    work: str
    prepare: PrepareConfig
    backbone: str | None = None
    pretrain: str | None = "pretrain.yaml"
    stages: tuple[StageConfig, ...] = ()
    reranker: RerankerConfig | None = None
    bi_encoder: BiEncoderConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    builtin_passages: int | None = None

    def __post_init__(self):
        require(self.prepare.tokenizer or self.prepare.train_tokenizer or self.backbone,
                "prepare: tokenizer or train_tokenizer is needed, or a backbone that brings its own")
        require(self.bi_encoder is None or self.bi_encoder.model != "backbone" or self.backbone,
                "bi_encoder: 'model: backbone' needs a backbone")
        require(self.bi_encoder is None or self.bi_encoder.max_length is None or not self.prepare.split_documents,
                "bi_encoder: 'max_length' would cut documents into other passages than 'prepare.split_documents'")
        known = {"pretrain", "backbone"}  # without pre-training, it stands for the stage recipe's own weights
        trained = self._check_reranker(known)
        for stage in self.stages:
            taken = known | {"bm25", "corpus", "shards", "zero-shot", RERANKER, RERANKED, BI_ENCODER}
            require(stage.name not in taken, f"stages: the name '{stage.name}' is taken")
            require(stage.init in known,
                        f"stages: {stage.name} starts from '{stage.init}', which is not an earlier step")
            require(self.bi_encoder or BI_ENCODER not in (stage.teacher, stage.compare, *stage.sources),
                    f"stages: {stage.name} names the bi_encoder, and there is no section of that name")
            require(stage.compare in {None, "bm25", BI_ENCODER} | known - {"pretrain", "backbone"},
                    f"stages: {stage.name} is compared with '{stage.compare}', which is not an earlier stage")
            require(stage.teacher != RERANKER or trained,
                    f"stages: {stage.name} has a teacher that is not there yet: the reranker is trained behind "
                    f"'{self.reranker.negatives if self.reranker else 'nothing'}'")
            known.add(stage.name)
            trained = trained or (self.reranker is not None and self.reranker.negatives == stage.name)

    def _check_reranker(self, known: set[str]) -> bool:
        """Refuse one that is trained or starts from nothing; whether it is trained before the first stage."""
        if self.reranker is None:
            return False
        names = [stage.name for stage in self.stages]
        source, init = self.reranker.negatives, self.reranker.init
        require(source == "bm25" or source in names, f"reranker: negatives '{source}' is neither bm25 nor a stage")
        earlier = names[:names.index(source) + 1] if source in names else []
        require(init in known or init in earlier,
                f"reranker: it starts from '{init}', which is not an earlier step")
        return source == "bm25"
