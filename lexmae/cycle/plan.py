"""Turns a pipeline recipe into the commands of the cycle, in order; refuses a wrong recipe before the first of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexmae import artifact, recipe
from lexmae.config import FinetuneRecipe, PretrainRecipe, RerankRecipe
from lexmae.cycle import checks
from lexmae.cycle.config import BI_ENCODER, RERANKED, RERANKER, PipelineRecipe, RerankerConfig, StageConfig
from lexmae.cycle.steps import Step, Target
from lexmae.errors import InputError

TEACHER_MEASURED = f"{RERANKED}-evaluate"
"""The step after which `report.doubt` knows whether the cross-encoder can teach."""
_SPARE_HITS = 50  # retrieved beyond the depth of negatives, since judged positives are dropped
_SPARE_PASSAGES = 500  # the same where documents are split: every passage of a judged document is dropped


class Plan:
    """The steps of a pipeline recipe, in order.

    Args:
        folder: what the recipe's file names are relative to.
        deepspeed_config: takes the place of the training recipes' own.
        ranks: processes that will train.
        has_gpu: whether they have GPUs: fp16 is refused without.

    Raises:
        InputError: a recipe, configuration or input is missing or wrong.
    """

    def __init__(self, config: PipelineRecipe, folder: Path, deepspeed_config: str | None = None, ranks: int = 1,
                 has_gpu: bool = True):
        self.config, self.folder, self.work = config, folder, Path(config.work)
        self.deepspeed_config, self.ranks, self.has_gpu = deepspeed_config, ranks, has_gpu
        self.steps: list[Step] = []
        self._stages_done: list[str] = []
        self.shards = self.work / "shards"
        self.corpus = self._add_corpus()
        self._add_prepare("prepare", self.corpus, self.shards)
        self.targets = self._add_targets()
        if config.pretrain:
            backbone = {"model.init": config.backbone} if config.backbone else {}
            self._add_training("pretrain", "launch/pretrain.py", folder / config.pretrain, PretrainRecipe, backbone, [])
        self._mined: list[StageConfig | RerankerConfig] = [*config.stages, *filter(None, [config.reranker])]
        self._add_bm25()
        if config.bi_encoder:
            for target in self.targets:
                self._add_measuring(BI_ENCODER, target, "bm25")
        self._add_reranker("bm25")
        for stage in config.stages:
            self._add_stage(stage)
            self._add_reranker(stage.name)

    @property
    def _training(self) -> Target:
        """The queries that are trained on."""
        split = self.config.evaluation.train_split
        return Target(split, "", self.corpus, self.shards, split)

    def qrels(self, split: str) -> Path:
        """Judgements of a split, as the shards keep them."""
        return self.shards / "qrels" / f"{split}.tsv"

    def _add(self, *args: Any, **kwargs: Any) -> Path:
        step = Step(*args, **kwargs)
        for known in self.steps:
            if step.name == known.name or step.output == known.output:
                if (step.output, step.command) != (known.output, known.command):
                    raise InputError(f"the steps {known.name} ({known.output}) and {step.name} ({step.output}) get in "
                                     "each other's way: give stages, splits and collections other names")
                return step.output  # two stages need the same
        self.steps.append(step)
        return step.output

    def _add_corpus(self) -> Path:
        if self.config.input != "builtin":
            return self._text(self.config.input)
        output = self.work / "corpus"
        limit = self.config.builtin_passages
        command = ["-m", "lexmae.data.builtin", "--output", str(output)]
        return self._add("corpus", command + (["--max-passages", str(limit)] if limit else []), output,
                         settings=artifact.versions())

    def _text(self, name: str) -> Path:
        """A folder, or what may be the name of a dataset."""
        if self.work.is_dir() and Path(name).is_dir() and self.work.samefile(name):
            raise InputError("is the work folder too; choose another work=FOLDER", name)
        if not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
            raise InputError("no such folder", name)
        return Path(name)

    def _add_prepare(self, name: str, text: Path, shards: Path, tokenizer: str | None = None,
                     max_length: int | None = None) -> Path:
        """Shards as ``prepare`` says, or with another tokenizer and length; another collection takes this one's."""
        settings, inputs = self.config.prepare, [text]
        command = ["tools/prepare.py", "--input", str(text), "--output", str(shards),
                   "--max-length", str(max_length or settings.max_length),
                   "--query-length", str(settings.query_length)]
        command += ["--split-documents"] if settings.split_documents else []
        command += ["--stride", str(settings.stride)] if settings.stride else []
        if tokenizer is None and shards != self.shards:
            tokenizer, inputs = str(self.shards / "tokenizer"), [text, self.shards]
        tokenizer = tokenizer or settings.tokenizer or (None if settings.train_tokenizer else self.config.backbone)
        inputs += self._content_of(tokenizer) if self.shards not in inputs else []
        command += ["--tokenizer", tokenizer] if tokenizer else ["--train-tokenizer", str(settings.train_tokenizer)]
        return self._add(name, command, shards, inputs)

    def _read_by(self, model: str, target: Target) -> Path:
        """The shards that a model encodes: what is measured, or what the bi-encoder has of its own."""
        teacher = self.config.bi_encoder
        if model != BI_ENCODER or teacher.max_length is None:
            return target.shards
        name = "-".join(filter(None, [BI_ENCODER, "prepare", target.folder]))
        return self._add_prepare(name, target.text, self.work / BI_ENCODER / target.folder / "shards",
                                 self._bi_encoder, teacher.max_length)

    @property
    def _bi_encoder(self) -> str | None:
        teacher = self.config.bi_encoder
        return self.config.backbone if teacher.model == "backbone" else teacher.model

    def _add_targets(self) -> list[Target]:
        """What is measured: the split, further splits, further collections with shards of their own."""
        evaluation = self.config.evaluation
        found = [Target("", "", self.corpus, self.shards, evaluation.split)]
        found += [Target(split, "", self.corpus, self.shards, split) for split in evaluation.more_splits]
        for other in evaluation.zero_shot:
            text = self._text(other.input)
            shards = self._add_prepare(f"prepare-{other.name}", text, self.work / "zero-shot" / other.name)
            found.append(Target(other.name, other.name, text, shards, other.split))
        return found

    def _add_training(self, name: str, script: str, file: Path, kind: type, overrides: dict[str, str],
                      inputs: list[Path]) -> Path:
        output = self.work / name
        settings = [*self._places(name), *(recipe.setting(key, value) for key, value in overrides.items())]
        config = recipe.load(file, kind, settings)
        hardware_only = ["--deepspeed_config", self.deepspeed_config] if self.deepspeed_config else []
        command = [script, str(file), "--set", *settings, "--resume", "auto", *hardware_only]
        checks.refuse_machine(config, file, self.deepspeed_config, self.ranks, self.has_gpu)
        models = [config.model.init, config.loss.teacher if isinstance(config, FinetuneRecipe) else None]
        begun = [path for name in models for path in self._content_of(name)]
        learning = recipe.without(recipe.to_dict(config), recipe.MACHINE)
        learning = {k: v for k, v in learning.items() if k not in ("logging", "deepspeed", "probe")}
        return self._add(name, command, output / "model", [self.shards, *inputs, *begun], learning,
                         trains=True, resumes=True, machine=([str(file)], hardware_only))

    def _content_of(self, name: str | None) -> list[Path]:
        """The folder of a model or tokenizer, whose content counts; nothing for a hub name."""
        path = Path(name or "")
        return [path] if name and (path.exists() or path in {step.output for step in self.steps}) else []

    def _places(self, name: str) -> list[str]:
        """What every training recipe is told of folders, whether it names any or not."""
        return [recipe.setting("data", str(self.shards)), recipe.setting("output", str(self.work / name))]

    def _add_bm25(self) -> None:
        evaluation, folder = self.config.evaluation, self.work / "bm25"
        for target in self.targets:
            run = self._run("bm25", target)
            self._add(f"bm25{target.infix}", [
                "tools/mine.py", "--bm25", str(target.text), "--split", target.split, "--hits", str(evaluation.hits),
                "--run-output", str(run), "--json", str(run.with_name(f"bm25{target.file}.json"))],
                run, [target.text, target.shards])
            self._add_evaluation("bm25", run, target)
        depths = [user.mine_depth for user in self._mined if "bm25" in user.sources]
        if depths:
            split = evaluation.train_split
            self._add("bm25-negatives", [
                "tools/mine.py", "--bm25", str(self.corpus), "--split", split, "--qrels", str(self.qrels(split)),
                "--depth", str(max(depths)), "--output", str(folder / "negatives.jsonl")],
                folder / "negatives.jsonl", [self.corpus, self.shards])

    def _add_evaluation(self, name: str, run: Path, target: Target, against: str | None = None) -> None:
        """Measure a run, and test it against that of ``against``, an earlier row of the results."""
        output = run.with_name(f"metrics{target.file}.json")
        other = [str(self._run(against, target))] if against else []
        self._add(f"{name}{target.infix}-evaluate", [
            "tools/evaluate.py", "--run", str(run), "--qrels", str(target.qrels), "--json", str(output),
            *(["--compare", *other] if other else [])], output, [run, target.shards, *map(Path, other)])

    def _run(self, name: str, target: Target) -> Path:
        """The ranking that a stage, BM25 or the cross-encoder gives for what is measured."""
        return self.work / name / target.folder / f"run{target.file}.trec"

    def _negatives(self, source: str, user: str) -> Path:
        """The file of negatives of a stage or the reranker, mined with an earlier stage's model where it names one."""
        if source == "bm25":
            return self.work / "bm25" / "negatives.jsonl"
        if source not in self._rankings:
            path = Path(source)
            if not path.is_file():
                raise InputError(f"no such file, and no earlier stage of that name (stage {user})", path)
            return path
        split = self._training.split
        name, folder = f"{source}-{split}", self.work / source
        depth = max(other.mine_depth for other in self._mined if source in other.sources)
        vectors = self._add_encode(f"{name}-encode", source, "queries", self._training)
        passages = self.config.prepare.split_documents  # the hard ones are passages, not documents
        run = self._add_search(f"{source}-mine", vectors, folder / "index", folder / f"{split}.trec",
                               depth + (_SPARE_PASSAGES if passages else _SPARE_HITS))
        output = folder / "negatives.jsonl"
        return self._add(f"{source}-negatives", [
            "tools/mine.py", "--run", str(run), "--qrels", str(self.qrels(split)), "--depth", str(depth),
            "--output", str(output), *(["--passages"] if passages else [])], output, [run, self.shards])

    @property
    def _rankings(self) -> list[str]:
        """Whose rankings can be mined, besides BM25's."""
        return [*self._stages_done, *([BI_ENCODER] if self.config.bi_encoder else [])]

    def _init(self, name: str) -> str | None:
        """What a training starts from: an earlier step's model, the backbone, or None for what its recipe says."""
        if name == "backbone" or (name == "pretrain" and self.config.pretrain is None):
            return self.config.backbone
        return str(self.work / name / "model")

    def _add_ranking(self, name: str, script: str, kind: type, user: StageConfig | RerankerConfig,
                     negatives: list[Path]) -> Path:
        """Training on judgements and negatives."""
        file = self.folder / user.recipe
        on_the_fly = isinstance(user, StageConfig) and self._scores_batches(user)
        checks.refuse_sources(recipe.load(file, kind, self._places(name)), file, name, user,
                              ("bm25", *self._rankings), self.config.prepare.split_documents, on_the_fly)
        if isinstance(user.negatives, str):
            overrides = {"negatives.path": str(negatives[0])}
        else:
            overrides = {f"negatives.sources.{i}.path": str(path) for i, path in enumerate(negatives)}
        overrides["split"] = self.config.evaluation.train_split
        init = self._init(user.init)
        if init:
            overrides["model.init"] = init
        if on_the_fly:
            overrides["loss.teacher"] = str(self.work / RERANKER / "model")
        return self._add_training(name, script, file, kind, overrides, negatives)

    def _add_reranker(self, source: str) -> None:
        """The cross-encoder, where it is trained behind ``source``, and that step's run reranked by it."""
        reranker = self.config.reranker
        if reranker is None or reranker.negatives != source:
            return
        model = self._add_ranking(RERANKER, "launch/rerank.py", RerankRecipe, reranker,
                                  [self._negatives(source, RERANKER)])
        for target in self.targets:
            run = self._run(RERANKER, target)
            self._add_scoring(f"{RERANKED}{target.infix}", model, target, ["--run", str(self._run(source, target))],
                              run, reranker.rerank_depth, ["--json", str(run.with_suffix(".json"))])
            self._add_evaluation(RERANKED, run, target, source)

    def _add_scoring(self, name: str, model: Path, target: Target, source: list[str], output: Path, depth: int,
                     more: list[str]) -> Path:
        return self._add(name, ["tools/score.py", "--model", str(model), "--data", str(target.shards), "--split",
                                target.split, *source, "--depth", str(depth), "--output", str(output),
                                *self._batch_tokens, *more],
                         output, [model, target.shards, Path(source[1])], trains=True, resumes=True,
                         machine=(self._batch_tokens,))

    def _taught(self, stage: StageConfig, position: int) -> Path:
        """One source of a stage's negatives, with the scores of its teacher where it has one."""
        source = stage.sources[position]
        negatives = self._negatives(source, stage.name)
        if stage.teacher is None or self._scores_batches(stage):
            return negatives
        folder = self.work / stage.teacher
        if source not in ("bm25", *self._rankings):  # a file, whose scores no stage's name may claim
            source, folder = f"{stage.name}-file{position or ''}", folder / "files"
        if stage.teacher == BI_ENCODER:
            return self._add_products(source, negatives, folder / f"{source}-scored.jsonl")
        return self._add_scoring(f"{source}-scores", self.work / RERANKER / "model", self._training,
                                 ["--negatives", str(negatives)], folder / f"{source}.jsonl",
                                 self.config.reranker.score_depth, [])

    def _scores_batches(self, stage: StageConfig) -> bool:
        """Whether the cross-encoder scores the stage's batches as they come."""
        return stage.teacher == RERANKER and not self.config.reranker.score_depth

    def _add_products(self, source: str, negatives: Path, output: Path) -> Path:
        """A file of negatives with the scores of the bi-encoder."""
        teacher, folder, split = self.config.bi_encoder, self.work / BI_ENCODER, self._training.split
        queries = self._add_encode(f"{BI_ENCODER}-{split}-encode", BI_ENCODER, "queries", self._training)
        docs = folder / "vectors-docs"
        return self._add(f"{source}-products", [
            "tools/score.py", "--vectors", str(docs), str(queries), "--scale", str(teacher.scale), "--data",
            str(self.shards), "--split", split, "--negatives", str(negatives), "--depth", str(teacher.score_depth),
            "--output", str(output)], output, [docs, queries, self.shards, negatives])

    def _add_stage(self, stage: StageConfig) -> None:
        negatives = [self._taught(stage, position) for position in range(len(stage.sources))]
        self._add_ranking(stage.name, "launch/finetune.py", FinetuneRecipe, stage, negatives)
        against = stage.compare or (self._stages_done[-1] if self._stages_done else "bm25")
        for target in self.targets:
            self._add_measuring(stage.name, target, against)
        self._stages_done.append(stage.name)

    def _add_measuring(self, model: str, target: Target, against: str) -> None:
        """Encode, index, search and evaluate with the model of a stage, or with the bi-encoder."""
        folder, infix = self.work / model / target.folder, target.infix
        docs = self._add_encode(f"{model}{infix}-docs", model, "docs", target)
        queries = self._add_encode(f"{model}{infix}-queries", model, "queries", target)
        engine = "faiss" if model == BI_ENCODER else self.config.evaluation.engine
        index = self._add(f"{model}{infix}-index", [
            "tools/index.py", "--vectors", str(docs), "--engine", engine, "--output", str(folder / "index")],
            folder / "index", [docs])
        run = self._add_search(f"{model}{infix}-search", queries, index, self._run(model, target),
                               self.config.evaluation.hits, documents=self.config.prepare.split_documents)
        self._add_evaluation(model, run, target, against)

    @property
    def _batch_tokens(self) -> list[str]:
        wanted = self.config.evaluation.batch_tokens
        return [] if wanted is None else ["--batch-tokens", str(wanted)]

    def _add_encode(self, name: str, model: str, side: str, target: Target) -> Path:
        output = self.work / model / target.folder / ("vectors-docs" if side == "docs" else f"vectors-{target.split}")
        evaluation, shards = self.config.evaluation, self._read_by(model, target)
        top_k = evaluation.top_k_docs if side == "docs" else evaluation.top_k_queries
        if model == BI_ENCODER:
            path, made = self._bi_encoder, self._content_of(self._bi_encoder)
            more = ["--representation", self.config.bi_encoder.representation]
        else:
            path, made = str(self.work / model / "model"), [self.work / model / "model"]
            more = ["--top-k", str(top_k)] if top_k else []
        more += ["--split", target.split] if side == "queries" else []
        command = ["tools/encode.py", "--model", path, "--data", str(shards), "--side", side,
                   "--output", str(output), *self._batch_tokens, *more]
        return self._add(name, command, output, [*made, shards], trains=True, resumes=True,
                         machine=(self._batch_tokens,))

    def _add_search(self, name: str, queries: Path, index: Path, run: Path, hits: int, documents: bool = False) -> Path:
        return self._add(name, ["tools/search.py", "--index", str(index), "--queries", str(queries), "--hits",
                                str(hits), "--output", str(run), "--json", str(run.with_suffix(".json")),
                                *(["--max-passage"] if documents else [])], run, [index, queries])
