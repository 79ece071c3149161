"""What a training recipe may say, as frozen dataclasses. Defaults are the paper's.

A recipe owns learning (data, model, losses, learning rate, batch, steps, seed). What depends on the machine (ZeRO
stage, precision, offload, communication) is owned by a file of ``ds_configs/``. ``lexmae.recipe`` reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lexmae.config.checks import require
from lexmae.config.ranking import ActiveTermsConfig, LossConfig, NegativesConfig, NegativeSource

__all__ = ["ARCHITECTURES", "ActiveTermsConfig", "BottleneckConfig", "FinetuneRecipe", "LoggingConfig", "LossConfig",
           "MaskingConfig", "ModelConfig", "NegativeSource", "NegativesConfig", "OptimizationConfig", "PretrainRecipe",
           "ProbeConfig", "require"]

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "modernbert")
DECODER_MASKS = ("inclusive", "exclusive", "random")
PASSAGES = ("first", "all", "best")
PACKINGS = ("auto", "on", "off")
QUERY_ENCODERS = ("shared", "static")
BOTTLENECKS = ("logits", "saturated", "cls", "off")


@dataclass(frozen=True)
class ModelConfig:
    """Where the weights come from.

    Attributes:
        init: ``scratch``, a Hugging Face hub name, or a folder in Hugging Face layout.
        architecture: backbone family of a model made from scratch.
        size: configuration values of a model made from scratch, under the family's own names (``hidden_size`` …).
        lexical_start: initial weights of a model made from scratch: those with which it names its own input tokens
            before any training (``lexmae.model.lexical_start``) in place of the family's usual ones.
        frequency_penalty: lower the output bias of frequent tokens by up to this much before training, so that
            their weights start small, as with an inverse document frequency; 0 (the paper) leaves the bias alone.
        start_terms: shift all output biases alike before training, so that a document has this many active terms on
            average; unset (the paper) leaves them. Pre-training compares logits with each other, so that what relu
            leaves of them is not its concern.
        fit_head: fit the LM head to the text where the backbone comes without one (``lexmae.model.head_fit``); without
            it, such a head starts at random.
        queries: what makes a query's vector: ``shared``, the documents' encoder (the paper); ``static``, a table
            with a learned weight per token, so that a query needs no model (``lexmae.model.static_queries``).
        packing: compute texts one behind the other, without padding (``lexmae.model.packing``); ``auto`` does so
            but on a GPU in fp32. A cross-encoder's pairs are always padded.
        compile: compute the transformer layers with ``torch.compile``.
        activation_checkpointing: keep the input of each transformer layer alone and compute the rest again in the
            backward pass: less memory, about a third more arithmetic.
    """

    init: str = "bert-base-uncased"
    architecture: str = "bert"
    size: Mapping[str, Any] = field(default_factory=dict)
    lexical_start: bool = False
    frequency_penalty: float = 0.0
    start_terms: int | None = None
    fit_head: bool = True
    queries: str = "shared"
    packing: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False

    def __post_init__(self):
        require(self.queries in QUERY_ENCODERS, f"queries: one of {', '.join(QUERY_ENCODERS)} is needed")
        require(self.packing in PACKINGS, f"packing: one of {', '.join(PACKINGS)} is needed")
        require(self.architecture in ARCHITECTURES, f"architecture: one of {', '.join(ARCHITECTURES)} is needed")
        require(self.init == "scratch" or self.architecture == "bert", "architecture: only goes with 'init: scratch'")
        require(self.init == "scratch" or not self.size, "size: only goes with 'init: scratch'")
        require(self.init == "scratch" or not self.lexical_start, "lexical_start: only goes with 'init: scratch'")
        require(self.frequency_penalty >= 0, "frequency_penalty: cannot be negative")
        require(self.start_terms is None or self.start_terms >= 1, "start_terms: at least 1 is needed")


@dataclass(frozen=True)
class MaskingConfig:
    """Masks of pre-training (SPEC §1): α = ``encoder``, β = ``decoder``."""

    encoder: float = 0.30
    decoder: float = 0.50
    decoder_strategy: str = "inclusive"
    whole_word: bool = False

    def __post_init__(self):
        require(0 < self.encoder < 1, "encoder: a share between 0 and 1 is needed")
        require(0 < self.decoder < 1, "decoder: a share between 0 and 1 is needed")
        require(self.decoder_strategy in DECODER_MASKS, f"decoder_strategy: one of {', '.join(DECODER_MASKS)}")
        require(self.decoder_strategy != "inclusive" or self.decoder >= self.encoder,
                 "decoder: an inclusive decoder mask holds the encoder's, so it cannot be the smaller one")
        require(self.decoder_strategy != "exclusive" or self.decoder <= 1 - self.encoder,
                 "decoder: an exclusive decoder mask leaves the encoder's out, so the two shares cannot pass 1")


@dataclass(frozen=True)
class BottleneckConfig:
    """The lexicon bottleneck and the weak decoder behind it.

    Attributes:
        source: what the bottleneck vector is made of (``logits`` in the paper).
        decoder_layers: transformer layers of the decoder.
        encoder_weight: weight of the encoder's masked-LM loss.
        decoder_weight: weight of the decoder's masked-LM loss.
        bow_weight: weight of the bag-of-words loss of DupMAE (``lexicon.bag_of_words_loss``); 0 (the paper) has none.
        normalize: give a bottleneck of ``logits`` or ``saturated`` the length of the decoder's other inputs, by a
            LayerNorm without weights. The paper does not.
        active_terms: the lexicon encoder that is measured by probes and written has at most this many active terms per
            document on average: where it would have more, all its output biases are lowered alike, which changes no
            loss. Unset leaves them.
    """

    source: str = "logits"
    decoder_layers: int = 2
    encoder_weight: float = 1.0
    decoder_weight: float = 1.0
    bow_weight: float = 0.0
    normalize: bool = False
    active_terms: int | None = None

    def __post_init__(self):
        require(self.active_terms is None or self.active_terms >= 1, "active_terms: at least 1 is needed")
        require(self.active_terms is None or self.source != "saturated",
                "active_terms: a bottleneck of saturated logits learns where relu cuts")
        require(self.source in BOTTLENECKS, f"source: one of {', '.join(BOTTLENECKS)} is needed")
        require(self.decoder_layers >= 1, "decoder_layers: at least 1 is needed")
        for name in ("encoder_weight", "decoder_weight", "bow_weight"):
            require(getattr(self, name) >= 0, f"{name}: cannot be negative")
        require(self.encoder_weight + self.decoder_weight + self.bow_weight > 0, "encoder_weight: one of the weights "
                "must be above 0, or there is nothing to learn")


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW with linear warm-up and linear decay.

    Attributes:
        batch: global batch: texts in pre-training, queries in fine-tuning, over all ranks and accumulation steps.
        micro_batch: texts that one rank computes at a time; the whole share of the rank where it is not given.
        micro_tokens: tokens that one rank computes at a time, padding included, in place of ``micro_batch``: texts of
            similar length together, as many as fit.
        epochs: passes over the data; ``steps``, where given, stands in its place.
        steps: optimizer steps.
        warmup: share of the steps over which the learning rate grows.
        clip: largest gradient norm; 0 has no clipping.
        query_lr: peak learning rate of the table of static queries, with the same warm-up and decay.
    """

    lr: float = 3e-4
    batch: int = 2048
    micro_batch: int | None = None
    micro_tokens: int | None = None
    epochs: float = 20
    steps: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seed: int = 42
    query_lr: float = 1e-3

    def __post_init__(self):
        require(self.query_lr > 0, "query_lr: must be positive")
        require(self.lr > 0, "lr: must be positive")
        require(self.batch >= 1, "batch: at least 1 is needed")
        require(self.micro_batch is None or self.micro_batch >= 1, "micro_batch: at least 1 is needed")
        require(self.micro_tokens is None or self.micro_tokens >= 1, "micro_tokens: at least 1 is needed")
        require(self.micro_batch is None or self.micro_tokens is None,
                "micro_tokens: takes the place of micro_batch, so keep one of the two")
        require(self.epochs > 0, "epochs: must be positive")
        require(self.steps is None or self.steps >= 1, "steps: at least 1 is needed")
        require(0 <= self.warmup <= 1, "warmup: a share of the steps between 0 and 1 is needed")
        require(self.clip >= 0, "clip: cannot be negative")
        require(self.weight_decay >= 0, "weight_decay: cannot be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}: from 0 to below 1 is needed")
        require(self.epsilon > 0, "epsilon: must be positive")
        require(0 <= self.seed < 2 ** 63, "seed: from 0 to below 2^63 is needed")


