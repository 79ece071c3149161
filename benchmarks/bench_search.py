#!/usr/bin/env python
"""Search engines side by side: building, size, speed, latency, recall; one thread each.

    python benchmarks/bench_search.py [--vectors DIR] [--documents 50000] [--queries 500] [--hits 10 1000]
        [--engines exact naver splade-index scipy anserini seismic] [--rounds 3] [--json NAME]

`--vectors DIR` takes the vectors of `tools/encode.py` in `DIR/docs` and `DIR/queries`, all of them where `--documents`
and `--queries` do not say how many of the first. Without it they are made up: those of `synthetic.py` (119 terms a
document, 35 a query). Times are the processor seconds of this
process, so that other programs on the machine disturb them less; wall time is printed beside them. The engines take
turns in each round, and the best round counts. Anserini's is a Java process, of which only its own report (wall time)
is known. Latency is that of queries one by one, where the engine can be called so.

Recall@k is the share of the k hits whose true score reaches the k-th true score, by a product of the whole matrix in
64-bit integers, over `--check` queries; "wrong" counts hits whose reported score is not the true one (Seismic reports
hundredths and half precision: not compared).
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import synthetic  # noqa: E402
from search_peers import PEERS, Missing, Peer, part, processor  # noqa: E402

from lexmae import artifact, cli  # noqa: E402
from lexmae.errors import InputError  # noqa: E402
from lexmae.retrieval.vectors import SparseVectors  # noqa: E402

VERSIONS = ("numpy", "numba", "scipy", "splade-index", "pyserini", "pyseismic-lsr")


def main() -> None:
    """Build all, take turns, check, print."""
    options = parse()
    docs, queries = load(options)
    places = {"--json", options.json, "--folder", options.folder}
    arguments = [argument for argument in sys.argv[1:] if argument not in places]
    result = {"command": " ".join(["python", "benchmarks/bench_search.py", *arguments]), **machine(),
              "vectors": fingerprints(docs, queries),
              "documents": len(docs), "queries": len(queries), "terms": [docs.mean_active, queries.mean_active],
              "engines": {}, "missing": {}}
    print(f"{result['command']}\n{result['hardware']}; load {result['load']}; {result['versions']}\n"
          f"{len(docs):,} documents of {docs.mean_active:.1f} terms, {len(queries):,} queries of "
          f"{queries.mean_active:.1f}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        peers = build(options.engines, docs, Path(folder), result)
        for k in options.hits:
            speeds(peers, queries, k, options.rounds, result["engines"])
            check(peers, docs, part(queries, 0, min(options.check, len(queries))), k, result["engines"])
    for k in options.hits:
        table(result["engines"], k)
    for name, reason in result["missing"].items():
        print(f"{name}: {reason}")
    if options.json:
        with artifact.atomic_file(json_path(options.json)) as out:
            json.dump(result, out, indent=1)
            out.write("\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", metavar="DIR", help="folder with the vectors docs and queries of tools/encode.py")
    parser.add_argument("--documents", type=int, help="all of DIR, or 50000 made up")
    parser.add_argument("--queries", type=int, help="all of DIR, or 500 made up")
    parser.add_argument("--hits", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=50, help="queries whose hits are compared with the true scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where indexes are put meanwhile (the system's temporary folder)")
    parser.add_argument("--json", metavar="NAME", nargs="?", const="bench_search",
                        help="write the record to results/NAME.json, or to a path")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[SparseVectors, SparseVectors]:
    """Documents and queries: of a folder, or made up."""
    if options.vectors is None:
        return (synthetic.vectors("docs", options.documents or 50_000, options.seed),
                synthetic.vectors("queries", options.queries or 500, options.seed))
    docs, queries = (SparseVectors.open(Path(options.vectors) / side, side) for side in ("docs", "queries"))
    if docs.vocabulary != queries.vocabulary:
        raise InputError("documents and queries have different vocabularies", options.vectors)
    return first(docs, options.documents), first(queries, options.queries)


def first(vectors: SparseVectors, count: int | None) -> SparseVectors:
    """The first ``count`` texts, in the order of their ids, which is that of the engines' rows."""
    order = sorted(range(len(vectors) if count is None else min(count, len(vectors))), key=lambda row: vectors.ids[row])
    found = vectors.subset(order)
    return SparseVectors(found.ids, *found.csr, found.vocabulary, found.extra, vectors.fingerprint)


