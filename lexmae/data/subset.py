"""A part of a collection, small enough for a machine or an afternoon: queries, what is judged for them, and others.

  python -m lexmae.data.subset --input data/msmarco --output data/small --queries train=20000 dev=500 --documents 100000

Which queries and documents are taken depends on their ids and the seed alone. The part is easier than the whole: a
query competes with fewer documents, so its figures compare with others on the same part, not with published ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from lexmae import artifact, cli
from lexmae.data.corpus import Corpus, Passage, Qrels, Query, write_beir
from lexmae.errors import InputError


def subset(source: str | Path, output: str | Path, queries: dict[str, int], documents: int, seed: int = 0) -> None:
    """Write a BEIR folder with a part of a collection.

    Args:
        source: what ``Corpus.open`` takes.
        queries: split → number of its judged queries at most.
        documents: number of documents: those judged for the chosen queries, and others up to this number.

    Raises:
        InputError: a split has no judged queries, or the judged documents alone are more than ``documents``.
    """
    artifact.refuse_existing(Path(output))
    corpus = Corpus.open(source)
    qrels = {split: _judged(corpus, split, count, seed) for split, count in queries.items()}
    judged = {name for split in qrels.values() for row in split.values() for name in row}
    if len(judged) > documents:
        raise InputError(f"the chosen queries have {len(judged)} judged documents, more than --documents {documents}: "
                         "take fewer queries, or more documents", source)
    passages = cli.progress(corpus.passages(), total=corpus.size_hint(), desc="choosing", unit="documents")
    others = (passage.id for passage in passages if passage.id not in judged)
    kept = judged | set(heapq.nsmallest(documents - len(judged), others, key=lambda name: _hash(name, seed)))
    write_beir(output, _chosen(corpus, kept), _asked(corpus, qrels), qrels)
    cli.say(f"{output}: {len(kept)} documents, {len(judged)} of them judged; "
            + ", ".join(f"{len(rows)} queries of {split}" for split, rows in qrels.items()))


def _judged(corpus: Corpus, split: str, count: int, seed: int) -> Qrels:
    """Judgements of ``count`` queries with a relevant document."""
    qrels = corpus.qrels(split) if split in corpus.splits() else None
    names = [name for name, row in (qrels or {}).items() if any(relevance > 0 for relevance in row.values())]
    if not names:
        raise InputError(f"no judged queries in split {split!r}", path=corpus.source)
    chosen = set(heapq.nsmallest(count, names, key=lambda name: _hash(name, seed)))
    return {name: qrels[name] for name in names if name in chosen}


def _hash(name: str, seed: int) -> bytes:
    return blake2b(f"{seed} {name}".encode(), digest_size=8).digest()


def _chosen(corpus: Corpus, kept: set[str]) -> Iterator[Passage]:
    passages = cli.progress(corpus.passages(), total=corpus.size_hint(), desc="writing", unit="documents")
    return (passage for passage in passages if passage.id in kept)


def _asked(corpus: Corpus, qrels: dict[str, Qrels]) -> Iterator[Query]:
    """The chosen queries, each once, whatever splits it is in."""
    seen: set[str] = set()
    for split, rows in qrels.items():
        for query in corpus.queries(split):
            if query.id in rows and query.id not in seen:
                seen.add(query.id)
                yield query


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--input", required=True, metavar="DIR", help="the collection: a folder, or owner/name")
    parser.add_argument("--output", required=True, metavar="DIR", help="BEIR folder to write")
    parser.add_argument("--queries", required=True, nargs="+", metavar="SPLIT=N", help="queries of each split at most")
    parser.add_argument("--documents", required=True, type=int, metavar="N", help="documents in all")
    parser.add_argument("--seed", type=int, default=0, help="another seed takes another part")
    options = parser.parse_args(argv)
    counts = {}
    for item in options.queries:
        split, _, count = item.rpartition("=")
        if not split or not count.isdigit() or int(count) < 1:
            raise InputError(f"--queries {item}: SPLIT=N is needed, such as dev=500")
        counts[split] = int(count)
    if options.documents < 1:
        raise InputError("--documents must be at least 1")
    subset(options.input, options.output, counts, options.documents, options.seed)


if __name__ == "__main__":
    cli.run(main)
