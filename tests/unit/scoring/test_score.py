"""The score stage in one process: every input row is in the output once, and a missing one is an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from in_process import dataset, stage_context

from tunery.errors import RowCountError, StageError
from tunery.scoring.score import MAX_NAME_LENGTH, run_scoring
from tunery.spec import Score
from tunery.store import StageResult
from tunery.store.rows import Row, read_rows, row_id, shards, write_rows

RULES: list[dict[str, Any]] = [{"length": "words"}, {"duplicates": "exact"}, {"near_duplicates": {"ngram": 1}}]


def rows_of(count: int) -> list[Row]:
    """Return rows of which every tenth equals the one before it."""
    rows: list[Row] = [{"text": " ".join(f"w{n}x{m}" for m in range(5 + n % 7)), "line": n} for n in range(count)]
    for n in range(9, count, 10):
        rows[n] = {**rows[n - 1], "line": n}
    return [{**row, "id": row_id(row), "injected_corruption": None} for row in rows]


def score(folder: Path, rows: Sequence[Row], by: Sequence[dict[str, Any]] = RULES) -> tuple[StageResult, Path]:
    data, out = folder / "data", folder / "artifact"
    if not data.exists():
        write_rows(rows, data)
    out.mkdir()
    context = stage_context(
        Score.model_validate({"kind": "score", "data": "data", "by": tuple(by)}),
        {"data": dataset(data, rows=len(rows))},
        folder,
        name="scored",
        out=out,
        staging_dir=folder / "work",
        scores=folder / "scores",
    )
    return run_scoring(context), out


def scores_of(out: Path) -> dict[str, list[Any]]:
    (path,) = (out / "scores").iterdir()
    actual: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return actual


def test_rule_scorers_share_a_pass_and_keep_their_own_scores(tmp_path: Path) -> None:
    rows = rows_of(30)
    result, out = score(tmp_path, rows)
    actual = scores_of(out)
    assert list(actual) == [
        "id",
        "length",
        "length_prompt",
        "duplicates",
        "near_duplicates",
        "near_duplicates_nearest",
    ]
    assert actual["id"] == [row["id"] for row in rows]
    assert actual["length"] == [float(len(row["text"].split())) for row in rows]
    is_copy = [n % 10 == 9 for n in range(30)]
    assert actual["duplicates"] == [float(copy) for copy in is_copy]
    assert [value == 1.0 for value in actual["near_duplicates"]] == is_copy
    assert [path.name for path in (tmp_path / "work" / "passes").iterdir()] == ["length+duplicates+near_duplicates"]
    assert (result.facts["rows_in"], result.facts["rows"], result.facts["quarantined"]) == (30, 30, 0)
    assert result.runtime_stats["rows_scored"] == 30


def test_only_per_row_scores_are_cached(tmp_path: Path) -> None:
    score(tmp_path, rows_of(30))
    assert len(list((tmp_path / "scores").iterdir())) == 1, "scores that compare rows are not cached"


def test_missing_row_is_an_error(tmp_path: Path) -> None:
    score(tmp_path, rows_of(30))
    (part,) = (tmp_path / "work" / "passes").glob("*/part-*.parquet")
    pq.write_table(pq.read_table(part).slice(0, 29), part)
    (tmp_path / "artifact").rename(tmp_path / "first")
    with pytest.raises(RowCountError, match="30 input rows; 30 output rows, 29 rows with scores, 0 in quarantine"):
        score(tmp_path, rows_of(30))


def test_unscorable_row_is_quarantined_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunery.scoring.scorers.length import LengthScorer

    score_rows = LengthScorer.__call__

    def fail_on_line_4(self: LengthScorer, rows: Sequence[Row]) -> Any:
        if any(row["line"] == 4 for row in rows):
            raise ValueError("a strange row")
        return score_rows(self, rows)

    monkeypatch.setattr(LengthScorer, "__call__", fail_on_line_4)
    rows = rows_of(30)
    result, out = score(tmp_path, rows)
    assert (result.facts["rows_in"], result.facts["rows"], result.facts["quarantined"]) == (30, 29, 1)
    assert [row["line"] for row in read_rows(out)] == [n for n in range(30) if n != 4]
    assert scores_of(out)["id"] == [row["id"] for row in rows if row["line"] != 4]
    output = json.loads((out / "quarantine.jsonl").read_text())
    assert output == {"source": None, "line": 4, "id": rows[4]["id"], "reason": "ValueError: a strange row"}


def test_many_scores_with_long_names_fit_a_file_system(tmp_path: Path) -> None:
    by = [{"length": "words", "name": f"length_of_the_response_in_words_number_{n}"} for n in range(20)]
    _, out = score(tmp_path, rows_of(3), by)
    assert set(scores_of(out)) > {f"length_of_the_response_in_words_number_{n}" for n in range(20)}
    (folder,) = (tmp_path / "work" / "passes").iterdir()
    assert len(folder.name) < MAX_NAME_LENGTH + 30


def test_two_scores_with_the_same_column_are_rejected(tmp_path: Path) -> None:
    by = [{"near_duplicates": {}, "name": "near"}, {"length": "words", "name": "near_nearest"}]
    with pytest.raises(StageError, match="two scores have a column `near_nearest`"):
        score(tmp_path, rows_of(3), by)


def test_shards_of_the_artifact_are_those_of_the_data(tmp_path: Path) -> None:
    _, out = score(tmp_path, rows_of(1030), RULES[:1])
    assert [path.name for path in shards(out)] == [path.name for path in sorted((out / "scores").iterdir())]
    assert [path.read_bytes() for path in shards(out)] == [path.read_bytes() for path in shards(tmp_path / "data")]
