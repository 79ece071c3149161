#!/usr/bin/env python
"""Index document vectors for search.

  python tools/index.py --vectors vectors/docs --output index
  python tools/index.py --vectors vectors/docs --engine anserini --output index

  python tools/index.py --vectors dense/docs --engine faiss --output index

The engine exact searches in process and needs nothing more; anserini is Lucene's impact index
(pip install "lexmae[anserini]"); seismic is approximate and fast (pip install "lexmae[seismic]");
faiss searches dense vectors (pip install "lexmae[dense]"). The index remembers its engine.
"""

from __future__ import annotations

import time

from lexmae import cli
from lexmae.errors import InputError
from lexmae.retrieval import engines


def main(argv: list[str] | None = None) -> None:
    """Parse, index, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--vectors", required=True, metavar="DIR", help="document vectors made by tools/encode.py")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), default="exact", help="search engine")
    parser.add_argument("--output", required=True, metavar="INDEX", help="directory to write")
    parser.add_argument("--top-k", type=int, help="keep only the k largest weights of each document")
    parser.add_argument("--faiss-kind", choices=("flat", "hnsw", "ivf"),
                        help="of the engine faiss: flat is exact and the default; hnsw and ivf are approximate")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished index")
    options = parser.parse_args(argv)
    if options.faiss_kind and options.engine != "faiss":
        raise InputError("--faiss-kind goes with --engine faiss")
    settings = {"kind": options.faiss_kind} if options.faiss_kind else {}
    started = time.perf_counter()
    index = engines.build(options.vectors, options.engine, options.output, overwrite=options.overwrite,
                          top_k=options.top_k, **settings)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.manifest.path.rglob("*") if file.is_file())
    extra = index.manifest.extra
    long = (f"{extra['mean_active']:.1f} terms" if "mean_active" in extra
            else f"{extra['dimensions']} dimensions")
    cli.say(f"{options.output}: {len(index):,} documents of {long} each, "
            f"{size / 1e6:.1f} MB, {seconds:.1f} s ({index.engine})")


if __name__ == "__main__":
    cli.run(main)
