"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997; Lee et al. 2022,
https://arxiv.org/abs/2107.06499).

The signature of a row is the minimum hash of its word n-grams under each of K hash functions. Two rows agree in each
position with a probability equal to their Jaccard similarity. Signatures are split into bands; rows that agree in a
complete band are candidate pairs, and candidate pairs are compared by their full signatures. Signatures are rensa's
R-MinHash: 75,000 short responses a second, against 13,000 with datasketch, which also requires scipy. The estimate is
unbiased and has a lower standard error than plain MinHash (0.025 instead of 0.031).

Signatures take 4 K bytes a row (512 for K = 128). Bands, candidate pairs and signatures are stored in files of about
1.5 kB a row, so memory grows by only two bytes a row. 2 M rows take two minutes on one core and 3 GB of disk; 100 M
rows would take 150 GB of disk and hours in one process, which is the practical limit of a single machine.

A row is compared with at most 2 * MAX_NEIGHBORS earlier rows per band, not counting rows with an equal signature. If
thousands of rows share a band (a template), the most similar row may be missed in favour of a less similar one from the
same template. Rows with equal signatures are always matched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tunery.scoring.scorers.external_groupby import (
    MAX_RECORDS,
    PartitionFiles,
    Records,
    RowSignatures,
    ShardGroup,
    group_indices,
    partition_of,
    run_starts,
)
from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.ngrams import Words, mixed
from tunery.scoring.scorers.texts import select_text
from tunery.spec import NearDuplicates
from tunery.store.rows import Row

UInt64s = NDArray[np.uint64]

SEED = 17
"""Seed of the hash functions. It is fixed to keep scores comparable."""
RECALL = 0.98
"""Probability that a pair at the threshold becomes a candidate."""
MAX_NEIGHBORS = 16
"""A row is compared with at most this many rows at the start of its band's run, and this many just before it."""
PAIR_BATCH_SIZE = 16_384
"""Number of pairs compared at a time: 16 MB of signatures."""
ID_BYTES = 16
"""Length of a row id."""


