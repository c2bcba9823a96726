"""A spreadsheet in, the good rows out, as a user asks for it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from conftest import Bench


def test_a_csv_is_filtered_by_rules_and_every_row_is_accounted_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["question", "answer"])
        lines.writerows([f"Question {n}?", " ".join(["word"] * n)] for n in range(1, 41))
        lines.writerow(["No answer?", ""])
    words = ["rows.csv", "--out", "out/good.csv", "--dropped", "out/bad.jsonl", "--keep", "length 11..20", "--json"]
    done = bench.tunery("filter", *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["read"], told["quarantined"], told["kept"], told["dropped"]) == (41, 1, 10, 30)
    assert told["dropped_by_rule"] == {"length 11..20": 30}
    kept = list(csv.DictReader((tmp_path / "out/good.csv").read_text("utf-8-sig").splitlines()))
    assert [(row["prompt"], row["length"], row["line"]) for row in kept] == [
        (f"Question {n}?", f"{n}.0", str(n + 1)) for n in range(11, 21)
    ]
    dropped = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [int(row["length"]) for row in dropped] == [*range(1, 11), *range(21, 41)]
    assert {row["rule"] for row in dropped} == {"length from 11 to 20"}
    assert Path(told["report"]).is_file()
    again = bench.tunery("run", "out/good.yaml")
    assert again.stdout.count("reused") == 3, again.stdout + again.stderr
