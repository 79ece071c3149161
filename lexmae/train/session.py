"""From a recipe to a trained model: checks, processes, model, data, loop, export."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lexmae import artifact, lifeline, recipe
from lexmae.cli import say
from lexmae.config import FinetuneRecipe, PretrainRecipe, RerankRecipe
from lexmae.data.shards import Shards
from lexmae.errors import InputError, Preempted
from lexmae.model import card, reranker
from lexmae.model.encoder import save_masked_lm
from lexmae.model.static_queries import save_table
from lexmae.ranks import Hosts, several_hosts
from lexmae.train import flops, hardware, parts, probe, rerank, schedules
from lexmae.train.hardware import Hardware

# What may change between a run and its continuation: sections, and keys of others.
_WHERE_ONLY = ("output", "deepspeed", "logging", "probe")
_LEARNS_NOTHING = {**recipe.MACHINE, "bottleneck": ("active_terms",)}


def check(config: PretrainRecipe | FinetuneRecipe | RerankRecipe, resume: str | None = None,
          world: int | None = None) -> Hardware:
    """Refuse what cannot work, before any process group, model or output exists.

    Raises:
        InputError: an input is missing or does not fit, the batch cannot be divided, the precision has no device, or
            the output is taken.
    """
    path = hardware.find(config.deepspeed)
    spread = hardware.compose(path, config.optimization, world or hardware.world_size(),
                              accumulate=hardware.accumulates(config))
    hardware.refuse_precision(spread, torch.cuda.is_available(), path)
    shards = Shards.open(config.data)
    if isinstance(config, (FinetuneRecipe, RerankRecipe)):
        shards.refuse_absent(config.split)
        for source in config.negatives.lists:
            if not Path(source.path).is_file():
                raise InputError("no such file of negatives", source.path)
    if _teacher(config):
        rerank.check_teacher(config.loss.teacher, shards, spread)
    if isinstance(config, RerankRecipe):
        rerank.check(config, shards, spread)
    else:
        hardware.refuse_budget(spread, max(shards.manifest.extra["max_length"], shards.manifest.extra["query_length"]),
                               "the shards hold texts that may be longer")
    if not isinstance(config, RerankRecipe) and config.probe.every:
        probe.check(config.probe, shards)
    if config.model.init != "scratch":
        kinds = ("model", reranker.KIND) if isinstance(config, RerankRecipe) else ("model",)
        shards.refuse_other_tokenizer(config.model.init, *kinds)
    output = Path(config.output)
    if not resume and artifact.exists(output / "model"):
        raise InputError("holds a finished model already; choose another output", output)
    if not resume and (output / "checkpoints").is_dir() and any((output / "checkpoints").glob("step-*")):
        raise InputError("holds checkpoints; continue with --resume auto, or choose another output", output)
    return spread


def ready(config: PretrainRecipe | FinetuneRecipe | RerankRecipe,
          resume: str | None = None) -> tuple[Hardware, list[Path]]:
    """``check``, and the checkpoints to continue from, the first choice first, which must fit the recipe.

    Raises:
        InputError: as ``check``; or the checkpoint does not exist, or is another recipe's.
    """
    spread, output = check(config, resume), Path(config.output)
    if not resume or artifact.exists(output / "model"):
        return spread, []
    from lexmae.train import checkpoint

    found = checkpoint.candidates(output / "checkpoints", resume)
    if found:
        checkpoint.refuse_mismatch(found, _learned(recipe.to_dict(config)), _inputs(config))
    return spread, found


def run(config: PretrainRecipe | FinetuneRecipe | RerankRecipe, resume: str | None = None) -> None:
    """Train as the recipe says and write ``output/model``; every rank calls it.

    Args:
        resume: ``auto`` continues from the newest undamaged checkpoint if there are any; a step or a path names one.

    Raises:
        RunError: the run cannot go on, or was asked to stop (``Preempted``).
    """
    spread, found = ready(config, resume)
    output = Path(config.output)
    if artifact.exists(output / "model") and not several_hosts():
        return _finished(output)
    from lexmae.train import checkpoint, engine, health, loop  # deepspeed takes many seconds to import

    learned = _learned(recipe.to_dict(config))
    device = engine.start_processes()
    try:
        hosts = Hosts(output)
        if hosts.agree(artifact.exists(output / "model")):  # a host apart has none in any case
            return _finished(output)
        chosen = checkpoint.settle(hosts, found)
        engine.on_rank_zero(lambda: _open_output(output, config))
        shards = Shards.open(config.data)
        hosts.refuse_difference(**_flat("recipe", learned), shards=shards.manifest.fingerprint,
                                **_flat("DeepSpeed configuration", spread.config), micro_batch=spread.micro_batch,
                                micro_tokens=spread.micro_tokens, **_contents(config))
        torch.manual_seed(config.optimization.seed)
        reranking = isinstance(config, RerankRecipe)
        lm = rerank.build_scorer(config, shards) if reranking else parts.build_lm(config.model, shards, bool(chosen))
        rank = torch.distributed.get_rank()
        model, objective, data = parts.build(config, lm, shards, parts.Place(
            spread, rank, engine.gather, functools.partial(engine.on_rank_zero, hosts=hosts)))
        torch.manual_seed(config.optimization.seed + 1 + rank)  # dropout differs between ranks, weights do not
        meter = flops.Meter(flops.counter(model, spread.world), _peak(config, spread, device))
        run_engine = engine.Engine(model, hardware.with_profile(spread, config.logging.profile_step, output),
                                   config.optimization, device, hosts)
        total = schedules.total_steps(config.optimization, data.size)
        _announce(config, spread, model, total, data.size, run_engine.world)
        resumed = checkpoint.load(run_engine, chosen) if chosen else checkpoint.Resumed()
        objective.load_state_dict(resumed.facts.get("objective", {}))
        export = functools.partial(_export, run_engine, engine.on_rank_zero, lm, getattr(model, "query_encoder", None),
                                   config, shards)
        probing = {}
        if not reranking and config.probe.every:
            probing["probe"] = _probe(config, shards, objective, run_engine, engine, total, bool(chosen), export)
        lexicon = health.watch_lexicon(config, shards.vocab_size, total, resumed.facts.get("said", ()))
        facts = {checkpoint.INPUTS: _inputs(config, parts.checksums_of_negatives(config))}
        if probing:
            facts[checkpoint.PROBED] = _comparable(recipe.to_dict(config))["probe"]
        loop.train(loop.Run(run_engine, objective, data, config.optimization, config.logging, total, output, learned,
                            facts=facts, meter=meter, examples=health.example_ids(data), lexicon=lexicon,
                            **probing), resumed)
        lifeline.at("writing the model")
        export("model", total)
    except Preempted:
        raise
    except Exception as error:
        lifeline.blame(error)
    finally:
        engine.stop_processes()


def _peak(config: Any, spread: Hardware, device: torch.device) -> float | None:
    """The best TFLOP/s of this rank's device, as the recipe says or as they are known."""
    if config.logging.peak_tflops is not None or device.type != "cuda":
        return config.logging.peak_tflops
    return flops.peak(torch.cuda.get_device_name(device), spread.precision)