def fingerprints(docs: SparseVectors, queries: SparseVectors) -> dict[str, str]:
    """Of the artifacts; empty for made-up vectors."""
    return {name: part.fingerprint for name, part in (("docs", docs), ("queries", queries)) if part.fingerprint}


def json_path(name: str) -> Path:
    """A plain name is a file of results/."""
    return Path(__file__).parent / "results" / f"{name}.json" if re.fullmatch(r"[\w-]+", name) else Path(name)


def machine() -> dict:
    """Hardware, load and versions."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"hardware": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "load": os.getloadavg()[0], "versions": versions, "date": time.strftime("%Y-%m-%d")}


def build(names: list[str], docs: SparseVectors, folder: Path, result: dict) -> dict[str, Peer]:
    """Build each engine; what is missing is noted."""
    peers = {}
    for name in names:
        wall, used = time.perf_counter(), time.process_time()
        try:
            peers[name] = PEERS[name](docs, folder)
        except Missing as error:
            result["missing"][name] = str(error)
            continue
        result["engines"][name] = {"build_seconds": round(time.perf_counter() - wall, 2),
                                   "build_cpu_seconds": round(time.process_time() - used, 2),
                                   "megabytes": round(peers[name].size / 1e6, 1)}
        print(f"built {name}: {result['engines'][name]}", flush=True)
    return peers


def speeds(peers: dict[str, Peer], queries: SparseVectors, k: int, rounds: int, results: dict) -> None:
    """Queries per second and latencies of each engine, the engines taking turns."""
    for name, peer in peers.items():
        peer.search(part(queries, 0, 2), k)  # compiles, loads
        results[name][str(k)] = {"queries_per_second": 0.0, "queries_per_second_wall": 0.0}
    for _ in range(rounds):
        for name, peer in peers.items():
            best = results[name][str(k)]
            wall, used = time.perf_counter(), time.process_time()
            peer.search(queries, k)
            wall, used = time.perf_counter() - wall, time.process_time() - used
            if not peer.latency:
                wall = used = peer.seconds
            best["queries_per_second"] = max(best["queries_per_second"], round(len(queries) / used, 1))
            best["queries_per_second_wall"] = max(best["queries_per_second_wall"], round(len(queries) / wall, 1))
    for name, peer in peers.items():
        if peer.latency:
            times = []
            for i in range(min(len(queries), 200)):
                used = time.process_time()
                peer.one(queries, i, k)
                times.append(time.process_time() - used)
            p50, p99 = np.percentile(times, [50, 99]) * 1e3
            results[name][str(k)].update(p50_ms=round(p50, 3), p99_ms=round(p99, 3))


def check(peers: dict[str, Peer], docs: SparseVectors, queries: SparseVectors, k: int, results: dict) -> None:
    """Recall of each engine, and hits with a wrong score, against the product with the whole matrix."""
    matrix = docs.to_scipy()
    truth = [np.asarray(matrix @ row) for row in queries.to_scipy().toarray()]
    for name, peer in peers.items():
        reached, wrong, wanted = 0, 0, 0
        for true, (rows, scores) in zip(truth, peer.search(queries, k), strict=True):
            least = max(np.partition(true, -min(k, len(true)))[-min(k, len(true))], 1)
            wanted += min(k, int((true >= least).sum()))
            reached += int((true[rows] >= least).sum())
            wrong += int((true[rows] != scores).sum())
        results[name][str(k)].update(recall=round(reached / wanted, 4), wrong=None if name == "seismic" else wrong)


def table(results: dict, k: int) -> None:
    """Markdown on standard output; the ratio is exact / peer by processor seconds."""
    print(f"\n| k = {k} | build s, wall | MB | queries/s | exact / it | wall | p50 ms | p99 ms | recall@{k} | wrong |\n"
          "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    first = results.get("exact", {}).get(str(k), {}).get("queries_per_second")
    for name, found in results.items():
        at = found[str(k)]
        ratio = f"{first / at['queries_per_second']:.2f}" if first else "–"
        built = f"{'–' if name == 'anserini' else found['build_cpu_seconds']}, {found['build_seconds']}"
        print(f"| {name} | {built} | {found['megabytes']} | {at['queries_per_second']:.0f} | "
              f"{ratio} | {at['queries_per_second_wall']:.0f} | {at.get('p50_ms', '–')} | {at.get('p99_ms', '–')} | "
              f"{at['recall']:.4f} | {'–' if at['wrong'] is None else at['wrong']} |")


if __name__ == "__main__":
    cli.run(lambda argv: main())
