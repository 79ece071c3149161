"""Turns a pipeline recipe into the commands of the cycle, in order; refuses a wrong recipe before the first of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lexmae import artifact, recipe
from lexmae.config import FinetuneRecipe, PretrainRecipe
from lexmae.cycle.config import PipelineRecipe, StageConfig
from lexmae.errors import InputError
from lexmae.train import hardware

_SPARE_HITS = 50  # retrieved beyond the depth of negatives, since judged positives are dropped


@dataclass
class Step:
    """One command of the cycle.

    Attributes:
        name: what ``--until`` takes.
        command: script and arguments.
        output: what it makes, a file or a folder.
        inputs: files and folders whose content decides whether it has to run again.
        settings: further content that decides so.
        trains: whether it runs on all ranks through the deepspeed launcher.
        resumes: whether unfinished output is kept for it to go on with.
    """

    name: str
    command: list[str]
    output: Path
    inputs: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = False
    resumes: bool = False


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
        self._add_prepare()
        if config.pretrain:
            self._add_training("pretrain", "launch/pretrain.py", folder / config.pretrain, PretrainRecipe, {}, [])
        self._add_bm25()
        for stage in config.stages:
            self._add_stage(stage)

    def qrels(self, split: str) -> Path:
        """Judgements of a split, as the shards keep them."""
        return self.shards / "qrels" / f"{split}.tsv"

    def _add(self, *args: Any, **kwargs: Any) -> Path:
        step = Step(*args, **kwargs)
        if step.output not in {known.output for known in self.steps}:  # two stages may need the same
            self.steps.append(step)
        return step.output

    def _add_corpus(self) -> Path:
        if self.config.input != "builtin":
            if not Path(self.config.input).is_dir() and self.config.input.count("/") != 1:
                raise InputError("no such folder", self.config.input)
            return Path(self.config.input)
        output = self.work / "corpus"
        limit = self.config.builtin_passages
        command = ["-m", "lexmae.data.builtin", "--output", str(output)]
        return self._add("corpus", command + (["--max-passages", str(limit)] if limit else []), output,
                         settings=artifact.versions())

    def _add_prepare(self) -> None:
        settings = self.config.prepare
        command = ["tools/prepare.py", "--input", str(self.corpus), "--output", str(self.shards),
                   "--max-length", str(settings.max_length), "--query-length", str(settings.query_length)]
        command += (["--tokenizer", settings.tokenizer] if settings.tokenizer
                    else ["--train-tokenizer", str(settings.train_tokenizer)])
        self._add("prepare", command, self.shards, [self.corpus])

    def _add_training(self, name: str, script: str, file: Path, kind: type, overrides: dict[str, str],
                      inputs: list[Path]) -> Path:
        output = self.work / name
        values = {"data": str(self.shards), "output": str(output), **overrides}
        settings = [f"{key}={value}" for key, value in values.items()]
        config = recipe.load(file, kind, settings)
        command = [script, str(file), "--set", *settings, "--resume", "auto"]
        if self.deepspeed_config:
            command += ["--deepspeed_config", self.deepspeed_config]
        self._check_hardware(config)
        learning = {k: v for k, v in recipe.to_dict(config).items() if k not in ("logging", "deepspeed")}
        return self._add(name, command, output / "model", [self.shards, *inputs], learning, trains=True, resumes=True)

    def _check_hardware(self, config: PretrainRecipe | FinetuneRecipe) -> None:
        """Refuse an unknown, contradictory or impossible ds_config before the first step."""
        path = hardware.find(self.deepspeed_config or config.deepspeed)
        spread = hardware.compose(path, config.optimization, self.ranks, accumulate=isinstance(config, PretrainRecipe))
        hardware.refuse_precision(spread, self.has_gpu, path)

    def _add_bm25(self) -> None:
        evaluation, folder = self.config.evaluation, self.work / "bm25"
        run = self._add("bm25", ["tools/mine.py", "--bm25", str(self.corpus), "--split", evaluation.split,
                                 "--hits", str(evaluation.hits), "--run-output", str(folder / "run.trec"),
                                 "--json", str(folder / "bm25.json")], folder / "run.trec", [self.corpus, self.shards])
        self._add_evaluation("bm25", run)
        depths = [stage.mine_depth for stage in self.config.stages if stage.negatives == "bm25"]
        if depths:
            split = evaluation.train_split
            self._add("bm25-negatives", [
                "tools/mine.py", "--bm25", str(self.corpus), "--split", split, "--qrels", str(self.qrels(split)),
                "--depth", str(max(depths)), "--output", str(folder / "negatives.jsonl")],
                folder / "negatives.jsonl", [self.corpus, self.shards])

    def _add_evaluation(self, name: str, run: Path) -> None:
        qrels = self.qrels(self.config.evaluation.split)
        output = self.work / name / "metrics.json"
        self._add(f"{name}-evaluate", ["tools/evaluate.py", "--run", str(run), "--qrels", str(qrels),
                                       "--json", str(output)], output, [run, self.shards])

    def _negatives(self, stage: StageConfig) -> Path:
        """The file of negatives of a stage, mined with an earlier stage's model where it names one."""
        if stage.negatives == "bm25":
            return self.work / "bm25" / "negatives.jsonl"
        if stage.negatives not in self._stages_done:
            path = Path(stage.negatives)
            if not path.is_file():
                raise InputError(f"no such file, and no earlier stage of that name (stage {stage.name})", path)
            return path
        source, split = stage.negatives, self.config.evaluation.train_split
        name, folder = f"{source}-{split}", self.work / source
        depth = max(other.mine_depth for other in self.config.stages if other.negatives == source)
        vectors = self._add_encode(f"{name}-encode", source, "queries", split)
        run = self._add_search(f"{name}-search", source, vectors, folder / f"{split}.trec", depth + _SPARE_HITS)
        output = folder / "negatives.jsonl"
        return self._add(f"{source}-negatives", [
            "tools/mine.py", "--run", str(run), "--qrels", str(self.qrels(split)), "--depth", str(depth),
            "--output", str(output)], output, [run, self.shards])

    def _add_stage(self, stage: StageConfig) -> None:
        negatives = self._negatives(stage)
        init = "" if self.config.pretrain is None and stage.init == "pretrain" else self.work / stage.init / "model"
        overrides = {"negatives.path": str(negatives), "split": self.config.evaluation.train_split}
        if init:
            overrides["model.init"] = str(init)
        self._add_training(stage.name, "launch/finetune.py", self.folder / stage.recipe, FinetuneRecipe, overrides,
                           [negatives, *([init] if init else [])])
        docs = self._add_encode(f"{stage.name}-docs", stage.name, "docs", None)
        queries = self._add_encode(f"{stage.name}-queries", stage.name, "queries", self.config.evaluation.split)
        self._add(f"{stage.name}-index", ["tools/index.py", "--vectors", str(docs), "--engine",
                                          self.config.evaluation.engine, "--output",
                                          str(self.work / stage.name / "index")],
                  self.work / stage.name / "index", [docs])
        run = self._add_search(f"{stage.name}-search", stage.name, queries, self.work / stage.name / "run.trec",
                               self.config.evaluation.hits)
        self._add_evaluation(stage.name, run)
        self._stages_done.append(stage.name)

    def _add_encode(self, name: str, model: str, side: str, split: str | None) -> Path:
        evaluation, folder = self.config.evaluation, self.work / model
        output = folder / ("vectors-docs" if side == "docs" else f"vectors-{split}")
        command = ["tools/encode.py", "--model", str(folder / "model"), "--data", str(self.shards), "--side", side,
                   "--output", str(output), "--batch-tokens", str(evaluation.batch_tokens)]
        command += ["--split", split] if split else []
        top_k = evaluation.top_k_docs if side == "docs" else evaluation.top_k_queries
        command += ["--top-k", str(top_k)] if top_k else []
        return self._add(name, command, output, [folder / "model", self.shards], trains=True, resumes=True)

    def _add_search(self, name: str, model: str, queries: Path, run: Path, hits: int) -> Path:
        index = self.work / model / "index"
        return self._add(name, ["tools/search.py", "--index", str(index), "--queries", str(queries), "--hits",
                                str(hits), "--output", str(run), "--json", str(run.with_suffix(".json"))],
                         run, [index, queries])