class NearDuplicatesScorer:
    def __init__(self, spec: NearDuplicates, max_records: int = MAX_RECORDS) -> None:
        settings = spec.near_duplicates
        self._of, self._n, self._threshold = settings.of, settings.ngram, settings.threshold
        self._num_hashes = settings.permutations
        self._max_records = max_records

    def compute_signatures(self, rows: Sequence[Row]) -> Columns:
        """Return "signature", 4 bytes per hash function; None for a row without words."""
        ngrams, counts = Words.of([select_text(row, self._of) or "" for row in rows]).ngrams(self._n)
        offsets = np.cumsum([0, *counts]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(ngrams, offsets, self._num_hashes, SEED)
        signatures = np.array(matrix.to_rows(), dtype="<u4").reshape(len(rows), self._num_hashes)
        return {
            "signature": [
                signature.tobytes() if count else None for signature, count in zip(signatures, counts, strict=True)
            ],
        }

    def resolve(self, signatures: RowSignatures, work_dir: Path) -> Iterator[Columns]:
        """Yield "score", the estimated Jaccard similarity to the most similar earlier row (0 if none reaches the
        threshold, NaN for a row without words), and "nearest", the id of that row (the first in a tie) or ""."""
        work_dir.mkdir(parents=True, exist_ok=True)
        # The signatures of a group are in memory at once.
        groups = signatures.shard_groups(max(1, self._max_records // self._num_hashes))
        pairs = PartitionFiles(work_dir / "pairs", {"row": "<u8", "other": "<u8"}, self._max_records)
        has_signature = self._find_pairs(signatures, groups, pairs, work_dir)
        with (
            _RecordFile(work_dir / "signatures.bin", 4 * self._num_hashes) as signature_file,
            _RecordFile(work_dir / "ids.bin", ID_BYTES) as id_file,
        ):
            for number, group in enumerate(groups):
                similarity, nearest = self._most_similar(
                    group, pairs.read_chunks(number, self._max_records), signature_file
                )
                pairs.drop(number)
                if (nearest >= 0).any():
                    ids = id_file.read(np.maximum(nearest, 0))
                else:
                    ids = np.zeros((group.rows, ID_BYTES), np.uint8)
                start = 0
                for _, count in group.shards:
                    shard = slice(start, start + count)
                    is_scored = has_signature[group.first + start : group.first + start + count]
                    yield {
                        "score": np.where(is_scored, similarity[shard], math.nan).tolist(),
                        "nearest": [
                            id.tobytes().decode() if row >= 0 else ""
                            for id, row in zip(ids[shard], nearest[shard].tolist(), strict=True)
                        ],
                    }
                    start += count
        for name in ("signatures.bin", "ids.bin"):
            (work_dir / name).unlink()

    def _find_pairs(
        self, signatures: RowSignatures, groups: list[ShardGroup], pairs: PartitionFiles, work_dir: Path
    ) -> NDArray[np.bool_]:
        """Write candidate pairs to `pairs`; return which rows have a signature."""
        num_rows = sum(group.rows for group in groups)
        has_signature = np.zeros(num_rows, dtype=np.bool_)
        num_bands, width = bands_for(self._threshold, self._num_hashes)
        num_band_partitions = 1 + num_rows * num_bands // self._max_records
        num_signature_partitions = 1 + num_rows // self._max_records
        by_band = PartitionFiles(work_dir / "bands", {"key": "<u8", "row": "<u8"}, self._max_records)
        by_signature = PartitionFiles(work_dir / "whole", {"key": "<u8", "row": "<u8"}, self._max_records)
        with (work_dir / "signatures.bin").open("wb") as signature_file, (work_dir / "ids.bin").open("wb") as id_file:
            for first, columns in signatures.by_shard(groups, ["id", "signature"]):
                empty = bytes(4 * self._num_hashes)
                signature_bytes = b"".join(signature or empty for signature in columns["signature"])
                signature_file.write(signature_bytes)
                id_file.write(b"".join(_encode_id(id) for id in columns["id"]))
                present = np.array([signature is not None for signature in columns["signature"]], dtype=np.bool_)
                has_signature[first : first + len(present)] = present
                matrix = np.frombuffer(signature_bytes, dtype="<u4").reshape(len(present), self._num_hashes)[present]
                rows = (first + np.flatnonzero(present)).astype(np.uint64)
                keys = band_keys(matrix, 1, self._num_hashes)[:, 0]
                by_signature.append(partition_of(keys, num_signature_partitions), key=keys, row=rows)
                for keys in band_keys(matrix, num_bands, width).T:
                    by_band.append(partition_of(keys, num_band_partitions), key=keys, row=rows)

        # A row with the signature of an earlier row is paired with it and needs no other candidates.
        is_repeat = np.zeros(num_rows, dtype=np.bool_)
        for partition in range(num_signature_partitions):
            records = _sort_by_key(by_signature.read(partition))
            runs = run_starts(records["key"])
            repeats = runs != np.arange(len(runs))
            self._append_pairs(pairs, groups, records["row"][repeats], records["row"][runs[repeats]])
            is_repeat[records["row"][repeats]] = True
            by_signature.drop(partition)
        for partition in range(num_band_partitions):
            records = by_band.read(partition)
            records = _sort_by_key(records[~is_repeat[records["row"]]])
            for later, earlier in neighbors(records["key"]):
                self._append_pairs(pairs, groups, records["row"][later], records["row"][earlier])
            by_band.drop(partition)
        return has_signature

    def _append_pairs(self, pairs: PartitionFiles, groups: list[ShardGroup], rows: UInt64s, others: UInt64s) -> None:
        pairs.append(group_indices(groups, rows), row=rows, other=others)

    def _most_similar(
        self, group: ShardGroup, pair_chunks: Iterator[Records], signature_file: _RecordFile
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return for each row of the group its highest similarity to an earlier row if that reaches the threshold
        (else 0), and that row (else -1)."""
        max_similarity, nearest = np.zeros(group.rows), np.full(group.rows, -1, dtype=np.int64)
        group_signatures = signature_file.read(np.arange(group.first, group.first + group.rows)).view("<u4")
        for chunk in pair_chunks:
            # The same two rows are candidates in many bands.
            pairs = np.unique(chunk)
            for start in range(0, len(pairs), PAIR_BATCH_SIZE):
                batch = pairs[start : start + PAIR_BATCH_SIZE]
                rows, others = batch["row"].astype(np.int64) - group.first, batch["other"].astype(np.int64)
                distinct_others, inverse = np.unique(others, return_inverse=True)
                other_signatures = signature_file.read(distinct_others).view("<u4")
                similarity = (group_signatures[rows] == other_signatures[inverse]).mean(axis=1)
                order = np.lexsort((others, -similarity, rows))
                _, firsts = np.unique(rows[order], return_index=True)
                best = order[firsts]
                rows, others, similarity = rows[best], others[best], similarity[best]
                # Estimates are multiples of 1 / K; the tolerance keeps rounding from rejecting one at the threshold.
                better = (similarity >= self._threshold - 1e-9) & (
                    (similarity > max_similarity[rows])
                    | ((similarity == max_similarity[rows]) & (others < nearest[rows]))
                )
                max_similarity[rows[better]], nearest[rows[better]] = similarity[better], others[better]
        return max_similarity, nearest


def bands_for(threshold: float, num_hashes: int) -> tuple[int, int]:
    """Return (number of bands, hashes per band): the widest bands, which give the fewest false candidates, whose recall
    at the threshold is at least RECALL."""
    for width in range(num_hashes, 1, -1):
        num_bands = num_hashes // width
        if 1 - (1 - threshold**width) ** num_bands >= RECALL:
            return num_bands, width
    return num_hashes, 1


def band_keys(matrix: NDArray[np.uint32], num_bands: int, width: int) -> UInt64s:
    """Return a hash of each band, (rows, bands); equal values in different bands have different hashes."""
    keys = np.empty((len(matrix), num_bands), dtype=np.uint64)
    for band in range(num_bands):
        key = np.full(len(matrix), band + 1, dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = mixed(key) ^ matrix[:, column]
        keys[:, band] = mixed(key)
    return keys


def neighbors(keys: UInt64s) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs of indices (later, earlier) of equal keys in the sorted `keys`: each index with the MAX_NEIGHBORS
    before it and with the first MAX_NEIGHBORS of its run."""
    starts = run_starts(keys)
    indices = np.arange(len(keys))
    offsets = indices - starts
    for distance in range(1, MAX_NEIGHBORS + 1):
        later = indices[offsets >= distance]
        if not len(later):
            return
        yield later, later - distance
    for offset in range(MAX_NEIGHBORS):
        later = indices[offsets > MAX_NEIGHBORS + offset]
        if not len(later):
            return
        yield later, starts[later] + offset


def _sort_by_key(records: Records) -> Records:
    """Sort by key, stably, so that rows stay in order within a key."""
    return records[np.argsort(records["key"], kind="stable")]


def _encode_id(id: str) -> bytes:
    encoded = id.encode()
    assert len(encoded) == ID_BYTES, "store.rows.row_id has 16 hex digits"
    return encoded


class _RecordFile:
    """Random access to a file of fixed-size records; it is read instead of mapped, so that pages do not accumulate."""

    def __init__(self, path: Path, record_size: int) -> None:
        self._path, self._record_size = path, record_size

    def __enter__(self) -> _RecordFile:
        self._file = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the records, (len(rows), record_size) bytes; consecutive rows are read in one call."""
        out = np.empty((len(rows), self._record_size), dtype=np.uint8)
        view = out.reshape(-1).data
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
            if end > start:
                target = view[start * self._record_size : end * self._record_size]
                num_read = os.preadv(self._file, [target], int(rows[start]) * self._record_size)
                assert num_read == len(target), "the file ends before a requested row"
        return out
