"""Every engine on a real collection: its effectiveness is that of the exact search.

The vectors are cheap and lexical (token counts, saturated and weighted by inverse document frequency, as BM25 does), so
that no training is needed; their lengths, skew and ties are those of text.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg

from lexmae.data.corpus import read_qrels
from lexmae.data.shards import Shards, prepare
from lexmae.data.tokens import TokenTable
from lexmae.errors import InputError
from lexmae.retrieval import anserini, engines
from lexmae.retrieval.dense import DenseVectors
from lexmae.retrieval.metrics import evaluate
from lexmae.retrieval.vectors import SparseVectors, quantise_csr

SQUAD = Path(__file__).parents[2] / "shared" / "data" / "squad-small"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SQUAD.is_dir(), reason="needs the collection squad-small")]


def lexical(shards: Shards, table: TokenTable, idf: np.ndarray, side: str) -> SparseVectors:
    """log(1 + idf · tf · 1.9 / (tf + 0.9)) of every token of every text."""
    terms, values = [], []
    for row in range(len(table)):
        tokens = table.tokens(row)
        found, counts = np.unique(tokens[~np.isin(tokens, shards.special.structural)], return_counts=True)
        terms.append(found)
        values.append(np.log1p(idf[found] * counts * 1.9 / (counts + 0.9)))
    ends = np.cumsum([0, *map(len, terms)])
    csr = quantise_csr(ends, np.concatenate(terms), np.concatenate(values), shards.special.unk)
    return SparseVectors(table.ids(), *csr, shards.vocabulary(), {"side": side})


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """Vectors of documents and dev queries, judgements, and the exact search's measures."""
    folder = tmp_path_factory.mktemp("squad")
    prepare(SQUAD, folder / "shards", train_tokenizer=8000, max_length=144, query_length=32, workers=1)
    shards = Shards.open(folder / "shards")
    df = np.zeros(shards.vocab_size)
    for row in range(len(shards.docs)):
        df[np.unique(shards.docs.tokens(row))] += 1
    idf = np.log(1 + (len(shards.docs) - df + 0.5) / (df + 0.5))
    docs = lexical(shards, shards.docs, idf, "docs")
    queries = lexical(shards, shards.queries("dev"), idf, "queries")
    qrels = read_qrels(SQUAD / "qrels" / "dev.tsv")
    exact = engines.build(docs, "exact", folder / "exact").search(queries, 100, 2)
    return docs, queries, qrels, evaluate(exact, qrels).means


@pytest.mark.parametrize(("engine", "tolerance"), [("anserini", 0.002), ("seismic", 0.01)])
def test_sparse_engines_are_as_good_as_exact(squad, tmp_path, engine, tolerance):
    docs, queries, qrels, exact = squad
    if engine == "anserini":
        try:
            anserini.find_java(), anserini.find_jar()
        except InputError as error:
            pytest.skip(str(error))
    elif importlib.util.find_spec(engine) is None:
        pytest.skip('needs pip install "lexmae[seismic]"')
    found = evaluate(engines.build(docs, engine, tmp_path / "i").search(queries, 100, 2), qrels).means
    assert 0.6 < exact["MRR@10"] < 0.8
    assert found["MRR@10"] == pytest.approx(exact["MRR@10"], abs=tolerance)
    assert found["Recall@100"] == pytest.approx(exact["Recall@100"], abs=tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), [("flat", 0.002), ("hnsw", 0.002), ("ivf", 0.01)])
def test_faiss_is_as_good_as_exact_dense_search(squad, tmp_path, kind, tolerance):
    """The first 128 singular directions of the vectors (latent semantic indexing), against numpy's dot products."""
    pytest.importorskip("faiss", reason='needs pip install "lexmae[dense]"')
    docs, queries, qrels, _ = squad
    _, _, directions = scipy.sparse.linalg.svds(docs.to_scipy().astype(np.float64), k=128, random_state=0)
    left, right = ((v.to_scipy() @ directions.T).astype(np.float32) for v in (queries, docs))
    order = np.argsort(-(left.astype(np.float64) @ right.T.astype(np.float64)), axis=1)[:, :100]
    scores = np.arange(100, 0, -1)
    exact = evaluate({q: [(docs.ids[d], s) for d, s in zip(row, scores, strict=True)]
                      for q, row in zip(queries.ids, order.tolist(), strict=True)}, qrels).means
    index = engines.build(DenseVectors(docs.ids, right), "faiss", tmp_path / "i", kind=kind)
    found = evaluate(index.search(DenseVectors(queries.ids, left), 100, 2), qrels).means
    assert exact["MRR@10"] > 0.3
    assert found["MRR@10"] == pytest.approx(exact["MRR@10"], abs=tolerance)
