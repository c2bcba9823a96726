"""Exact and near duplicates, and the intermediate files of the search for them."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_rows import hostile_rows, prompt_row, response_row, score_corpus, text_row

from tunery.scoring.scorers import near_duplicates
from tunery.scoring.scorers.exact_duplicates import DuplicatesScorer
from tunery.scoring.scorers.external_groupby import PartitionFiles, RowSignatures, partition_of
from tunery.scoring.scorers.near_duplicates import NearDuplicatesScorer, bands_for, neighbors
from tunery.scoring.scorers.texts import normalize
from tunery.spec import Duplicates, NearDuplicates
from tunery.store.rows import Row, nfc


def exact_scorer(of: str = "row", records: int = 1000, comparison: str = "exact") -> DuplicatesScorer:
    return DuplicatesScorer(Duplicates.model_validate({"duplicates": comparison, "of": of}), records)


def near_scorer(records: int = 10_000, **settings: object) -> NearDuplicatesScorer:
    return NearDuplicatesScorer(NearDuplicates.model_validate({"near_duplicates": settings}), records)


# Exact.


def test_score_counts_the_earlier_rows_with_the_same_content(tmp_path: Path) -> None:
    rows = [text_row(text) for text in ("a", "b", "a ", "c", "a", "b", "A")]
    assert score_corpus(exact_scorer(), rows, tmp_path, shard=2) == {"score": [0, 0, 1, 0, 2, 1, 0]}


@pytest.mark.parametrize(
    ("comparison", "of", "scores"),
    [
        ("exact", "row", [0, 0, 0, 0, 0]),
        ("exact", "prompt", [0, 0, 0, 1, 0]),
        ("exact", "response", [0, 0, 0, math.nan, 1]),
        ("normalised", "row", [0, 0, 0, 0, 1]),
        ("normalised", "prompt", [0, 1, 0, 2, 3]),
        ("normalised", "response", [0, 0, 1, math.nan, 2]),
    ],
)
def test_compared_part_and_normalization_are_configurable(
    tmp_path: Path, comparison: str, of: str, scores: list[float]
) -> None:
    rows = [
        response_row("Same thing.", "Why\nis it?"),
        response_row("Other.", "why is  IT?"),
        response_row("same  thing. ", "How?"),
        prompt_row("Why\nis it? "),
        response_row("Same thing. ", "Why is it?"),
    ]
    assert score_corpus(exact_scorer(of, comparison=comparison), rows, tmp_path)["score"] == pytest.approx(
        scores, nan_ok=True
    )


def test_rejected_responses_are_part_of_the_row(tmp_path: Path) -> None:
    rows = [response_row("yes"), {**response_row("yes"), "rejected": [{"role": "assistant", "content": "no"}]}]
    assert score_corpus(exact_scorer(comparison="normalised"), rows, tmp_path)["score"] == [0, 0]


def test_composed_and_decomposed_letters_are_the_same() -> None:
    assert normalize("Cafe\u0301 noir") == normalize("caf\u00e9  noir ")
    assert normalize("caf\u00e9") != normalize("cafe")
    assert nfc("Cafe\u0301\n noir") == "Caf\u00e9\n noir"


@pytest.mark.parametrize("records", [1, 3, 50])
def test_counts_do_not_depend_on_the_number_of_files(tmp_path: Path, records: int) -> None:
    rng = random.Random(3)
    rows = [text_row(str(rng.randrange(12))) for _ in range(60)]
    texts = [row["text"] for row in rows]
    expected = [texts[:index].count(text) for index, text in enumerate(texts)]
    assert score_corpus(exact_scorer(records=records), rows, tmp_path)["score"] == expected
    assert list((tmp_path / "work").rglob("*.bin")) == []


def test_files_of_a_killed_attempt_are_ignored(tmp_path: Path) -> None:
    rows = [text_row(text) for text in ["a", "b", "c", "a", "b", "c", "d", "a"]]
    for scorer in (exact_scorer(records=2), near_scorer(records=2)):
        clean = score_corpus(scorer, rows, tmp_path / "clean" / type(scorer).__name__, shard=2)
        assert score_corpus(scorer, rows, tmp_path / "again" / type(scorer).__name__, shard=2, abandoned=2) == clean


# Near.

RNG = random.Random(5)
VOCABULARY = [f"word{number}" for number in range(4000)]


def corpus(bases: int = 60, copies: int = 4) -> list[str]:
    """Return texts of 60 words, and copies of them with 0 to 12 words changed, in a random order."""
    texts = []
    for _ in range(bases):
        base = [RNG.choice(VOCABULARY) for _ in range(60)]
        for copy in range(copies):
            words = list(base)
            for index in RNG.sample(range(60), RNG.choice([0, 1, 2, 12]) if copy else 0):
                words[index] = RNG.choice(VOCABULARY)
            texts.append(" ".join(words))
    RNG.shuffle(texts)
    return texts


def ngrams(text: str, n: int) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + n]) for start in range(len(words) - n + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)


def test_near_duplicates_equal_a_brute_force_search(tmp_path: Path) -> None:
    texts = corpus()
    rows = [text_row(text) for text in texts]
    ids = [row["id"] for row in rows]
    actual = score_corpus(near_scorer(threshold=0.7, ngram=3), rows, tmp_path, shard=16)
    sets = [ngrams(text, 3) for text in texts]
    expected = missed = 0
    for index, row_ngrams in enumerate(sets):
        similarity = max((jaccard(row_ngrams, other) for other in sets[:index]), default=0.0)
        score, nearest = actual["score"][index], actual["nearest"][index]
        if similarity >= 0.8:
            expected += 1
            missed += score == 0
        if similarity < 0.55:
            assert score == 0
        if score:
            assert score >= 0.7
            assert abs(score - jaccard(row_ngrams, sets[ids.index(nearest)])) < 0.2
            assert ids.index(nearest) < index
        else:
            assert nearest == ""
    assert expected > 80
    assert missed <= expected * 0.02


@pytest.mark.parametrize(("records", "shard"), [(1, 16), (64, 5), (64, 100), (10_000, 16)])
def test_near_duplicates_do_not_depend_on_the_number_of_files(tmp_path: Path, records: int, shard: int) -> None:
    rng = random.Random(11)
    base = [rng.choice(VOCABULARY) for _ in range(20)]
    rows = []
    for _ in range(40):
        words = list(base)
        words[rng.randrange(20)] = rng.choice(VOCABULARY[:3])
        rows.append(text_row(" ".join(words)))
    expected = score_corpus(near_scorer(threshold=0.3, permutations=16), rows, tmp_path / "one", shard=40)
    assert sum(score > 0 for score in expected["score"]) > 20
    scorer = near_scorer(records, threshold=0.3, permutations=16)
    assert score_corpus(scorer, rows, tmp_path / "many", shard=shard) == expected


def test_exact_copies_are_paired_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the first of 300 equal rows is added to the bands; otherwise there would be thousands of pairs.
    sizes = []

    def record_size(keys: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> object:
        sizes.append(len(keys))
        return neighbors(keys)

    monkeypatch.setattr(near_duplicates, "neighbors", record_size)
    rows = [text_row("one and the same text in every row of them all")] * 300
    actual = score_corpus(near_scorer(), rows, tmp_path, shard=50)
    assert actual["score"] == [0.0] + [1.0] * 299
    assert actual["nearest"] == [""] + [rows[0]["id"]] * 299
    assert sum(sizes) == bands_for(0.8, 128)[0]


def test_neighbors_in_a_crowded_band_are_the_first_and_the_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_NEIGHBORS", 2)
    keys = np.array([1, 7, 7, 7, 7, 7, 7, 9], dtype=np.uint64)
    pairs = {(int(a), int(b)) for later, earlier in neighbors(keys) for a, b in zip(later, earlier, strict=True)}
    assert {b for a, b in pairs if a == 6} == {5, 4, 1, 2}
    assert {b for a, b in pairs if a == 4} == {3, 2, 1}
    assert {b for a, b in pairs if a == 3} == {2, 1}
    assert {b for a, b in pairs if a in (0, 1, 7)} == set()


def test_part_and_ngram_length_are_configurable(tmp_path: Path) -> None:
    rows = [
        response_row("a b c d e f", "Why?"),
        response_row("a b c d e f", "How is it that one asks at such a length?"),
    ]
    assert score_corpus(near_scorer(of="response"), rows, tmp_path / "response")["score"] == [0, 1]
    assert score_corpus(near_scorer(of="all"), rows, tmp_path / "all")["score"] == [0, 0]
    rows = [text_row("a b c d"), text_row("d c b a")]
    assert score_corpus(near_scorer(ngram=1), rows, tmp_path / "1")["score"] == [0, 1]
    assert score_corpus(near_scorer(ngram=2), rows, tmp_path / "2")["score"] == [0, 0]


def test_short_rows_are_compared_completely_and_empty_rows_never(tmp_path: Path) -> None:
    rows = [text_row(text) for text in ("", "yes", "?!", "Yes!", "no")]
    actual = score_corpus(near_scorer(), rows, tmp_path)
    assert actual["score"] == pytest.approx([math.nan, 0, math.nan, 1, 0], nan_ok=True)


def test_shard_without_words_and_stage_without_rows_are_accepted(tmp_path: Path) -> None:
    assert score_corpus(near_scorer(), [text_row("")] * 3, tmp_path / "empty", shard=2)["nearest"] == [""] * 3
    exact = score_corpus(exact_scorer("response"), [text_row("")] * 3, tmp_path / "exact", shard=2)
    assert exact["score"] == pytest.approx([math.nan] * 3, nan_ok=True)
    assert near_scorer().compute_signatures([]) == {"signature": []}
    assert list(near_scorer().resolve(RowSignatures(()), tmp_path / "none")) == []


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_reach_the_recall_at_the_threshold(threshold: float) -> None:
    bands, width = bands_for(threshold, 128)
    assert bands * width <= 128
    assert 1 - (1 - threshold**width) ** bands >= 0.98


def test_signature_is_the_same_in_every_process() -> None:
    # If this fails after an update of rensa, increase the version of the scorer.
    rows = [text_row("a row that does not change")]
    (signature,) = near_scorer(permutations=16).compute_signatures(rows)["signature"]
    assert signature.hex().startswith("69c80ea2e210dad0404f46f17a74f6d1a5910cc7c1db67d8")


@settings(max_examples=15)
@given(rows=st.lists(hostile_rows, min_size=1, max_size=6))
def test_hostile_rows_are_compared(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    for scorer in (
        exact_scorer(),
        exact_scorer("prompt"),
        exact_scorer("response"),
        exact_scorer(comparison="normalised"),
        near_scorer(of="all"),
        near_scorer(of="prompt"),
    ):
        columns = score_corpus(scorer, rows, tmp_path_factory.mktemp("rows"), shard=2)
        assert {len(values) for values in columns.values()} == {len(rows)}


def test_combining_marks_take_linear_time(tmp_path: Path) -> None:
    row = response_row("")
    row["messages"][-1]["content"] = "\u0315\u0300" * 200_000
    for scorer in (exact_scorer("response"), near_scorer(of="response")):
        started = time.process_time()
        score_corpus(scorer, [row], tmp_path / type(scorer).__name__)
        assert time.process_time() - started < 5


# Files.


def test_partitions_preserve_records_and_order(tmp_path: Path) -> None:
    partitions = PartitionFiles(tmp_path / "parts", {"value": "<u8"}, buffer_size=3)
    for start in range(0, 10, 2):
        values = np.arange(start, start + 2, dtype=np.uint64)
        partitions.append((values % 3).astype(np.int64), value=values)
    assert partitions.read(1)["value"].tolist() == [1, 4, 7]
    assert [chunk["value"].tolist() for chunk in partitions.read_chunks(0, 3)] == [[0, 3, 6], [9]]
    assert partitions.read(5)["value"].tolist() == []


def test_partitions_of_a_killed_attempt_are_removed(tmp_path: Path) -> None:
    for value in (1, 2):
        partitions = PartitionFiles(tmp_path / "parts", {"value": "<u8"})
        partitions.append(np.zeros(1, dtype=np.int64), value=np.array([value], dtype=np.uint64))
        assert partitions.read(0)["value"].tolist() == [value]


def test_hash_partitions_have_similar_sizes() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 30_000, dtype=np.uint64)
    counts = np.bincount(partition_of(keys, 3), minlength=3)
    assert counts.sum() == 30_000
    assert counts.min() > 9_500
