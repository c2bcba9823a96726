"""`tunery run` builds prompts from a file of questions. Nothing is trained, so Ray is not started."""

from __future__ import annotations

import json
from pathlib import Path

from workspace import Workspace, facts

from tunery.store.rows import read_rows

TEXT = """
# What comes of a file of sums?
name: sums
seed: 17
stages:
  rows:    {kind: dataset, source: sums.jsonl}
  heldout: {kind: dataset, source: sums.jsonl, split: test}
  prompts:
    kind: augment
    data: rows
    templates: ["{question}", "Work it out: {question}"]
    few_shot: {shots: [0, 3]}
    chain_of_thought: {separator: "####", direct: 0.5}
    copies: 2
    originals: true
    heldout: [heldout]
"""


def test_augmented_prompts_exclude_held_out_rows_and_are_reproducible(tmp_path: Path) -> None:
    bench = Workspace(tmp_path)
    lines = [
        {"question": f"What is {n} + {{1}}?", "answer": f"{n} and 1 are {n + 1}. #### {n + 1}"} for n in range(300)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bench.file.write_text(TEXT)
    done = bench.tunery("run", str(bench.file))
    assert done.returncode == 0, done.stdout + done.stderr
    datasets = {facts(path)["split"]: path for path in bench.artifacts("dataset")}
    held = {row["messages"][0]["content"] for row in read_rows(datasets["test"])}
    prompts = bench.only("augment")
    built, result = list(read_rows(prompts)), facts(prompts)
    assert len(held) > 10
    assert result["heldout"] == len(held)
    assert len(built) == result["rows"] == 3 * (300 - len(held)) - result["repeated"]
    message = [turn["content"] for row in built for turn in row["messages"]]
    assert not [text for text in message if any(question in text for question in held)]
    assert sum("{1}" in text for text in message) * 2 == len(message), "every question as it was, braces and all"
    assert {row["line"] for row in built} == {n + 1 for n, line in enumerate(lines) if line["question"] not in held}
    assert "Augmented rows" in (bench.store / "runs" / "sums" / "report.html").read_text()
    again = bench.tunery("run", str(bench.file))
    assert again.stdout.count("reused") == 3, again.stdout + again.stderr
    other = Workspace(tmp_path / "other")
    other.folder.mkdir()
    (other.folder / "sums.jsonl").write_bytes((tmp_path / "sums.jsonl").read_bytes())
    other.file.write_text(TEXT)
    assert other.tunery("run", str(other.file)).returncode == 0
    for shard in (prompts / "rows").iterdir():
        assert shard.read_bytes() == (other.only("augment") / "rows" / shard.name).read_bytes()
