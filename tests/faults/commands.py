"""The commands of the project on tiny inputs, each run in a fork that can be killed at any point (see campaign.py).

Python starts once: each run is a fork of a process that has imported everything and done nothing. A kill comes at a
moment, or right before the n-th time that the command opens a file for writing, renames, removes, makes a folder or
flushes to disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

from lexmae import artifact, cli, verification  # noqa: E402

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "ctypes.dlsym")
_PATIENCE = 300.0  # seconds; what takes longer hangs
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# -------------------------------------------------------------------------------------------------------- processes


@dataclass
class Outcome:
    """How a forked run ended: exit code (negative: by that signal), what it printed, seconds, file operations."""

    code: int
    text: str
    seconds: float
    operations: int


def run(job: Callable[[], object], scratch: Path, *, crash_at: int = 0, delay: float = 0.0,
        kill_after: float | None = None) -> Outcome:
    """Run ``job`` through ``cli.run`` in a fork.

    Args:
        crash_at: it is killed right before this file operation, or ``delay`` seconds later, in the midst of writing.
        kill_after: it is killed after so many seconds.
    """
    said, counted = scratch / "said.txt", scratch / "operations"
    counted.unlink(missing_ok=True)
    start = time.perf_counter()
    child = os.fork()
    if not child:
        _become(job, said, counted, crash_at, delay)
    ended = 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and time.perf_counter() - start > (_PATIENCE if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        time.sleep(0.002)
    operations = int(counted.read_text()) if counted.exists() else 0
    return Outcome(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), time.perf_counter() - start,
                   operations)


def _become(job: Callable[[], object], said: Path, counted: Path, crash_at: int, delay: float) -> None:
    """The child: never returns."""
    os.setpgid(0, 0)
    handle = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(handle, 1), os.dup2(handle, 2)
    code, count = 1, 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == crash_at and delay:
            signal.setitimer(signal.ITIMER_REAL, delay)  # nobody handles SIGALRM: it ends the process as SIGKILL does
        elif count == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in _EVENTS or event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            step()

    flush = os.fsync

    def fsync(handle: int) -> None:
        step()
        flush(handle)

    try:
        sys.addaudithook(hook)
        os.fsync = fsync
        cli.run(lambda _: job())
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        total = count
        counted.write_text(str(total))
        os._exit(code)


# --------------------------------------------------------------------------------------------------------- commands


def load() -> None:
    """Import what commands need, and start nothing: forks begin with it."""
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from lexmae.data import negative_rows, prepare  # noqa: F401
    from lexmae.retrieval import bm25, encode, encode_dense, engines, exact, mining, score, updates  # noqa: F401
    from lexmae.train import checkpoint, engine, loop, session  # noqa: F401

    encode.BLOCK, score.BLOCK = 8, 4  # several parts even of tiny inputs
    torch.set_num_threads(1)


@dataclass
class Command:
    """A command of the project on tiny inputs.

    Attributes:
        job: output → what the command does.
        digest: output → what must be the same after faults; InputError or an assertion where it is not whole.
        before: puts the output into the state that the command changes; nothing for most.
        states: digests that an output may have before the command has finished; None stands for no output.
    """

    name: str
    job: Callable[[Path], object]
    digest: Callable[[Path], str]
    before: Callable[[Path], None] = lambda output: None
    finished: Callable[[Path], Path] = lambda output: output
    states: set[str | None] = field(default_factory=lambda: {None})
    seconds: float = 0.0
    operations: int = 0

    def state(self, output: Path) -> str | None:
        """The digest, None without an output."""
        return self.digest(output) if self.finished(output).exists() else None


def whole(path: Path) -> str:
    """The fingerprint of an artifact whose checksums are right."""
    return verification.verify(path).fingerprint


def trained(output: Path) -> str:
    """What training has come to: its weights and the losses of every step."""
    losses = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
    verification.verify(output / "model")
    return artifact.checksum(output / "model" / "model.safetensors") + str(losses)


def script(name: str) -> Callable[[list[str]], object]:
    """``main`` of a command."""
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_command", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def inputs(folder: Path) -> None:
    """Everything that the commands read, made by a fork."""
    import conftest
    import test_score
    from test_launch import TINY, write_recipe

    from lexmae.config import NegativesConfig
    from lexmae.data import negative_rows
    from lexmae.data.corpus import write_beir
    from lexmae.data.negatives import write_negatives
    from lexmae.data.shards import Shards, prepare
    from lexmae.retrieval import encode, encode_dense, engines
    from lexmae.retrieval.vectors import SparseVectors

    beir, shards, model = folder / "beir", folder / "shards", folder / "model"
    write_beir(beir, conftest.passages(), conftest.queries(), conftest.judgements())
    prepare(beir, shards, train_tokenizer=140, max_length=conftest.MAX_LENGTH, query_length=conftest.QUERY_LENGTH,
            workers=1, shard_size=16)
    conftest.write_model(model, shards)
    test_score.write_reranker(folder / "reranker", Shards.open(shards))
    for side, split in (("docs", None), ("queries", "dev")):
        encode.encode(model, shards, folder / side, encode.EncodeConfig(side, split))
    encode_dense.encode(model, shards, folder / "dense", encode.EncodeConfig("docs"), "cls")
    docs = SparseVectors.open(folder / "docs")
    docs.subset(range(30)).save(folder / "some")
    docs.subset(range(30, 41)).save(folder / "rest")
    engines.build(folder / "docs", "exact", folder / "index")
    engines.build(folder / "some", "exact", folder / "index-some")
    (folder / "gone").write_text("d3\nd7\n")
    shutil.copytree(folder / "index", folder / "index-old")
    from lexmae.retrieval import updates

    updates.delete(folder / "index-old", folder / "gone")
    write_negatives(folder / "n.jsonl", [(f"t{i}", [f"d{(7 * i + j) % 41}" for j in range(9)], None)
                                         for i in range(13)])
    negative_rows.build(Shards.open(shards), "train", NegativesConfig(str(folder / "n.jsonl")), folder / "negatives")
    tiny = {**TINY, "size": {**TINY["size"], "hidden_dropout_prob": 0.1}}
    for kind in ("pretrain", "finetune"):
        changes = {"negatives": {"path": str(folder / "n.jsonl"), "per_query": 2}} if kind == "finetune" else {}
        write_recipe(folder / "recipes", kind, shards, model=tiny, logging={"every": 1, "checkpoint_every": 1},
                     **changes)


def commands(folder: Path) -> list[Command]:
    """All commands over the inputs in ``folder``."""
    prepare, mine, encode, index, search, export, score = (
        script(f"tools/{name}.py") for name in ("prepare", "mine", "encode", "index", "search", "export", "score"))

    def training(kind: str) -> Command:
        main, recipe = script(f"launch/{kind}.py"), folder / "recipes" / f"{kind}.yaml"
        return Command(kind, lambda out: main(recipe, "--resume", "auto", "--set", f"output={out}",
                                              "optimization.steps=4"), trained, finished=lambda out: out / "model")

    def change(name: str, begin: str, *arguments: object) -> Command:
        return Command(f"index {name}", lambda out: index("--index", out, *arguments), whole,
                       before=lambda out: shutil.copytree(folder / begin, out))

    shards, model, docs = folder / "shards", folder / "model", folder / "docs"
    return [
        Command("prepare", lambda out: prepare("--input", folder / "beir", "--output", out, "--train-tokenizer", 140,
                                               "--max-length", 28, "--query-length", 10, "--workers", 1), whole),
        Command("mine", lambda out: mine("--bm25", folder / "beir", "--split", "train", "--qrels", folder
                / "beir/qrels/train.tsv", "--depth", 8, "--threads", 1, "--output", out), artifact.checksum),
        Command("encode", lambda out: encode("--model", model, "--data", shards, "--side", "docs", "--output", out),
                whole),
        Command("index", lambda out: index("--vectors", docs, "--output", out), whole),
        change("--add", "index-some", "--add", folder / "rest"),
        change("--delete", "index", "--delete", folder / "gone"),
        change("--compact", "index-old", "--compact"),
        Command("search", lambda out: search("--index", folder / "index", "--queries", folder / "queries", "--threads",
                                             1, "--output", out), artifact.checksum),
        Command("export", lambda out: export("--vectors", docs, "--format", "opensearch", "--output", out), whole),
        Command("score", lambda out: score("--model", folder / "reranker", "--data", shards, "--split", "train",
                                           "--negatives", folder / "n.jsonl", "--output", out), artifact.checksum),
        training("pretrain"), training("finetune"),
    ]


def readers(folder: Path) -> Iterator[tuple[str, Path, Callable[[Path, Path], object]]]:
    """Kinds of artifacts: a name, one of them, and a command (folder, output) that reads it."""
    index, search, encode, mine = (script(f"tools/{name}.py") for name in ("index", "search", "encode", "mine"))

    def dense(source: Path, output: Path) -> None:
        from lexmae.retrieval.dense import DenseVectors

        found = DenseVectors.open(source)
        output.write_bytes(" ".join(found.ids).encode() + found.matrix.tobytes())

    def negatives(source: Path, output: Path) -> None:
        from lexmae.data.draws import NegativeLists

        lists = NegativeLists(source)
        found = [source.rows[source.part(query)].tolist() for source in lists._sources for query in range(13)]
        output.write_text(json.dumps([found, lists.judged_pairs().tolist()]))

    yield "shards", folder / "shards", lambda source, output: mine(
        "--bm25", source, "--split", "dev", "--threads", 1, "--run-output", output)
    yield "vectors", folder / "docs", lambda source, output: index("--vectors", source, "--output", output)
    yield "dense", folder / "dense", dense
    yield "index", folder / "index", lambda source, output: search(
        "--index", source, "--queries", folder / "queries", "--threads", 1, "--output", output)
    yield "negatives", folder / "negatives", negatives
    yield "model", folder / "model", lambda source, output: encode(
        "--model", source, "--data", folder / "shards", "--side", "queries", "--split", "dev", "--output", output)
