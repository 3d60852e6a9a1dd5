"""Nearest neighbours by the local distance: exactly, or proposed by a library and then measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer

from kexue.retrieval.geodesic.metric import Corpus, chunks, pair_lengths

__all__ = ["BACKENDS"]

BACKENDS = ("auto", "exact", "faiss", "sklearn")

_EXACT_BELOW = 5_000
"""Up to here, "auto" compares all pairs in double precision."""
_FLAT_UP_TO = 200_000
"""Up to here faiss compares all pairs; above, it searches a navigable graph (HNSW)."""
_SPARE = 16
"""Proposals beyond the k that are wanted: libraries rank in single precision, and need not tell a
point from its duplicates."""

_TOO_MANY = 8
"""Candidates in multiples of k beyond which estimates in single precision are too coarse."""

Lengths = Float64[np.ndarray, "n k"]
Indices = Int64[np.ndarray, "n k"]


def neighbors_within(
    corpus: Corpus,
    k: int,
    *,
    backend: str = "auto",
    n_jobs: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Lengths, Indices]:
    """Return lengths and indices of the k nearest other points of every point, ascending."""
    n = len(corpus)
    on_host = torch.device(device).type == "cpu"
    if backend == "auto":
        backend = "exact" if n < _EXACT_BELOW or not on_host else _available()
    if backend == "exact":
        itself = np.arange(n)
        return exact_neighbors(
            corpus.vectors, corpus, k, groups=itself, corpus_groups=itself, device=device
        )
    propose = _faiss_proposals if backend == "faiss" else _sklearn_proposals
    return _measured(corpus, propose(corpus, min(n, k + 1 + _SPARE), n_jobs), k)


def exact_neighbors(
    queries: Float64[np.ndarray, "n features"],
    corpus: Corpus,
    k: int,
    *,
    groups: Integer[np.ndarray, " n"] | None = None,
    corpus_groups: Integer[np.ndarray, " m"] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Lengths, Indices]:
    r"""Return lengths and indices of the k points nearest to each query, ties by lower index.

    Squares |x|² - 2⟨q, x⟩ come from a matrix product; they are off by at most δ. What is within 2δ
    of the k-th smallest may be among the k nearest, so all of that is measured. Points of a query's
    own group are passed over; where fewer than k are left, places hold -1 and inf.
    """
    n = len(queries)
    lengths, indices = np.full((n, k), np.inf), np.full((n, k), -1)
    point_groups = None if corpus_groups is None else torch.from_numpy(corpus_groups).to(device)
    # Estimates of 8 bytes and two masks live at the same time.
    for part in chunks(n, 10 * len(corpus)):
        own = None if groups is None else torch.from_numpy(groups[part]).to(device)
        row, column = _candidates(queries[part], corpus, k, own, point_groups, device)
        length = pair_lengths(queries[part], row, corpus.vectors, column, corpus.metric)
        order = np.lexsort((column, length, row))
        row, column, length = row[order], column[order], length[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        chosen = rank < k
        lengths[part][row[chosen], rank[chosen]] = length[chosen]
        indices[part][row[chosen], rank[chosen]] = column[chosen]
    return lengths, indices


def _candidates(
    queries: Float64[np.ndarray, "n features"],
    corpus: Corpus,
    k: int,
    groups: Integer[torch.Tensor, " n"] | None,
    corpus_groups: Integer[torch.Tensor, " m"] | None,
    device: torch.device | str,
) -> tuple[Int64[np.ndarray, " found"], Int64[np.ndarray, " found"]]:
    """Pairs of a query and a point that may be among its k nearest.

    Single precision nearly always leaves few; where not, as among many duplicates, double
    precision decides.
    """
    for frame in (corpus.single, corpus.double):
        rows = frame.rows(queries)
        error = frame.error(rows)
        if frame is corpus.single and not np.isfinite(error).all():
            continue
        estimate = torch.addmm(
            torch.from_numpy(frame.squares).to(device),
            torch.from_numpy(rows).to(device),
            torch.from_numpy(frame.points).to(device).T,
            alpha=-2,
        )
        if groups is not None and corpus_groups is not None:
            estimate.masked_fill_(groups[:, None] == corpus_groups, torch.inf)
        bound = _kth_smallest(estimate, k) + 2 * torch.from_numpy(error).to(device)
        # Where fewer than k points are left, the bound is inf, and so are those passed over.
        bound.clamp_(max=torch.finfo(bound.dtype).max)
        found = np.flatnonzero((estimate <= bound[:, None]).cpu().numpy())
        if len(found) <= _TOO_MANY * k * len(rows):
            break
    return np.divmod(found, len(corpus))


def _kth_smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """An upper bound of each row's k-th smallest value, close to it."""
    classes = 32 * k
    width = values.shape[1] // classes
    if width >= 4:
        # Minima of disjoint classes are values of different points, found in a fraction of the
        # time; neighbours in the order of the rows fall into different classes.
        values = values[:, : width * classes].unflatten(1, (width, classes)).amin(dim=1)
    return torch.topk(values, k, dim=1, largest=False, sorted=False).values.amax(dim=1)


