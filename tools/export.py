#!/usr/bin/env python
"""Write vectors in the format of another search engine.

  python tools/export.py --vectors vectors/docs --format anserini --output export/docs
  python tools/export.py --vectors vectors/dev --format anserini --output export/dev

Anserini: JSON lines of documents, or topics.tsv of queries (each token repeated as often as it weighs).
OpenSearch: requests for _bulk. Seismic: JSON lines.
"""

from __future__ import annotations

from lexmae import cli
from lexmae.errors import InputError
from lexmae.retrieval import export


def main(argv: list[str] | None = None) -> None:
    """Parse, export, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--vectors", required=True, metavar="DIR", help="vectors made by tools/encode.py")
    parser.add_argument("--format", required=True, choices=tuple(export.FORMATS), help="engine to write for")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--side", choices=("docs", "queries"), help="what the vectors are, where they do not say")
    parser.add_argument("--file-size", type=int, default=export.FILE_SIZE, help="documents per file")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    options = parser.parse_args(argv)
    if options.file_size < 1:
        raise InputError("--file-size must be at least 1")
    manifest = export.export(options.vectors, options.format, options.output, side=options.side,
                             file_size=options.file_size, overwrite=options.overwrite)
    files = ", ".join(sorted(manifest.files)[:3]) + (", …" if len(manifest.files) > 3 else "")
    cli.say(f"{options.output}: {manifest.counts['rows']:,} {manifest.config['side']} in {files}")


if __name__ == "__main__":
    cli.run(main)