def _finished(output: Path) -> None:
    say(f"{output / 'model'} is finished: nothing to do")


def _probe(config: Any, shards: Shards, objective: Any, run_engine: Any, engine: Any, total: int, resumed: bool,
           export: Callable) -> probe.Probe:
    """The probe of a run; the best model so far is that of `output/best` where the run is continued."""
    best, settings = Path(config.output) / "best", _comparable(recipe.to_dict(config))

    def keep(step: int, figures: dict[str, Any]) -> None:
        export("best", step, probe={**figures, "step": step})
        say(f"{best}: probe MRR@10 {figures['probe_mrr_10']:.4f} at step {step}")

    before = torch.zeros(1, dtype=torch.float64, device=run_engine.device)
    if run_engine.rank == 0:  # which tells the others
        before[0] = probe.best_before(best, lambda other: _comparable(other) == settings) if resumed else -1.0
    chosen = probe.select(config.probe, shards, config.optimization.seed)
    say(f"probe: {len(chosen.queries)} queries of {config.probe.split}, {chosen.relevant.shape[1]} documents")
    return probe.Probe(config.probe, shards, chosen, total, run_engine, objective.encode, engine.gather, keep,
                       run_engine.sum(before).item(),
                       config.bottleneck.active_terms if isinstance(config, PretrainRecipe) else None)


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a composed recipe on which the figures of its probes depend, as a manifest gives it back."""
    terms = config.get("bottleneck", {}).get("active_terms")
    return json.loads(json.dumps({**_learned(config), "probe": {**config["probe"], "every": None, "terms": terms}}))


def _learned(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a composed recipe that a continued run must share with its beginning: without what belongs to the
    machine, or to what is measured and written."""
    return {key: value for key, value in recipe.without(config, _LEARNS_NOTHING).items() if key not in _WHERE_ONLY}


def _inputs(config: PretrainRecipe | FinetuneRecipe | RerankRecipe,
            checksums: Sequence[str] | None = None) -> dict[str, str]:
    """What a continued run must find as its beginning did: path → fingerprint of shards, checksum of negatives, content
    of the teacher where it is a folder.

    Args:
        checksums: of the files of negatives, where they are known.
    """
    files = _negatives(config)
    known = map(artifact.checksum, files) if checksums is None else checksums
    found = {config.data: artifact.read(config.data).fingerprint, **dict(zip(files, known, strict=True))}
    teacher = artifact.content_of(config.loss.teacher) if _teacher(config) else None
    return found | ({_teacher(config): teacher} if teacher else {})


