"""Rows, and runs of a score stage on them in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scorer_rows import answer_row, prompt_row, text_row

from tunery.scoring.score import run_scoring
from tunery.spec import Compute, Score
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import Row, write_rows

ROWS: list[Row] = [
    answer_row("it is because the row is red", "why is it red"),
    answer_row("yes", "is the model a model"),
    answer_row("", "what is two and three"),
    text_row("the model is one of three"),
    text_row("blue"),
    prompt_row("how so"),
    *(answer_row("green and blue " * n, "why " * (9 - n)) for n in range(1, 8)),
]


CPU = Compute(workers=1, device="cpu", cpus_per_worker=1)


def make(
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
        write_rows([{**row, "planted": ""} for row in rows], data)
    for part in ("out", "work"):
        (tmp_path / name / part).mkdir(parents=True)
    spec = {"kind": "score", "data": "docs", "by": by, "max_length": max_length}
    manifest = {"kind": "dataset", "fingerprint": "0", "facts": {"rows": len(rows)}}
    context = StageContext(
        name="scored",
        trial="",
        spec=Score.model_validate_json(json.dumps(spec)),
        inputs={"docs": Artifact(data, manifest, {})} | ({"near": near} if near else {}),
        seed=0,
        folder=folder,
        out=tmp_path / name / "out",
        work=tmp_path / name / "work",
        store=tmp_path / name / "work",
        scores=tmp_path / "scores",
        events=tmp_path,
        logs=tmp_path,
        compute=CPU,
        emit=lambda *args, **values: None,
        in_process=True,
    )
    return run_scoring(context)