@dataclass(frozen=True)
class LoggingConfig:
    """How often a run reports and saves.

    Attributes:
        every: optimizer steps between two lines of the log.
        checkpoint_every: optimizer steps between two checkpoints; 0 saves at the end alone. Where it is not 0, the step
            of the best probe so far is saved too.
        keep: newest checkpoints kept, besides that of the best probe.
        max_skipped: steps in a row with a loss or gradient that is not finite, after which the run gives up.
        profile_step: the optimizer step, counted from 1, of which DeepSpeed's FLOPS profiler writes an account to
            ``flops.txt`` in the output; 0 has none. That step is slower.
        peak_tflops: TFLOP/s of the device at its best, for the share of it in the log, where
            ``lexmae.train.flops`` does not know the device.
    """

    every: int = 10
    checkpoint_every: int = 5000
    keep: int = 2
    max_skipped: int = 10
    profile_step: int = 0
    peak_tflops: float | None = None

    def __post_init__(self):
        require(self.every >= 1, "every: at least 1 is needed")
        require(self.max_skipped >= 1, "max_skipped: at least 1 is needed")
        require(self.keep >= 1, "keep: at least 1 is needed")
        require(self.checkpoint_every >= 0, "checkpoint_every: cannot be negative")
        require(self.profile_step >= 0, "profile_step: cannot be negative")
        require(self.peak_tflops is None or self.peak_tflops > 0, "peak_tflops: must be positive")


