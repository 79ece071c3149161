#!/usr/bin/env python
"""Index document vectors for search.

  python tools/index.py --vectors vectors/docs --output index
  python tools/index.py --vectors vectors/docs --engine anserini --output index

The engine exact searches in process and needs nothing more; anserini is Lucene's impact index
(pip install "lexmae[anserini]"). The index remembers its engine.
"""

from __future__ import annotations

import time

from lexmae import cli
from lexmae.retrieval import engines


def main(argv: list[str] | None = None) -> None:
    """Parse, index, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--vectors", required=True, metavar="DIR", help="document vectors made by tools/encode.py")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), default="exact", help="search engine")
    parser.add_argument("--output", required=True, metavar="INDEX", help="directory to write")
    parser.add_argument("--top-k", type=int, help="keep only the k largest weights of each document")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished index")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    index = engines.build(options.vectors, options.engine, options.output, overwrite=options.overwrite,
                          top_k=options.top_k)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.manifest.path.rglob("*") if file.is_file())
    cli.say(f"{options.output}: {len(index):,} documents of {index.manifest.extra['mean_active']:.1f} terms each, "
            f"{size / 1e6:.1f} MB, {seconds:.1f} s ({index.engine})")


if __name__ == "__main__":
    cli.run(main)
