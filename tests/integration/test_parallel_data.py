"""Data work on Ray actors gives the files of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from processes import contents
from run_here import RunsHere
from workspace import Workspace

from tunery.ingest import parallel_read, parallel_write

EXPERIMENT = {
    "name": "rows",
    "seed": 17,
    "stages": {
        "rows": {"kind": "dataset", "source": "rows.jsonl"},
        "scored": {"kind": "score", "data": "rows", "by": [{"length": "words"}, {"duplicates": "exact"}]},
        "clean": {
            "kind": "select",
            "data": "scored",
            "keep": {"length": {"keep_fraction": 0.7}, "duplicates": {"threshold": 0}},
        },
    },
    "compute": {"workers": 2, "device": "cpu"},
    "tracking": {"wandb": {"mode": "disabled"}},
}


def test_dataset_and_select_on_actors_equal_those_of_one_process(
    runs_here: RunsHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"row {n} " + "word " * (n % 50)}) for n in range(4_000)]
    lines[100] = "not JSON"
    lines[2_000:2_100] = lines[:100]
    results = []
    for name, min_bytes in (("parallel", 0), ("one", 1 << 40)):
        bench = Workspace(tmp_path / name)
        bench.folder.mkdir()
        (bench.folder / "rows.jsonl").write_text("\n".join(lines))
        bench.file.write_text(yaml.safe_dump(EXPERIMENT))
        monkeypatch.setattr(parallel_write, "MIN_PARALLEL_BYTES", min_bytes)
        monkeypatch.setattr(parallel_read, "RANGE_BYTES", 20_000)
        done = runs_here.tunery(bench, "run", str(bench.file))
        assert done.returncode == 0, done.stdout + done.stderr
        assert not [*(bench.store / "work").iterdir()]
        results.append({kind: contents(bench.only(kind)) for kind in ("dataset", "score", "select")})
    parallel, one = results
    for kind in one:
        assert parallel[kind].keys() == one[kind].keys()
        for file, content in one[kind].items():
            assert parallel[kind][file] == content, f"{kind}: {file}"
    assert len([file for file in one["select"] if file.startswith("rows/")]) > 1
