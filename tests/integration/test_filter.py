"""`tunery filter` on a CSV file, run as a command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from workspace import Workspace


def test_csv_is_filtered_by_rules_and_every_row_is_counted(tmp_path: Path) -> None:
    bench = Workspace(tmp_path)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["ticket", "question", "answer", "created"])
        lines.writerows([f"{n:03}", f"Question {n}?", " ".join(["word"] * n), "2026-01-02"] for n in range(1, 41))
        lines.writerow(["041", "No answer?", "", ""])
    words = ["rows.csv", "--out", "out/good.csv", "--dropped", "out/bad.jsonl", "--keep", "length 11..20", "--json"]
    done = bench.tunery("filter", *words, "--scores")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["read"], result["quarantined"], result["kept"], result["dropped"]) == (41, 1, 10, 30)
    assert result["dropped_by_rule"] == {"length 11..20": 30}
    kept = list(csv.DictReader((tmp_path / "out/good.csv").read_text().splitlines()))
    assert kept == [
        {
            "ticket": f"{n:03}",
            "question": f"Question {n}?",
            "answer": " ".join(["word"] * n),
            "created": "2026-01-02",
            "length": f"{n}.0",
        }
        for n in range(11, 21)
    ]
    *dropped, unusable = [json.loads(line) for line in (tmp_path / "out/bad.jsonl").read_text().splitlines()]
    assert [int(row["ticket"]) for row in dropped] == [*range(1, 11), *range(21, 41)]
    assert {row["dropped_by"] for row in dropped} == {"length 11..20"}
    assert (unusable["ticket"], unusable["dropped_by"]) == ("041", "quarantined")
    assert "response" in unusable["dropped_reason"]
    assert Path(result["report"]).is_file()
    again = bench.tunery("run", "out/good.yaml")
    assert again.stdout.count("reused") == 3, again.stdout + again.stderr