@dataclass(frozen=True)
class ProbeConfig:
    """Retrieval measured while training, on a few queries and documents of the shards (``lexmae.train.probe``).

    Attributes:
        every: optimizer steps between two probes, and one at the end; 0 has none.
        split: whose judged queries are asked.
        queries: how many at most.
        documents: how many are searched at most (passages, where documents are split): the judged ones of the queries,
            and random others.
    """

    every: int = 0
    split: str = "dev"
    queries: int = 200
    documents: int = 2000

    def __post_init__(self):
        require(self.every >= 0, "every: cannot be negative")
        require(self.queries >= 1, "queries: at least 1 is needed")
        require(self.documents >= 1, "documents: at least 1 is needed")


@dataclass(frozen=True)
class PretrainRecipe:
    """One pre-training run: shards in, checkpoints and ``model/`` out."""

    data: str
    output: str
    deepspeed: str = "ds_configs/fp16_zero1.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self):
        require(self.model.queries == "shared", "model: static queries are learned in fine-tuning")


@dataclass(frozen=True)
class FinetuneRecipe:
    """One fine-tuning run of the lexicon encoder: shards and negatives in, checkpoints and ``model/`` out.

    Attributes:
        split: queries and judgements to train on.
        passages: which passages of a document stand for it, where the shards split documents: the ``first`` or
            ``all``, as positives and as negatives named by their document; ``best``: as ``first``, but of a positive
            the passage that the model whose ranking was mined puts first.
    """

    data: str
    output: str
    split: str = "train"
    passages: str = "first"
    deepspeed: str = "ds_configs/fp16_zero1.json"
    model: ModelConfig = field(default_factory=ModelConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimization: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(lr=2e-5, batch=24, epochs=3, clip=1.0))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(every=50))
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self):
        require(self.passages in PASSAGES, f"passages: one of {', '.join(PASSAGES)} is needed")
        require(self.model.queries == "shared" or self.loss.active_terms.queries is None,
                "loss or model: the active terms of static queries are their tokens, so they cannot have a budget")
        require(self.loss.distillation == "none" or self.negatives.per_query >= 1,
                "negatives: per_query must be at least 1, or there is nothing to distil")


@dataclass(frozen=True)
class RerankRecipe:
    """One training run of the cross-encoder: shards and negatives in, checkpoints and ``model/`` out.

    LexMAE does not say how its reranker was trained. Learning rate, epochs and documents per query that get a gradient
    (16) are those of SimLM's published script for base-size models (github.com/microsoft/unilm, ``simlm/scripts/
    train_reranker_marco.sh``), which warns of rates above 1e-5 for large ones.

    Attributes:
        split, passages: as in fine-tuning.
        max_length: tokens of query and document together; the document is cut to fit.
    """

    data: str
    output: str
    split: str = "train"
    passages: str = "first"
    deepspeed: str = "ds_configs/fp16_zero1.json"
    max_length: int = 175
    model: ModelConfig = field(default_factory=ModelConfig)
    negatives: NegativesConfig = field(default_factory=lambda: NegativesConfig(depth=200))
    optimization: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(lr=3e-5, batch=32, epochs=3, clip=1.0))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(every=50))

    def __post_init__(self):
        require(self.passages in PASSAGES, f"passages: one of {', '.join(PASSAGES)} is needed")
        require(self.max_length >= 1, "max_length: at least 1 is needed")
        require(self.negatives.per_query >= 1, "negatives: per_query must be at least 1, or there is nothing to learn")
        require(self.model.queries == "shared", "model: a cross-encoder reads queries, static ones are no part of it")
        require(self.model.packing != "on", "model: packing is for lexicon encoders, the pairs of a scorer are padded")
        require(not (self.model.lexical_start or self.model.frequency_penalty or self.model.start_terms),
                "model: lexical_start, frequency_penalty and start_terms are for lexicon encoders, a cross-encoder has "
                "one output")
