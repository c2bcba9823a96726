"""Near duplicates by MinHash and locality-sensitive hashing (Broder 1997; Lee et al. 2022,
https://arxiv.org/abs/2107.06499).

A row's signature keeps, for each of K hash functions, the least hash of its word n-grams: two rows agree in each with
the probability of their Jaccard similarity. Signatures are cut in bands; rows that agree in a whole band are
candidates, and candidates are compared by their signatures. Signatures are rensa's R-MinHash: of 20,000 short answers
75,000 a second, where datasketch makes 13,000 and brings scipy along; without bias, with a lower standard error than
plain MinHash (0.025 for 0.031).

Sketches are 4 K bytes a row (512 for K = 128). Bands, candidates and their signatures go through files, so memory does
not grow with the rows but for two bytes each; files of some 1.5 kB a row do. 2 M rows take two minutes of one core and
3 GB; 100 M rows would take 150 GB of disk and hours of one process, which is the limit: past that, bands want to be
shared out to machines.

A row is compared with at most 2 * NEIGHBOURS earlier rows a band, of those that differ in their signature: where
thousands of rows share a band (a template), the most similar one may be missed, and a less similar one of the same kind
is found. Rows with equal signatures are found in any case.
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
    RECORDS,
    PartitionFiles,
    Records,
    RowSignatures,
    ShardGroup,
    block_numbers,
    part_of,
    run_starts,
)
from tunery.scoring.scorers.ngrams import Words, mixed
from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import select_text
from tunery.spec import NearDuplicates
from tunery.store.rows import Row

Numbers = NDArray[np.uint64]

SEED = 17
"""Of the hash functions. Which is taken changes estimates within their error; one for all keeps scores comparable."""
RECALL = 0.98
"""Probability that a pair at the threshold becomes a candidate."""
NEIGHBOURS = 16
"""Earlier rows of a band that a row is compared with: so many from the first on, and so many just before it."""
COMPARED = 16_384
"""Pairs compared at a time: 16 MB of signatures."""
ID = 16
"""Bytes of a row's id."""


