"""What fine-tuning may say of its negatives and its losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from lexmae.config.checks import require

REGULARISERS = ("flops", "l1", "df_flops", "none")
DISTILLATIONS = ("none", "kl", "margin_mse")


@dataclass(frozen=True)
class ActiveTermsConfig:
    """Mean numbers of active terms to which λ is steered (``lexmae.train.sparsity``); without one λ is the recipe's."""

    docs: float | None = None
    queries: float | None = None

    def __post_init__(self):
        for name in ("docs", "queries"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}: must be positive")


@dataclass(frozen=True)
class LossConfig:
    """Contrastive loss and sparsity of fine-tuning (SPEC §3).

    Attributes:
        lambda_docs: weight λ_d of the regulariser on documents.
        lambda_queries: weight λ_q on queries; 0.75·λ_d where it is not given.
        regulariser_docs, regulariser_queries: ``flops`` (the paper), ``l1``, ``df_flops`` or ``none``.
        active_terms: budgets of active terms; λ_d and λ_q are then where the steering begins.
        top_k_docs, top_k_queries: keep this many of the largest weights of each vector in training.
        lambda_ramp: share of the steps over which both grow quadratically from 0; 0 has them constant.
        temperature: divides the scores in the contrastive loss.
        exclude_judged: leave other judged positives of a query out of its negatives within the batch.
        contrastive_weight: weight of the contrastive loss.
        distillation: ``none``, ``kl`` or ``margin_mse``: learn a teacher's scores of a query's own documents.
        distillation_weight: weight of that loss.
        distillation_temperature: divides both sides' scores in ``kl``.
        teacher: cross-encoder that scores each batch; without one, the scores in the files of negatives.
    """

    lambda_docs: float = 0.0020
    lambda_queries: float | None = None
    regulariser_docs: str = "flops"
    regulariser_queries: str = "flops"
    active_terms: ActiveTermsConfig = field(default_factory=ActiveTermsConfig)
    top_k_docs: int | None = None
    top_k_queries: int | None = None
    lambda_ramp: float = 0.0
    temperature: float = 1.0
    exclude_judged: bool = True
    contrastive_weight: float = 1.0
    distillation: str = "none"
    distillation_weight: float = 1.0
    distillation_temperature: float = 1.0
    teacher: str = ""

    def __post_init__(self):
        for side, start in (("docs", self.lambda_docs), ("queries", self.query_weight)):
            kind, k = getattr(self, f"regulariser_{side}"), getattr(self, f"top_k_{side}")
            require(kind in REGULARISERS, f"regulariser_{side}: one of {', '.join(REGULARISERS)} is needed")
            require(k is None or k >= 1, f"top_k_{side}: at least 1 is needed")
            require(getattr(self.active_terms, side) is None or (start > 0 and kind != "none"),
                    f"active_terms.{side}: needs a regulariser and lambda_{side} above 0 to begin with")
            require(getattr(self.active_terms, side) is None or k is None,
                    f"active_terms.{side}: counts what top_k_{side} leaves, so keep one of the two")
        require(self.distillation in DISTILLATIONS, f"distillation: one of {', '.join(DISTILLATIONS)} is needed")
        for name in ("contrastive_weight", "distillation_weight"):
            require(getattr(self, name) >= 0, f"{name}: cannot be negative")
        require(self.distillation_temperature > 0, "distillation_temperature: must be positive")
        require(not self.teacher or self.distillation != "none", "teacher: goes with a distillation")
        require(self.lambda_docs >= 0, "lambda_docs: cannot be negative")
        require(self.lambda_queries is None or self.lambda_queries >= 0, "lambda_queries: cannot be negative")
        require(0 <= self.lambda_ramp <= 1, "lambda_ramp: a share of the steps between 0 and 1 is needed")
        require(self.temperature > 0, "temperature: must be positive")

    @property
    def query_weight(self) -> float:
        """λ_q."""
        return 0.75 * self.lambda_docs if self.lambda_queries is None else self.lambda_queries


@dataclass(frozen=True)
class NegativeSource:
    """One of several files of negatives.

    Attributes:
        path: file in any format of SPEC §5.
        share: its part of the negatives of an example, in proportion to the other sources' shares.
        skip: ranks at the top of its list that are left out.
        depth: rank at which it ends.
    """

    path: str
    share: float = 1.0
    skip: int = 0
    depth: int = 1000

    def __post_init__(self):
        require(bool(self.path), "path: a file of negatives is needed")
        require(self.share > 0, "share: must be positive")
        require(0 <= self.skip < self.depth, "skip: a rank from 0 to below the depth is needed")


@dataclass(frozen=True)
class NegativesConfig:
    """Hard negatives of a query.

    Attributes:
        path: file of negatives in any format of SPEC §5; without one, random documents.
        per_query: how many join each positive.
        depth: they are drawn from this many at the top of the list.
        sources: several files in place of ``path`` and ``depth``.
        filter_margin: leave out negatives whose teacher score is above the positive's minus this much.
        filter_ratio: leave out negatives whose teacher score is above this share of the positive's.
    """

    path: str = ""
    per_query: int = 15
    depth: int = 1000
    sources: tuple[NegativeSource, ...] = ()
    filter_margin: float | None = None
    filter_ratio: float | None = None

    def __post_init__(self):
        require(self.per_query >= 0, "per_query: cannot be negative")
        require(self.depth >= 1, "depth: at least 1 is needed")
        require(not (self.path and self.sources), "path or sources: only one of the two")
        require(self.filter_margin is None or self.filter_margin >= 0, "filter_margin: cannot be negative")
        require(self.filter_ratio is None or 0 < self.filter_ratio <= 1, "filter_ratio: a share up to 1 is needed")

    @property
    def lists(self) -> tuple[NegativeSource, ...]:
        """All sources; ``path`` is one."""
        return self.sources or ((NegativeSource(self.path, depth=self.depth),) if self.path else ())
