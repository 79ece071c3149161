"""Writing shards: check a collection, tokenise it once, and leave a directory that is complete or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lexmae import artifact
from lexmae.cli import progress, say
from lexmae.data import passages
from lexmae.data import tokenizer as tokenizers
from lexmae.data.corpus import Corpus, Passage, Query
from lexmae.data.qrels import gather, write_qrels
from lexmae.data.tokenizer import Encoded, TextEncoder
from lexmae.data.tokens import SHARD_ROWS, TableWriter, TokenTable
from lexmae.errors import InputError

KIND = "shards"
_CHUNK = 4096  # texts tokenised together
_LONG_CHUNK = 512  # long documents, uncut

T = TypeVar("T")


def prepare(
    source: Corpus | str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    max_length: int = 144,
    query_length: int = 32,
    split_documents: bool = False,
    stride: int | None = None,
    workers: int | None = None,
    shard_size: int = SHARD_ROWS,
) -> None:
    """Tokenise a collection into shards.

    Args:
        source: a collection, or what `Corpus.open` takes.
        output: the directory to write; it must not exist.
        tokenizer: folder or hub name of a tokenizer; or else
        train_tokenizer: number of entries of a WordPiece to train on the documents.
        max_length: tokens of a document, special tokens included.
        query_length: tokens of a query, special tokens included.
        split_documents: cut documents longer than that into passages (see `passages.windows`), in place of dropping
            what is too much.
        stride: tokens from the beginning of a passage to the next one's; half of `max_length` where it is not given.
        workers: threads that tokenise; None takes all cores. The output does not depend on it.
        shard_size: documents per file.

    Raises:
        InputError: a bad line or judgement, an unusable tokenizer or length, or `output` exists.
    """
    if (tokenizer is None) == (train_tokenizer is None):
        raise InputError(
            "give either a tokenizer or the number of entries of one to train, not both or neither"
        )
    if shard_size < 1:
        raise InputError(f"{shard_size} documents per file: at least 1 is needed")
    stride = _check_stride(split_documents, stride, max_length)
    corpus = source if isinstance(source, Corpus) else Corpus.open(source)
    config = {"tokenizer": None if tokenizer is None else str(tokenizer), "train_tokenizer": train_tokenizer,
              "max_length": max_length, "query_length": query_length,
              "split_documents": split_documents, "stride": stride}  # fmt: skip
    tokenizers.limit_threads(workers)
    with artifact.create(output, KIND, inputs={"corpus": corpus.source}, config=config) as draft:
        chosen = (
            tokenizers.load(tokenizer)
            if train_tokenizer is None
            else _train(corpus, train_tokenizer, max_length)
        )
        encoder = TextEncoder(chosen)
        encoder.check_length(max_length, "maximum length")
        encoder.check_length(query_length, "query length")
        _save_tokenizer(encoder, draft)
        _Preparation(corpus, encoder, draft, shard_size, stride).run(max_length, query_length)


def _check_stride(split_documents: bool, stride: int | None, max_length: int) -> int | None:
    """The stride of the passages of split documents, None where they are not split."""
    if not split_documents:
        if stride is not None:
            raise InputError("a stride goes with splitting documents")
        return None
    stride = max(1, max_length // 2) if stride is None else stride
    if not 1 <= stride <= max_length:
        raise InputError(f"stride {stride}: must be between 1 and the maximum length {max_length}")
    return stride


def table_name(split: str) -> str:
    """Name of the table that holds the queries of a split."""
    return f"queries-{split}"


class _Preparation:
    """One run: tables, then the judgements checked against them. Documents are split where there is a stride."""

    def __init__(self, corpus: Corpus, encoder: TextEncoder, draft: artifact.Draft, shard_size: int,
                 stride: int | None) -> None:
        self.corpus, self.encoder, self.draft, self.shard_size = corpus, encoder, draft, shard_size
        self.stride = stride
        self.statistics: dict[str, dict[str, float]] = {}

    def run(self, max_length: int, query_length: int) -> None:
        """Queries first, because they are few and show most mistakes; then documents; then judgements."""
        splits = self.corpus.splits()
        for split in splits:
            self._queries(split, query_length)
        self._documents(max_length)
        for split in splits:
            self._judgements(split)
        self.draft.extra.update(splits=splits, max_length=max_length, query_length=query_length,
                                lengths=self.statistics)  # fmt: skip

    def _queries(self, split: str, length: int) -> None:
        queries = progress(self.corpus.queries(split), desc=f"queries {split}", unit=" queries")

        def encode(chunk: list[Query]) -> Encoded:
            return self.encoder.singles([query.text for query in chunk], length)

        self.draft.counts[f"queries.{split}"] = self._table(table_name(split), queries, encode)

    def _documents(self, length: int) -> None:
        total = self.corpus.size_hint()
        documents = progress(self.corpus.passages(), total=total, desc="documents", unit=" documents")

        def encode(chunk: list[Passage]) -> Encoded:
            return self.encoder.pairs([p.title for p in chunk], [p.text for p in chunk], length)

        if self.stride is None:
            self.draft.counts["documents"] = self._table("docs", documents, encode)
        else:
            self._split_documents(documents, length)
        for what, count in (("a title and no text", self.corpus.title_only),
                            ("neither title nor text", self.corpus.empty)):  # fmt: skip
            if count:
                say(f"warning: {count} documents have {what}; they are kept")
        self.draft.counts.update(title_only=self.corpus.title_only, empty=self.corpus.empty)

    def _split_documents(self, documents: Iterable[Passage], length: int) -> None:
        """The table of the documents' passages, and where those of each document end."""
        sizes: list[np.ndarray] = [np.zeros(0, np.int64)]

        def encode(chunk: list[Passage]) -> Encoded:
            for document in chunk:
                passages.check_document_id(document.id, self.corpus.source)
            rows, counts = passages.windows(self.encoder, [p.title for p in chunk], [p.text for p in chunk], length,
                                            self.stride)
            sizes.append(counts)
            return rows

        def names(chunk: list[Passage]) -> list[str]:
            return [passages.passage_id(document.id, number) for document, count in zip(chunk, sizes[-1], strict=True)
                    for number in range(count)]

        self.draft.counts["passages"] = self._table("docs", documents, encode, names)
        ends = np.cumsum(np.concatenate(sizes))
        np.save(self.draft.path / passages.ENDS, ends)
        self.draft.counts["documents"] = len(ends)

    def _table(self, name: str, records: Iterable[Any], encode: Any, names: Any = None) -> int:
        """Write the rows that `encode` makes of the records; `names` gives their ids, the records' own without it."""
        writer = TableWriter(self.draft.path, name, self.encoder.dtype, self.shard_size)
        lengths, truncated = [], 0
        for chunk in _chunks(records, _LONG_CHUNK if names else _CHUNK):
            rows = encode(chunk)
            ids = names(chunk) if names else [record.id for record in chunk]
            writer.append(ids, rows.values, rows.lengths, rows.first_lengths)
            lengths.append(rows.lengths.astype(np.int32))
            truncated += int(rows.truncated.sum())
        writer.close()
        self.statistics[name] = describe_lengths(np.concatenate(lengths), truncated)
        return writer.rows

    def _judgements(self, split: str) -> None:
        rows = self.corpus.judgements(split)
        if rows is None:
            say(f"split {split}: no judgements")
            return
        judgements = list(rows)
        qrels = gather(judgements)
        queries, documents = TokenTable(self.draft.path, table_name(split), "query"), passages.read(self.draft.path)
        for known, what, field in ((queries, "query", "qid"), (documents, "document", "docid")):
            unknown = np.flatnonzero(~known.contains([getattr(judgement, field) for judgement in judgements]))
            if len(unknown):
                bad = judgements[unknown[0]]
                more = f" (and {len(unknown) - 1} more such lines)" if len(unknown) > 1 else ""
                reason = f"judgement of an unknown {what} {getattr(bad, field)!r}{more}"
                raise InputError(reason, path=bad.path, line=bad.line)
        write_qrels(self.draft.path / "qrels" / f"{split}.tsv", qrels)
        self.draft.counts[f"judgements.{split}"] = sum(map(len, qrels.values()))


