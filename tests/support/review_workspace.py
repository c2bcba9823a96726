"""A store with scored and selected rows, built without a model: a function computes the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.events.event_log import EventLog
from tunery.pipeline.cache_keys import cache_keys
from tunery.pipeline.execute import execute
from tunery.pipeline.run_context import RunContext
from tunery.spec import Experiment, load
from tunery.spec.graph import with_upstream
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Store
from tunery.store.rows import Row, read_rows, shards

TEXT = """
# How often do a filter and a reviewer agree?
name: small
seed: 17
stages:
  questions: {kind: dataset, source: %s}
  scored:  {kind: score, data: questions, by: [{perplexity: {pretrained: no/such-model}}]}
  clean:   {kind: select, data: scored, keep: {perplexity: {keep_fraction: 0.5}}}
  checked: {kind: review, data: clean, rows: 12, decisions: decisions/checked.jsonl}
"""
BUILTIN = '"builtin:python-docs", subset: questions, split: train, limit: 120, corrupt_fraction: 0.2'


@dataclass
class ReviewWorkspace:
    """A folder with an experiment and a store that has its dataset and score artifacts."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "experiment.yaml"

    @property
    def decisions(self) -> Path:
        return self.folder / "decisions" / "checked.jsonl"

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @property
    def context(self) -> RunContext:
        return RunContext(self.store, self.store.run("small"), self.file)

    def load(self) -> tuple[Experiment, YamlSource]:
        return load(self.file)

    def build(self, *names: str) -> dict[str, Artifact]:
        experiment, _ = self.load()
        subset = experiment.model_copy(update={"stages": with_upstream(experiment.stages, names)})
        return execute(subset, self.context, EventLog(self.context.events / "driver.jsonl"))

    def decide(self, decisions: dict[str, str | None]) -> None:
        self.decisions.parent.mkdir(exist_ok=True)
        with self.decisions.open("a") as file:
            for id, decision in decisions.items():
                file.write(json.dumps({"id": id, "decision": decision}) + "\n")


def questions(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {n}?", "answer": f"It is the number {n}."} for n in range(count)]


def review_workspace(
    folder: Path,
    source: str | Sequence[dict[str, Any]],
    score: Callable[[int, Row], float] = lambda index, row: float(index + 1),
    text: str = TEXT,
) -> ReviewWorkspace:
    """Build the workspace. `source`: fields of a dataset, or rows for a file; `score` gives the score of a row."""
    workspace = ReviewWorkspace(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(source, str):
        lines = [json.dumps(row, ensure_ascii=True) for row in source]
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        source = "rows.jsonl"
    workspace.file.write_text(text % source)
    rows = workspace.build("questions")["questions"]
    experiment, _ = workspace.load()
    key = cache_keys(experiment, folder)["scored"]
    out = workspace.store.staging_dir("score", key.fingerprint) / "out"
    (out / "rows").mkdir(parents=True)
    (out / "scores").mkdir()
    index = 0
    for shard in shards(rows.path):
        (out / "rows" / shard.name).write_bytes(shard.read_bytes())
        table = pq.read_table(shard).to_pylist()
        values = [score(index + offset, row) for offset, row in enumerate(table)]
        index += len(table)
        ids = [row["id"] for row in table]
        pq.write_table(pa.table({"id": ids, "perplexity": pa.array(values, pa.float64())}), out / "scores" / shard.name)
    count = sum(1 for _ in read_rows(rows.path, ["id"]))
    facts = {"rows": count, "rows_in": count, "rows_out": count, "scores": {}}
    manifest = {"kind": "score", **asdict(key), "facts": facts}
    with workspace.store.lease("score", key.fingerprint) as lease:
        workspace.store.commit(out, manifest, {"seconds": 0.0}, lease)
    return workspace
