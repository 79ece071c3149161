#!/usr/bin/env python
"""Index document vectors for search, or change an exact index.

  python tools/index.py --vectors vectors/docs --output index
  python tools/index.py --vectors vectors/docs --engine anserini --output index
  python tools/index.py --index index --add vectors/new
  python tools/index.py --index index --delete ids.txt
  python tools/index.py --index index --compact

  python tools/index.py --vectors dense/docs --engine faiss --output index

The engine exact searches in process and needs nothing more; anserini is Lucene's impact index
(pip install "lexmae[anserini]"); seismic is approximate and fast (pip install "lexmae[seismic]");
faiss searches dense vectors (pip install "lexmae[dense]"). The index remembers its engine. Documents added to an exact
index and deletions are found at once; --compact gives back the space of deleted documents and joins the pieces that
were added. An index that is being changed stays as it was until the change is complete.
"""

from __future__ import annotations

import argparse
import time

from lexmae import cli, verification
from lexmae.errors import InputError
from lexmae.retrieval import engines


def main(argv: list[str] | None = None) -> None:
    """Parse, index, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--vectors", metavar="DIR", help="document vectors made by tools/encode.py")
    parser.add_argument("--engine", choices=tuple(engines.ENGINES), help="search engine; exact unless given")
    parser.add_argument("--output", metavar="INDEX", help="directory to write")
    parser.add_argument("--top-k", type=int, help="keep only the k largest weights of each document")
    parser.add_argument("--faiss-kind", choices=("flat", "hnsw", "ivf"),
                        help="of the engine faiss: flat is exact and the default; hnsw and ivf are approximate")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished index")
    parser.add_argument("--index", metavar="INDEX", help="exact index to change")
    parser.add_argument("--add", metavar="DIR", help="document vectors to add to --index")
    parser.add_argument("--delete", metavar="FILE", help="ids of documents to delete from --index, one a line")
    parser.add_argument("--compact", action="store_true", help="join the pieces of --index, drop what was deleted")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if options.faiss_kind and options.engine != "faiss":
        raise InputError("--faiss-kind goes with --engine faiss")
    settings = {"kind": options.faiss_kind} if options.faiss_kind else {}
    started = time.perf_counter()
    if options.index is not None:
        index = change(options)
    elif options.vectors is None or options.output is None or options.add or options.delete or options.compact:
        raise InputError("--vectors and --output make an index; --index with --add, --delete or --compact changes one")
    else:
        index = engines.build(options.vectors, options.engine or "exact", options.output, overwrite=options.overwrite,
                              top_k=options.top_k, **settings)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.manifest.path.rglob("*") if file.is_file())
    extra = index.manifest.extra
    long = (f"{extra['mean_active']:.1f} terms" if "mean_active" in extra
            else f"{extra['dimensions']} dimensions")
    cli.say(f"{index.manifest.path}: {len(index):,} documents of {long} each, "
            f"{size / 1e6:.1f} MB, {seconds:.1f} s ({index.engine})")


def change(options: argparse.Namespace) -> engines.Index:
    """Make the changes that are asked for: first deletions, then additions, so that documents can be replaced."""
    from lexmae.retrieval import updates

    if options.vectors is not None or options.output is not None or options.top_k is not None:
        raise InputError("--vectors, --output and --top-k make an index; --index changes one in place")
    if options.engine is not None or options.overwrite:
        raise InputError("--engine and --overwrite go with --output; --index changes an index of the engine exact")
    if not (options.add or options.delete or options.compact):
        raise InputError("--index needs --add, --delete or --compact")
    if options.delete and options.add:
        updates.replace(options.index, options.delete, options.add)
    elif options.delete:
        updates.delete(options.index, options.delete)
    elif options.add:
        updates.add(options.index, options.add)
    if options.compact:
        updates.compact(options.index)
    return engines.open_index(options.index)


if __name__ == "__main__":
    cli.run(main)
