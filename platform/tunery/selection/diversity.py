"""`diverse` of a select stage: among the rows that pass, those that stand for all.

The vectors of the rows that pass go to files (candidates.py), one of two methods chooses (k_center.py, score_first.py:
there stands what each costs), and a random choice of as many rows is measured beside it (cover.py). Nothing is gathered
in memory: a block of vectors at a time, the places of the chosen rows, and 8 bytes a chosen row.
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
from tunery.selection.candidates import Candidates, Places, rounded
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

SIMILARITY = 0.9
"""DEITA's."""
Passing = Iterable[tuple[Scores, Bools, list[str]]]
"""Of each shard its scores, which rows pass the rules, and why the others don't."""


class Diversity:
    """Which rows were chosen, told a shard at a time."""

    def __init__(self, candidates: Candidates, there: Bools, kept: Bools, lacking: str, facts: dict[str, Any]) -> None:
        """`there`: of each row that passed the rules, whether it is a candidate; `kept`: of each candidate, whether it
        was chosen; `lacking`: what rows lack that are none."""
        self._candidates, self._there, self._kept, self.lacking, self.facts = candidates, there, kept, lacking, facts
        self.taken: GreedySelection | None = None
        self._passed = self._candidate = 0

    def verdicts(self, kept: Bools, reasons: list[str]) -> tuple[Bools, list[str]]:
        """Of the next shard, from which rows passed the rules and why the others didn't."""
        kept, reasons = kept.copy(), list(reasons)
        for index in np.flatnonzero(kept).tolist():
            there = bool(self._there[self._passed])
            self._passed += 1
            if not there:
                kept[index], reasons[index] = False, f"{self.facts['method']}: {self.lacking}"
                continue
            if not self._kept[self._candidate]:
                kept[index], reasons[index] = False, self._why(self._candidate)
            self._candidate += 1
        return kept, reasons

    def _why(self, candidate: int) -> str:
        if self.taken is not None and (rival := int(self.taken.rival[candidate])) >= 0:
            id = int(self._candidates.ids[rival])
            return f"score_first: too similar to {id:016x} ({self.taken.similarity[candidate]:.3f})"
        return str(self.facts["rule"])


@contextmanager
def choose(
    context: StageContext, spec: Diverse, table: ScoredRows, passing: Passing, goods: Mapping[str, str]
) -> Iterator[Diversity]:
    """The choice, as long as its files are needed.

    Facts: method, by, rule; candidates, without (rows that passed the rules and can't be compared), wanted, kept,
    too_similar; compared (candidates that the cover was measured on), cover of the chosen rows and of as many at
    `random`, and chance_similarity, how similar candidates are (see cover.py).
    """
    folder = context.work / "diverse"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        candidates, there = _gather(folder, context.seed, spec, table, passing, goods)
        count = candidates.count
        wanted = min(count, spec.rows or (max(1, round(spec.share * count)) if spec.share else count))
        kept: Bools = candidates.column("kept", np.bool_, False)
        facts = {
            "method": spec.method,
            "by": spec.by,
            "rule": describe_diverse(spec),
            "candidates": count,
            "without": int(len(there) - there.sum()),
            "wanted": wanted,
        }
        lacking = "no embedding" if spec.score is None else f"no embedding or no {spec.score}"
        found = Diversity(candidates, there, kept, lacking, facts)
        if count:
            chosen = _chosen(context, spec, candidates, wanted, found)
            kept[chosen] = True
            facts |= {"kept": len(chosen), **_measured(candidates, chosen)}
        yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def describe_diverse(spec: Diverse) -> str:
    """ "k_center 500 by embedding"."""
    budget = [f"{spec.rows:,}"] if spec.rows else [f"share {spec.share:g}"] if spec.share else []
    return " ".join([spec.method, *budget, "by", spec.by])


def _gather(
    folder: Path, seed: int, spec: Diverse, table: ScoredRows, passing: Passing, goods: Mapping[str, str]
) -> tuple[Candidates, Bools]:
    """The candidates, and of each row that passes the rules whether it is one: it has a vector, and a score if one is
    asked for."""
    candidates: Candidates | None = None
    good = spec.prefer or goods.get(spec.score or "", "low")
    passed = 0
    with (folder / "there").open("wb") as file:
        for shard, (scores, kept, _) in zip(table.files, passing, strict=True):
            if not len(kept):
                continue
            vectors_nh, there = rounded(table.vectors(shard, spec.by)[kept])
            candidates = candidates or Candidates(folder, vectors_nh.shape[1])
            badness = np.zeros(int(kept.sum()))
            if spec.score is not None:
                badness = scores[spec.score][kept] * (1.0 if good == "low" else -1.0)
            scored = ~np.isnan(badness)
            ids = [id for id, k in zip(to_str_list(pq.read_table(shard, columns=["id"])[0]), kept, strict=True) if k]
            chance = random_scores(ids, seed)
            both = there & scored
            candidates.add(vectors_nh[scored[there]], ids_to_uint64(ids)[both], chance[both], badness[both])
            file.write(both.tobytes())
            passed += len(both)
    candidates = candidates or Candidates(folder, 1)
    candidates.close()
    if not passed:
        return candidates, np.empty(0, np.bool_)
    return candidates, np.memmap(folder / "there", np.bool_, "r")


def _chosen(context: StageContext, spec: Diverse, candidates: Candidates, wanted: int, found: Diversity) -> Places:
    if spec.method == "k_center":
        chosen, _ = k_center(
            candidates,
            wanted,
            lambda done: context.emit("progress", done=done, total=wanted, unit="rows", detail="k-center"),
        )
    else:
        similarity = SIMILARITY if spec.similarity is None else spec.similarity
        found.taken = score_first(
            candidates,
            wanted,
            similarity,
            context.work / "diverse",
            lambda done: context.emit("progress", done=done, total=candidates.count, unit="rows", detail="comparing"),
        )
        chosen = found.taken.chosen
        found.facts |= {"similarity": similarity, "too_similar": _count(found.taken)}
    return np.sort(np.array(chosen, np.int64))


def _count(taken: GreedySelection) -> int:
    """Rows that were too similar to a taken one."""
    pieces = (taken.rival[start : start + (1 << 20)] for start in range(0, len(taken.rival), 1 << 20))
    return sum(int((piece >= 0).sum()) for piece in pieces)


def _measured(candidates: Candidates, chosen: Places) -> dict[str, Any]:
    places = strided_sample(candidates, len(chosen))
    return {
        "compared": len(places),
        "cover": coverage(candidates, places, chosen),
        "random": coverage(candidates, places, _at_random(candidates, len(chosen))),
        "chance_similarity": chance_similarity(candidates),
    }


def _at_random(candidates: Candidates, count: int) -> Places:
    """So many candidates, those of the least random scores: the rows that `keep: {random: {top_k: ..}}` would keep."""

    def pieces() -> Iterator[Floats]:
        for start in range(0, candidates.count, 1 << 20):
            yield np.asarray(candidates.chance[start : start + (1 << 20)])

    worst = kth_smallest(pieces, count - 1)
    starts = range(0, candidates.count, 1 << 20)
    found = [np.flatnonzero(piece <= worst) + start for start, piece in zip(starts, pieces(), strict=True)]
    return np.concatenate(found)[:count]