def _contents(config: PretrainRecipe | FinetuneRecipe | RerankRecipe) -> dict[str, str | None]:
    """What the hosts of a run may have other copies of, besides the shards: the contents of negatives, teacher and
    first model, from the first rank of each of several hosts; None of a hub name."""
    if not several_hosts() or os.environ.get("LOCAL_RANK", "0") != "0":
        return {}
    folders = [_teacher(config), "" if config.model.init == "scratch" else config.model.init]
    found = {**{path: artifact.checksum(path) for path in _negatives(config)},
             **{path: artifact.content_of(path) for path in filter(None, folders)}}
    return {f"the content of {path}": content for path, content in found.items()}


def _negatives(config: PretrainRecipe | FinetuneRecipe | RerankRecipe) -> list[str]:
    return [] if isinstance(config, PretrainRecipe) else [source.path for source in config.negatives.lists]


def _teacher(config: PretrainRecipe | FinetuneRecipe | RerankRecipe) -> str:
    return config.loss.teacher if isinstance(config, FinetuneRecipe) else ""


def _flat(name: str, values: Any) -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(values, Mapping):
        return {name: values}
    return {key: item for inner, value in values.items() for key, item in _flat(f"{name}.{inner}", value).items()}


def _open_output(output: Path, config: Any) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with artifact.atomic_file(output / "config.yaml") as out:
        out.write(recipe.dump(config))


def _announce(config: Any, spread: Hardware, model: torch.nn.Module, total: int, examples: int, world: int) -> None:
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"{config.output}: {weights / 1e6:.1f} M weights, {examples} examples, {total} steps of "
        f"{config.optimization.batch}, {world} rank(s), ZeRO-{spread.zero_stage}, {spread.precision}, "
        f"accumulation {spread.accumulation or f'by {spread.micro_tokens} tokens'}")


def _export(run_engine: Any, on_rank_zero: Callable, lm: Any, queries: Any, config: Any, shards: Shards, name: str,
            step: int, **facts: Any) -> None:
    """Write ``output/NAME``, the model after ``step`` steps, from the weights of all ranks; every rank calls it.

    Args:
        facts: more for its manifest.
    """
    state = run_engine.full_state(lm)
    table = None if queries is None else run_engine.full_state(queries)
    on_rank_zero(lambda: _write_model(Path(config.output) / name, lm, state, table, config, shards, step, facts))


def _write_model(target: Path, lm: Any, state: dict[str, torch.Tensor], table: dict[str, torch.Tensor] | None,
                 config: Any, shards: Shards, step: int, facts: dict[str, Any]) -> None:
    """A model in Hugging Face layout from the gathered float32 weights; a better best one replaces that before it.

    Args:
        table: the weights of static queries.
    """
    extra = shards.manifest.extra
    inputs = {"shards": config.data}
    if config.model.init != "scratch":
        inputs["init"] = config.model.init
    if isinstance(config, (FinetuneRecipe, RerankRecipe)):
        inputs |= {f"negatives{i or ''}": source.path for i, source in enumerate(config.negatives.lists)}
    if _teacher(config):
        inputs["teacher"] = config.loss.teacher
    reranking = isinstance(config, RerankRecipe)
    with artifact.create(target, reranker.KIND if reranking else "model", inputs=inputs, config=recipe.to_dict(config),
                         overwrite=target.name == "best") as draft:
        if reranking:
            facts = {**facts, **rerank.save(lm, draft.path, shards, state, config)}
        else:
            save_masked_lm(lm, draft.path, shards.tokenizer_dir, state)
        if isinstance(config, PretrainRecipe) and config.bottleneck.active_terms:
            draft.extra["bias_added"] = parts.level(draft.path, shards, config.bottleneck.active_terms)
        if table is not None:
            draft.extra["queries"] = "static"
            if not save_table(draft.path, table["raw"], shards.tokenizer_dir, extra["query_length"]):
                say("sentence-transformers cannot load this model: its vocabulary is larger than the tokenizer's")
        draft.counts.update(steps=step, weights=sum(t.numel() for t in {id(t): t for t in state.values()}.values()))
        draft.extra.update({key: extra[key] for key in ("tokenizer_hash", "vocab_size", "max_length", "query_length")})
        draft.extra.update(facts)
        if not reranking:
            (draft.path / card.NAME).write_text(_card(config, shards, draft), encoding="utf-8")
    say(f"wrote {target}")


def _card(config: Any, shards: Shards, draft: artifact.Draft) -> str:
    """The model card of a run, from its recipe, its data and its log."""
    output, steps = Path(config.output), draft.counts["steps"]
    stage = "finetune" if isinstance(config, FinetuneRecipe) else "pretrain"
    return card.render(card.Facts(output.resolve().name, stage, recipe.dump(config), recipe.to_dict(config),
                                  shards.manifest, steps, draft.counts["weights"],
                                  card.last_figures(output / "log.jsonl", steps) | draft.extra.get("probe", {}),
                                  card.base_model(config.model.init)))
