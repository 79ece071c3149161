#!/usr/bin/env python
"""Show in a browser what a model and its index find, and why: matching terms, added terms, every weight.

  python tools/demo.py --model runs/stage1/model --index index --vectors vectors/docs --corpus my-folder
Then open http://127.0.0.1:8080/. The corpus is read once, into a temporary database on disk.
"""

from __future__ import annotations

from lexmae import cli, verification
from lexmae.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Parse, load, serve."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", required=True, help="model folder or hub name that encodes the queries")
    parser.add_argument("--index", required=True, metavar="DIR", help="index made by tools/index.py")
    parser.add_argument("--vectors", required=True, metavar="DIR", help="document vectors that the index was made of")
    parser.add_argument("--corpus", required=True, help="the texts: folder in BEIR or MS MARCO layout, or dataset name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine's own")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at; 0 takes a free one")
    parser.add_argument("--hits", type=int, default=10, help="results of a query")
    verification.add_option(parser)
    options = parser.parse_args(argv)

    from lexmae.demo import app

    if not 1 <= options.hits <= app.MOST_HITS:
        raise InputError(f"--hits must be a number from 1 to {app.MOST_HITS}")
    app.require_flask()
    opened = app.listen(options.host, options.port)  # before the model is loaded: a busy port is known at once

    from lexmae.demo.service import Service  # torch, once the arguments are known to be good

    service = Service(options.model, options.index, options.vectors, options.corpus)
    try:
        cli.hide_progress()
        app.serve(app.create_app(service, options.host, options.hits), opened, options.host)
    finally:
        service.close()


if __name__ == "__main__":
    cli.run(main)
