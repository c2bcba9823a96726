"""`diverse` of a select stage: selects a diverse subset of the rows that pass the rules.

The vectors of the rows that pass are written to files (candidates.py), one of two methods selects among them
(k_center.py and score_first.py document their cost), and the coverage of the selection is compared with that of a
random selection of the same size (coverage.py). In memory are only a block of vectors, the selected indices and 8 bytes
per selected row.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.scoring.order_statistics import kth_smallest
from tunery.selection.candidates import Candidates, Indices, round_vectors
from tunery.selection.coverage import chance_similarity, coverage, strided_sample
from tunery.selection.k_center import k_center
from tunery.selection.rules import Scores
from tunery.selection.score_first import GreedySelection, score_first
from tunery.selection.scored_rows import ScoredRows
from tunery.selection.thresholds import random_scores
from tunery.spec import Diverse
from tunery.store import StageContext
from tunery.store.rows import to_str_list
from tunery.store.score_cache import ids_to_uint64

DEFAULT_SIMILARITY = 0.9
"""The threshold of DEITA."""
FilteredShards = Iterable[tuple[Scores, Bools, list[str]]]
"""For each shard its scores, which rows pass the rules, and the reason of each other row."""


class DiversityFilter:
    """The result of a diversity selection, applied shard by shard."""

    def __init__(
        self,
        candidates: Candidates,
        is_candidate: Bools,
        is_selected: Bools,
        missing: str,
        facts: dict[str, Any],
    ) -> None:
        """`is_candidate` has one entry per row that passed the rules, `is_selected` one per candidate; `missing` says
        what the rows that are not candidates have not ("no embedding")."""
        self._candidates, self._is_candidate, self._is_selected = candidates, is_candidate, is_selected
        self.missing, self.facts = missing, facts
        self.greedy: GreedySelection | None = None
        """Set by the method score_first."""
        self._next_passed = self._next_candidate = 0

    def apply(self, kept: Bools, reasons: list[str]) -> tuple[Bools, list[str]]:
        """Return `kept` and `reasons` of the next shard with the rows dropped by this filter added."""
        kept, reasons = kept.copy(), list(reasons)
        for index in np.flatnonzero(kept).tolist():
            is_candidate = bool(self._is_candidate[self._next_passed])
            self._next_passed += 1
            if not is_candidate:
                kept[index], reasons[index] = False, f"{self.facts['method']}: {self.missing}"
                continue
            if not self._is_selected[self._next_candidate]:
                kept[index], reasons[index] = False, self._reason(self._next_candidate)
            self._next_candidate += 1
        return kept, reasons

    def _reason(self, candidate: int) -> str:
        if self.greedy is not None and (nearest := int(self.greedy.nearest_selected[candidate])) >= 0:
            id = int(self._candidates.ids[nearest])
            return f"score_first: too similar to {id:016x} ({self.greedy.similarity[candidate]:.3f})"
        return str(self.facts["rule"])


@contextmanager
def select_diverse(
    context: StageContext,
    spec: Diverse,
    table: ScoredRows,
    shards: FilteredShards,
    directions: Mapping[str, str],
) -> Iterator[DiversityFilter]:
    """Select diverse rows; the temporary files of the filter exist until the context ends.

    Facts: method, by, rule; candidates, missing (rows that passed the rules but have no vector or score), requested,
    kept, too_similar; coverage_rows (candidates that coverage was measured on), coverage of the selected rows and of as
    many `random` ones, and chance_similarity, the similarity of random candidates (see coverage.py).
    """
    folder = context.staging_dir / "diverse"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        candidates, is_candidate = _write_candidates(folder, context.seed, spec, table, shards, directions)
        count = candidates.count
        max_selected = min(
            count, spec.rows or (max(1, round(spec.keep_fraction * count)) if spec.keep_fraction else count)
        )
        is_selected: Bools = candidates.column("kept", np.bool_, False)
        facts = {
            "method": spec.method,
            "embedding": spec.embedding,
            "rule": describe_diverse(spec),
            "candidates": count,
            "missing": int(len(is_candidate) - is_candidate.sum()),
            "requested": max_selected,
        }
        missing = "no embedding" if spec.score is None else f"no embedding or no {spec.score}"
        diversity = DiversityFilter(candidates, is_candidate, is_selected, missing, facts)
        if count:
            selected = _select(context, spec, candidates, max_selected, diversity)
            is_selected[selected] = True
            facts |= {"kept": len(selected), **_coverage_facts(candidates, selected)}
        yield diversity
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe_diverse(spec: Diverse) -> str:
    """Return the selection as text, such as "k_center 500 by embedding"."""
    budget = [f"{spec.rows:,}"] if spec.rows else [f"fraction {spec.keep_fraction:g}"] if spec.keep_fraction else []
    return " ".join([spec.method, *budget, "by", spec.embedding])


def _write_candidates(
    folder: Path,
    seed: int,
    spec: Diverse,
    table: ScoredRows,
    shards: FilteredShards,
    directions: Mapping[str, str],
) -> tuple[Candidates, Bools]:
    """Return the candidates, and for each row that passes the rules whether it is one.

    A candidate has a vector and, if the spec names a score, that score.
    """
    candidates: Candidates | None = None
    direction = spec.prefer or directions.get(spec.score or "", "low")
    passed = 0
    with (folder / "there").open("wb") as file:
        for shard, (scores, kept, _) in zip(table.files, shards, strict=True):
            if not len(kept):
                continue
            vectors_nh, has_vector = round_vectors(table.vectors(shard, spec.embedding)[kept])
            candidates = candidates or Candidates(folder, vectors_nh.shape[1])
            badness = np.zeros(int(kept.sum()))
            if spec.score is not None:
                badness = scores[spec.score][kept] * (1.0 if direction == "low" else -1.0)
            has_score = ~np.isnan(badness)
            ids = [id for id, k in zip(to_str_list(pq.read_table(shard, columns=["id"])[0]), kept, strict=True) if k]
            chance = random_scores(ids, seed)
            usable = has_vector & has_score
            candidates.add(
                vectors_nh[has_score[has_vector]], ids_to_uint64(ids)[usable], chance[usable], badness[usable]
            )
            file.write(usable.tobytes())
            passed += len(usable)
    candidates = candidates or Candidates(folder, 1)
    candidates.close()
    if not passed:
        return candidates, np.empty(0, np.bool_)
    return candidates, np.memmap(folder / "there", np.bool_, "r")


def _select(
    context: StageContext, spec: Diverse, candidates: Candidates, max_selected: int, diversity: DiversityFilter
) -> Indices:
    if spec.method == "k_center":
        selected, _ = k_center(
            candidates,
            max_selected,
            lambda done: context.emit("progress", done=done, total=max_selected, unit="rows", detail="k-center"),
        )
    else:
        similarity = DEFAULT_SIMILARITY if spec.max_similarity is None else spec.max_similarity
        diversity.greedy = score_first(
            candidates,
            max_selected,
            similarity,
            context.staging_dir / "diverse",
            lambda done: context.emit("progress", done=done, total=candidates.count, unit="rows", detail="comparing"),
        )
        selected = diversity.greedy.selected
        diversity.facts |= {"max_similarity": similarity, "too_similar": _count_too_similar(diversity.greedy)}
    return np.sort(np.array(selected, np.int64))


def _count_too_similar(greedy: GreedySelection) -> int:
    """Return the number of rows that are too similar to a selected one."""
    nearest = greedy.nearest_selected
    chunks = (nearest[start : start + (1 << 20)] for start in range(0, len(nearest), 1 << 20))
    return sum(int((chunk >= 0).sum()) for chunk in chunks)


def _coverage_facts(candidates: Candidates, selected: Indices) -> dict[str, Any]:
    sample = strided_sample(candidates, len(selected))
    return {
        "coverage_rows": len(sample),
        "coverage": coverage(candidates, sample, selected),
        "random": coverage(candidates, sample, _random_sample(candidates, len(selected))),
        "chance_similarity": chance_similarity(candidates),
    }


def _random_sample(candidates: Candidates, count: int) -> Indices:
    """Return the `count` candidates with the lowest random scores, as `keep: {random: {top_k: count}}` selects them."""

    def chunks() -> Iterator[Floats]:
        for start in range(0, candidates.count, 1 << 20):
            yield np.asarray(candidates.chance[start : start + (1 << 20)])

    threshold = kth_smallest(chunks, count - 1)
    starts = range(0, candidates.count, 1 << 20)
    indices = [np.flatnonzero(chunk <= threshold) + start for start, chunk in zip(starts, chunks(), strict=True)]
    return np.concatenate(indices)[:count]