def describe_lengths(lengths: np.ndarray, truncated: int) -> dict[str, float]:
    """Statistics of row lengths in tokens, special tokens included, and the share of rows that were cut."""
    p50, p95 = np.percentile(lengths, [50, 95])
    return {"rows": len(lengths), "mean": round(float(lengths.mean()), 2), "p50": float(p50), "p95":
    float(p95), "max": int(lengths.max()), "truncated": round(truncated / len(lengths), 4)}  # fmt: skip


def _train(corpus: Corpus, entries: int, max_length: int) -> Any:
    """A WordPiece of the documents' titles and texts."""
    say(f"training a WordPiece tokenizer of {entries} entries")

    def texts() -> Iterator[str]:
        for passage in corpus.passages():
            yield f"{passage.title} {passage.text}"

    trained = tokenizers.train(texts, entries, max(512, max_length))
    if len(trained) < entries:
        say(f"warning: the text supports only {len(trained)} of {entries} entries; going on with those")
    return trained


def _save_tokenizer(encoder: TextEncoder, draft: artifact.Draft) -> None:
    encoder.tokenizer.save_pretrained(str(draft.path / "tokenizer"))
    np.save(draft.path / "word_starts.npy", tokenizers.word_starts(encoder.tokenizer))
    with artifact.atomic_file(draft.path / "vocabulary.json") as out:
        json.dump(tokenizers.vocabulary(encoder.tokenizer, encoder.vocab_size), out, ensure_ascii=False)
    special = encoder.special
    draft.extra.update(
        tokenizer_hash=tokenizers.fingerprint(encoder.tokenizer),
        vocab_size=encoder.vocab_size,
        token_dtype=encoder.dtype.name,
        token_type_ids=encoder.token_type_ids,
        special_ids={name: getattr(special, name) for name in special.__dataclass_fields__},
    )


def _chunks(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