def _measured(
    corpus: Corpus, proposals: Integer[np.ndarray, "n m"], k: int
) -> tuple[Lengths, Indices]:
    """The k nearest among the proposals; exact search for points that got too few."""
    n, m = proposals.shape
    itself = np.arange(n)
    proposals = np.where(proposals == itself[:, None], -1, proposals).astype(np.int64)
    known = proposals.ravel() >= 0
    lengths = np.full(n * m, np.inf)
    lengths[known] = corpus.lengths(np.repeat(itself, m)[known], proposals.ravel()[known])
    lengths = lengths.reshape(n, m)
    order = np.lexsort((proposals, lengths), axis=1)[:, :k]
    lengths = np.take_along_axis(lengths, order, axis=1)
    indices = np.take_along_axis(proposals, order, axis=1)
    short = np.flatnonzero(indices[:, -1] < 0) if order.shape[1] == k else itself
    if len(short):
        lengths[short], indices[short] = exact_neighbors(
            corpus.vectors[short], corpus, k, groups=short, corpus_groups=itself
        )
    return lengths, indices


def _available() -> str:
    try:
        _import_faiss()
    except ImportError:
        return "sklearn"
    return "faiss"


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss: install the extra, pip install 'kexue[faiss]', or use "
            "backend='sklearn'"
        ) from error
    return faiss


def _faiss_proposals(corpus: Corpus, m: int, n_jobs: int | None) -> Integer[np.ndarray, "n m"]:
    """Indices by squared Euclidean distance in single precision, -1 where faiss found none."""
    faiss = _import_faiss()
    n, features = corpus.vectors.shape
    vectors = corpus.single.points
    if n <= _FLAT_UP_TO:
        index = faiss.IndexFlatL2(features)
        index.add(vectors)
    else:
        index = faiss.IndexHNSWFlat(features, 32)
        index.hnsw.efConstruction = 100
        index.hnsw.efSearch = max(64, 2 * m)
        with _threads(faiss, 1):  # several would insert in an order of their own
            index.add(vectors)
    with _threads(faiss, n_jobs):
        return index.search(vectors, m)[1]


@contextmanager
def _threads(faiss: Any, n_jobs: int | None) -> Iterator[None]:
    """Let the calling thread's searches use so many threads; -1 for all, None as it is."""
    before = faiss.omp_get_max_threads()
    if n_jobs is not None:
        from joblib import effective_n_jobs

        faiss.omp_set_num_threads(effective_n_jobs(n_jobs))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _sklearn_proposals(corpus: Corpus, m: int, n_jobs: int | None) -> Integer[np.ndarray, "n m"]:
    from sklearn.neighbors import NearestNeighbors

    # Around their mean: scikit-learn subtracts squares, which far from the origin lose all digits.
    vectors = corpus.vectors - corpus.vectors.mean(0)
    search = NearestNeighbors(n_neighbors=m, n_jobs=n_jobs).fit(vectors)
    return search.kneighbors(vectors, return_distance=False)
