"""Cosine similarity to the nearest of a set of reference rows, of embeddings by a model (models/embed.py); without
reference rows, the embeddings themselves.

Each process embeds the reference rows once and keeps their vectors, 8 MB for 2,048 of 1,024 dimensions; a shard of rows
is compared with all of them in one product of matrices.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunery.scoring.scorers.registry import Columns
from tunery.store.rows import Row, read_rows

MAX_REFERENCES = 2048


def reference_rows(artifact: Path) -> list[Row]:
    """All rows of a stage, or, of more than MAX_REFERENCES, so many by a hash of their ids: always the same."""
    rows = read_rows(artifact, columns=["id", "text", "messages", "tools"])
    return heapq.nsmallest(MAX_REFERENCES, rows, key=_order)


def _order(row: Row) -> bytes:
    return hashlib.blake2b(f"reference {row['id']}".encode(), digest_size=16).digest()


class EmbeddingScorer:
    def __init__(self, vectors_mh: np.ndarray, ids: Sequence[str]) -> None:
        """Embeddings of the reference rows, each of length 1, and their ids; at least one."""
        self._vectors_mh, self._ids = vectors_mh, list(ids)

    def __call__(self, vectors_nh: np.ndarray) -> Columns:
        """score: in [-1, 1], NaN for a row without a token; nearest: the id of the reference row, "" where none is."""
        similarity_nm = vectors_nh @ self._vectors_mh.T
        nearest = similarity_nm.argmax(axis=1).tolist()
        scores = [float(min(1.0, max(-1.0, row[at]))) for row, at in zip(similarity_nm, nearest, strict=True)]
        known = (~np.isnan(vectors_nh[:, 0])).tolist()
        return {
            "score": [score if there else math.nan for score, there in zip(scores, known, strict=True)],
            "nearest": [self._ids[at] if there else "" for at, there in zip(nearest, known, strict=True)],
        }


def keep_vectors(vectors_nh: np.ndarray) -> Columns:
    """score: NaN; vector: the embedding in float16, all NaN for a row without a token."""
    return {"score": [math.nan] * len(vectors_nh), "vector": vectors_nh.astype(np.float16)}
