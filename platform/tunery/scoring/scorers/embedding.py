"""Cosine similarity of a row's embedding (models/embed.py) to that of the nearest reference row; without reference
rows, the embeddings themselves.

Each process embeds the reference rows once and keeps their vectors (8 MB for 2,048 vectors of 1,024 dimensions); rows
are compared with all of them in one matrix product.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tunery.errors import TuneryError
from tunery.scoring.scorers.interfaces import Columns, EmbeddingFn, EmbedRows
from tunery.spec import Embedding
from tunery.store.rows import Row, read_rows

MAX_REFERENCES = 2048


def embedding_scorer(spec: Embedding, inputs: Mapping[str, Path], embed: EmbedRows) -> EmbeddingFn:
    """Return the scorer by the rows of `spec.reference`, or without it the function that keeps the vectors."""
    if spec.reference is None:
        return keep_vectors
    references = reference_rows(inputs[spec.reference])
    vectors_mh = embed(references)
    embedded = np.flatnonzero(~np.isnan(vectors_mh[:, 0]))
    if not len(embedded):
        raise TuneryError(
            f"no row of `{spec.reference}` can serve as reference",
            cause=f"all {len(references):,} rows have no token",
            remedy="set `reference` to a stage whose rows are not empty",
        )
    return EmbeddingScorer(vectors_mh[embedded], [references[index]["id"] for index in embedded])


def reference_rows(artifact: Path) -> list[Row]:
    """Return all rows of a stage, or a fixed sample of MAX_REFERENCES rows (by a hash of their ids) if there are
    more."""
    rows = read_rows(artifact, columns=["id", "text", "messages", "tools"])
    return heapq.nsmallest(MAX_REFERENCES, rows, key=_id_hash)


def _id_hash(row: Row) -> bytes:
    return hashlib.blake2b(f"reference {row['id']}".encode(), digest_size=16).digest()


class EmbeddingScorer:
    def __init__(self, vectors_mh: np.ndarray, ids: Sequence[str]) -> None:
        """`vectors_mh`: embeddings of the reference rows, each of length 1, at least one; `ids`: their row ids."""
        self._vectors_mh, self._ids = vectors_mh, list(ids)

    def __call__(self, vectors_nh: np.ndarray) -> Columns:
        """Return "score" in [-1, 1] (NaN for a row without tokens) and "nearest", the id of the reference row or ""."""
        similarity_nm = vectors_nh @ self._vectors_mh.T
        nearest = similarity_nm.argmax(axis=1).tolist()
        scores = [float(min(1.0, max(-1.0, row[index]))) for row, index in zip(similarity_nm, nearest, strict=True)]
        has_vector = (~np.isnan(vectors_nh[:, 0])).tolist()
        return {
            "score": [score if valid else math.nan for score, valid in zip(scores, has_vector, strict=True)],
            "nearest": [self._ids[index] if valid else "" for index, valid in zip(nearest, has_vector, strict=True)],
        }


def keep_vectors(vectors_nh: np.ndarray) -> Columns:
    """Return "vector", the embedding in float16 (NaN for a row without tokens); "score" is NaN."""
    return {"score": [math.nan] * len(vectors_nh), "vector": vectors_nh.astype(np.float16)}
