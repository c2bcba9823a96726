"""Rows, and runs of a score stage on them in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from in_process import dataset, parsed, stage_context
from scorer_rows import prompt_row, response_row, text_row

from tunery.scoring.score import run_scoring
from tunery.spec import Score
from tunery.store import Artifact, StageResult
from tunery.store.rows import Row, write_rows

ROWS: list[Row] = [
    response_row("it is because the row is red", "why is it red"),
    response_row("yes", "is the model a model"),
    response_row("", "what is two and three"),
    text_row("the model is one of three"),
    text_row("blue"),
    prompt_row("how so"),
    *(response_row("green and blue " * n, "why " * (9 - n)) for n in range(1, 8)),
]


def run_score_stage(
    folder: Path,
    tmp_path: Path,
    name: str,
    by: list[dict[str, Any]],
    max_length: int = 64,
    near: Artifact | None = None,
    rows: Sequence[Row] = ROWS,
) -> StageResult:
    data = tmp_path / "data"
    if not data.exists():
        write_rows([{**row, "injected_corruption": ""} for row in rows], data)
    for part in ("out", "work"):
        (tmp_path / name / part).mkdir(parents=True)
    spec = {"kind": "score", "data": "docs", "by": by, "max_length": max_length}
    context = stage_context(
        parsed(Score, spec),
        {"docs": dataset(data, rows=len(rows))} | ({"near": near} if near else {}),
        folder,
        name="scored",
        out=tmp_path / name / "out",
        staging_dir=tmp_path / name / "work",
        scores=tmp_path / "scores",
        events=tmp_path,
        logs=tmp_path,
    )
    return run_scoring(context)
