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


def test_a_file_becomes_prompts_without_its_held_out_rows_and_the_same_ones_again(tmp_path: Path) -> None:
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
    made, told = list(read_rows(prompts)), facts(prompts)
    assert len(held) > 10
    assert told["heldout"] == len(held)
    assert len(made) == told["rows"] == 3 * (300 - len(held)) - told["repeated"]
    said = [turn["content"] for row in made for turn in row["messages"]]
    assert not [text for text in said if any(question in text for question in held)]
    assert sum("{1}" in text for text in said) * 2 == len(said), "every question as it was, braces and all"
    assert {row["line"] for row in made} == {n + 1 for n, line in enumerate(lines) if line["question"] not in held}
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
