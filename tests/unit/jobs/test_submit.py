"""Which files of this machine an experiment reads, which the nodes of a cluster must have too."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiment_text import LoadText

from tunery.errors import RequestError
from tunery.jobs.submit import _environment, local_paths

TEXT = """
name: paths
seed: 1
stages:
  rows:    {kind: dataset, source: [data/rows.jsonl, "parts/*.jsonl", "s3://bucket/rows.jsonl", "hub:org/name"]}
  docs:    {kind: dataset, source: "builtin:python-docs", subset: prompts}
  scored:
    kind: score
    data: rows
    by: [{perplexity: {pretrained: ./model}}, {perplexity: {pretrained: org/name}, name: hub}]
  clean:   {kind: select, data: scored, keep: {perplexity: {keep_fraction: 0.5}}}
  checked: {kind: review, data: clean, decisions: decisions/checked.jsonl}
  sft:     {kind: sft, data: checked, model: {pretrained: /models/base}, epochs: 1, learning_rate: 1.0e-4}
  policy:
    {kind: grpo, data: docs, model: sft, reward: {python: rewards.py}, group_size: 4, epochs: 1, learning_rate: 1.0e-5}
"""


def test_files_and_folders_of_all_stages_are_found(load_text: LoadText, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    experiment, _ = load_text(TEXT)
    assert [str(path) for path in local_paths(experiment, tmp_path)] == [
        f"{tmp_path}/data/rows.jsonl",
        f"{tmp_path}/parts",
        f"{tmp_path}/model",
        f"{tmp_path}/decisions",
        "/models/base",
        f"{tmp_path}/rewards.py",
    ]


def test_only_named_variables_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "value")
    monkeypatch.setenv("OTHER", "secret")
    passed = _environment(["MINE"])
    assert passed["MINE"] == "value"
    assert "secret" not in passed.values()
    with pytest.raises(RequestError, match="the environment variable MISSING is not set"):
        _environment(["MISSING"])
