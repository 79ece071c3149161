#!/usr/bin/env python
"""Write vectors in the format of another search engine.

  python tools/export.py --vectors vectors/docs --format anserini --output export/docs
  python tools/export.py --vectors vectors/dev --format anserini --output export/dev

Anserini: JSON lines of documents, or topics.tsv of queries (each token repeated as often as it weighs).
OpenSearch (rank_features) and Elasticsearch (sparse_vector): mapping.json and requests for _bulk. Seismic: JSON lines.
csr: vectors.npz for scipy. What was written is read back and compared with the vectors.
"""

from __future__ import annotations

from lexmae import cli, verification
from lexmae.errors import InputError
from lexmae.retrieval import export, export_check


def main(argv: list[str] | None = None) -> None:
    """Parse, export, report."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--vectors", required=True, metavar="DIR", help="vectors made by tools/encode.py")
    parser.add_argument("--format", required=True, choices=tuple(export.FORMATS), help="engine to write for")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--side", choices=("docs", "queries"), help="what the vectors are, where they do not say")
    parser.add_argument("--file-size", type=int, default=export.FILE_SIZE, help="documents per file")
    parser.add_argument("--check", type=int, default=export_check.SAMPLE, metavar="N",
                        help="read the files back and compare the scores of N sampled queries with the vectors'; 0 "
                             "does not")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished output")
    verification.add_option(parser)
    options = parser.parse_args(argv)
    if options.file_size < 1 or options.check < 0:
        raise InputError("--file-size must be at least 1 and --check at least 0")
    manifest = export.export(options.vectors, options.format, options.output, side=options.side,
                             file_size=options.file_size, overwrite=options.overwrite, check=options.check)
    files = ", ".join(sorted(manifest.files)[:3]) + (", …" if len(manifest.files) > 3 else "")
    cli.say(f"{options.output}: {manifest.counts['rows']:,} {manifest.config['side']} in {files}")
    if options.check:
        found = manifest.extra["check"]
        cli.say(f"read back: {found['texts']:,} texts, the same scores for {found['queries']} sampled queries; the "
                f"engine's own format changes {found['weights_changed']:.2%} of the weights (by at most "
                f"{found['weight_error']:.2%}) and these scores by at most {found['score_error']:.2%}")


if __name__ == "__main__":
    cli.run(main)