class NearDuplicatesScorer:
    def __init__(self, spec: NearDuplicates, records: int = RECORDS) -> None:
        settings = spec.near_duplicates
        self._of, self._n, self._threshold = settings.of, settings.ngram, settings.threshold
        self._hashes = settings.permutations
        self._records = records

    def sketch(self, rows: Sequence[Row]) -> Columns:
        """signature: 4 bytes a hash function, None where there is no word."""
        grams, counts = Words.of([select_text(row, self._of) or "" for row in rows]).ngrams(self._n)
        ends = np.cumsum([0, *counts]).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, ends, self._hashes, SEED)
        signatures = np.array(matrix.to_rows(), dtype="<u4").reshape(len(rows), self._hashes)
        return {
            "signature": [one.tobytes() if count else None for one, count in zip(signatures, counts, strict=True)],
        }

    def resolve(self, sketches: RowSignatures, work: Path) -> Iterator[Columns]:
        """score: estimated Jaccard similarity to the most similar earlier row, 0 where none reaches the threshold, NaN
        where there is no word; nearest: the id of that row (of equals the first), or ""."""
        work.mkdir(parents=True, exist_ok=True)
        # A block's signatures are in memory at once.
        blocks = sketches.blocks(max(1, self._records // self._hashes))
        pairs = PartitionFiles(work / "pairs", {"row": "<u8", "other": "<u8"}, self._records)
        present = self._find_pairs(sketches, blocks, pairs, work)
        with _Flat(work / "signatures.bin", 4 * self._hashes) as signatures, _Flat(work / "ids.bin", ID) as ids:
            for number, block in enumerate(blocks):
                best, other = self._best(block, pairs.pieces(number, self._records), signatures)
                pairs.drop(number)
                names = ids.rows(np.maximum(other, 0)) if (other >= 0).any() else np.zeros((block.rows, ID), np.uint8)
                start = 0
                for _, count in block.shards:
                    chosen = slice(start, start + count)
                    known = present[block.first + start : block.first + start + count]
                    yield {
                        "score": np.where(known, best[chosen], math.nan).tolist(),
                        "nearest": [
                            name.tobytes().decode() if row >= 0 else ""
                            for name, row in zip(names[chosen], other[chosen].tolist(), strict=True)
                        ],
                    }
                    start += count
        for name in ("signatures.bin", "ids.bin"):
            (work / name).unlink()

    def _find_pairs(
        self, sketches: RowSignatures, blocks: list[ShardGroup], pairs: PartitionFiles, work: Path
    ) -> NDArray[np.bool_]:
        """Writes candidates to `pairs`; returns which rows have a signature."""
        rows = sum(block.rows for block in blocks)
        present = np.zeros(rows, dtype=np.bool_)
        bands, width = bands_for(self._threshold, self._hashes)
        parts, whole_parts = 1 + rows * bands // self._records, 1 + rows // self._records
        by_band = PartitionFiles(work / "bands", {"key": "<u8", "row": "<u8"}, self._records)
        by_whole = PartitionFiles(work / "whole", {"key": "<u8", "row": "<u8"}, self._records)
        with (work / "signatures.bin").open("wb") as signatures, (work / "ids.bin").open("wb") as ids:
            for first, sketch in sketches.by_shard(blocks, ["id", "signature"]):
                empty = bytes(4 * self._hashes)
                joined = b"".join(one or empty for one in sketch["signature"])
                signatures.write(joined)
                ids.write(b"".join(_padded(one) for one in sketch["id"]))
                known = np.array([one is not None for one in sketch["signature"]], dtype=np.bool_)
                present[first : first + len(known)] = known
                matrix = np.frombuffer(joined, dtype="<u4").reshape(len(known), self._hashes)[known]
                numbers = (first + np.flatnonzero(known)).astype(np.uint64)
                keys = band_keys(matrix, 1, self._hashes)[:, 0]
                by_whole.append(part_of(keys, whole_parts), key=keys, row=numbers)
                for keys in band_keys(matrix, bands, width).T:
                    by_band.append(part_of(keys, parts), key=keys, row=numbers)

        # A row that equals an earlier one is as similar to any other as that one is: its pair is settled.
        settled = np.zeros(rows, dtype=np.bool_)
        for number in range(whole_parts):
            records = _sorted(by_whole.read(number))
            runs = run_starts(records["key"])
            again = runs != np.arange(len(runs))
            self._keep(pairs, blocks, records["row"][again], records["row"][runs[again]])
            settled[records["row"][again]] = True
            by_whole.drop(number)
        for number in range(parts):
            records = by_band.read(number)
            records = _sorted(records[~settled[records["row"]]])
            for later, earlier in neighbours(records["key"]):
                self._keep(pairs, blocks, records["row"][later], records["row"][earlier])
            by_band.drop(number)
        return present

    def _keep(self, pairs: PartitionFiles, blocks: list[ShardGroup], rows: Numbers, others: Numbers) -> None:
        pairs.append(block_numbers(blocks, rows), row=rows, other=others)

    def _best(
        self, block: ShardGroup, pieces: Iterator[Records], signatures: _Flat
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Highest similarity to an earlier row at or above the threshold and that row (-1 for none), each row."""
        best, other = np.zeros(block.rows), np.full(block.rows, -1, dtype=np.int64)
        own = signatures.rows(np.arange(block.first, block.first + block.rows)).view("<u4")
        for piece in pieces:
            # The same two rows are candidates in many bands.
            distinct = np.unique(piece)
            for start in range(0, len(distinct), COMPARED):
                some = distinct[start : start + COMPARED]
                rows, others = some["row"].astype(np.int64) - block.first, some["other"].astype(np.int64)
                needed, places = np.unique(others, return_inverse=True)
                theirs = signatures.rows(needed).view("<u4")
                alike = (own[rows] == theirs[places]).mean(axis=1)
                order = np.lexsort((others, -alike, rows))
                _, firsts = np.unique(rows[order], return_index=True)
                chosen = order[firsts]
                rows, others, alike = rows[chosen], others[chosen], alike[chosen]
                # An estimate is a multiple of 1 / K; what misses the threshold by rounding alone does not miss it.
                better = (alike >= self._threshold - 1e-9) & (
                    (alike > best[rows]) | ((alike == best[rows]) & (others < other[rows]))
                )
                best[rows[better]], other[rows[better]] = alike[better], others[better]
        return best, other


def bands_for(threshold: float, hashes: int) -> tuple[int, int]:
    """(bands, hashes in each): the widest bands (the fewest candidates in vain) that reach RECALL at the threshold."""
    for width in range(hashes, 1, -1):
        bands = hashes // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return hashes, 1


def band_keys(matrix: NDArray[np.uint32], bands: int, width: int) -> Numbers:
    """(rows, bands): a hash of each band, other for equal bands at other places."""
    keys = np.empty((len(matrix), bands), dtype=np.uint64)
    for band in range(bands):
        key = np.full(len(matrix), band + 1, dtype=np.uint64)
        for place in range(band * width, (band + 1) * width):
            key = mixed(key) ^ matrix[:, place]
        keys[:, band] = mixed(key)
    return keys


def neighbours(keys: Numbers) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of sorted keys, pairs of places (later, earlier) with equal keys: each with the NEIGHBOURS before it, and with
    the first NEIGHBOURS of its run."""
    starts = run_starts(keys)
    places = np.arange(len(keys))
    since = places - starts
    for back in range(1, NEIGHBOURS + 1):
        later = places[since >= back]
        if not len(later):
            return
        yield later, later - back
    for step in range(NEIGHBOURS):
        later = places[since > NEIGHBOURS + step]
        if not len(later):
            return
        yield later, starts[later] + step


def _sorted(records: Records) -> Records:
    """By key; rows come in their order."""
    return records[np.argsort(records["key"], kind="stable")]


def _padded(identity: str) -> bytes:
    encoded = identity.encode()
    assert len(encoded) == ID, "store.rows.row_id has 16 hex digits"
    return encoded


class _Flat:
    """Random access to a file of records of one size: read, not mapped, so that what was read does not stay."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size

    def __enter__(self) -> _Flat:
        self._file = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(len(numbers), size) bytes; runs of consecutive numbers are read in one go."""
        out = np.empty((len(numbers), self._size), dtype=np.uint8)
        view = out.reshape(-1).data
        ends = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(numbers)], strict=True):
            if end > start:
                target = view[start * self._size : end * self._size]
                done = os.preadv(self._file, [target], int(numbers[start]) * self._size)
                assert done == len(target), "rows that were written are there"
        return out
