"""One score out of several retrievers' scores.

Each retriever's scores are put on one scale by their distribution over the user's memories, as standard
deviations from the mean, and added up. No weight and no constant is involved, and how far a memory stands
out for one retriever counts, which ranks forget: reciprocal rank fusion (Cormack et al., SIGIR 2009) gives
a memory that BM25 puts far ahead of all others little more than the second one. That scores fuse better
than ranks, whatever the data, is the finding of Bruch, Gai and Ingber, "An analysis of fusion functions for
hybrid retrieval" (TOIS 2023); docs/RECALL.md compares both here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


def standardised(scores: Scores, among: npt.NDArray[np.bool_]) -> Scores:
    """Standard deviations from the mean of those ``among``; all 0 where they do not differ. [n]"""
    counted = scores[among]
    if not len(counted):
        return np.zeros_like(scores)
    deviation = float(counted.std())
    if deviation <= 1e-6 * max(1.0, float(np.abs(counted).max())):
        return np.zeros_like(scores)
    return ((scores - float(counted.mean())) / deviation).astype(np.float32)


def fuse(retrieved: Mapping[str, Scores], among: Mapping[str, npt.NDArray[np.bool_]]) -> Scores:
    """The sum of the scores, each standardised among its own; of one retriever alone its scores as they are. [n]"""
    if len(retrieved) == 1:
        return next(iter(retrieved.values()))
    return np.sum([standardised(scores, among[name]) for name, scores in retrieved.items()], axis=0, dtype=np.float32)


def best_first(
    scores: Scores, allowed: npt.NDArray[np.bool_], limit: int, order: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """The best of those allowed, of equals the later ones first (by ``order``, else by place); at most ``limit``."""
    places = np.flatnonzero(allowed)
    if len(places) > limit:
        found = scores[places]
        # All that equal the last one, so that the order among them is ours and not the partition's.
        threshold = np.partition(found, len(found) - limit)[len(found) - limit]
        places = places[found >= threshold]
    later = places if order is None else order[places]
    return places[np.lexsort((-later, -scores[places]))][:limit]
