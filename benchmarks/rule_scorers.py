"""How fast are the scorers that need no model, and does their memory stay flat?

    python benchmarks/rule_scorers.py [--rows 100000] [--only gopher near_duplicates]

The rows are variations of the builtin questions: a tenth of the words replaced by seeded others, one row in ten an
exact copy of an earlier one. Each scorer runs in a process of its own, over shards that are read from disk as a stage
reads them. Prints rows per second of CPU time, and by how much the process's peak memory (RSS) lies above what it was
after the first shards, when the scorer and its libraries were loaded; of duplicates also how many rows have one.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from tunery.ingest import python_docs
from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.spec import Scorer
from tunery.spec.scorers import SCORERS
from tunery.store.rows import Row, row_id, shards, write_rows

SPECS = {
    "length": {"length": "words"},
    "gopher": {"gopher": {}},
    "c4": {"c4": {}},
    "language": {"language": "en"},
    "contamination": {"contamination": {"sets": ["heldout"]}},
    "duplicates": {"duplicates": "exact"},
    "duplicates_answer": {"duplicates": "exact", "of": "response"},
    "near_duplicates": {"near_duplicates": {}},
}


def variations(rows: int, seed: int) -> Iterator[Row]:
    draw = random.Random(seed)
    originals = list(python_docs.rows("questions"))
    vocabulary = sorted({word for row in originals for word in row["messages"][-1]["content"].split()})
    recent: list[Row] = []
    for number in range(rows):
        if recent and draw.random() < 0.1:
            yield draw.choice(recent)
            continue
        question, answer = originals[number % len(originals)]["messages"]
        words = answer["content"].split(" ")
        for _ in range(max(1, len(words) // 10)):
            words[draw.randrange(len(words))] = draw.choice(vocabulary)
        row: Row = {"messages": [question, {**answer, "content": " ".join(words)}]}
        recent = [*recent[-999:], {"id": row_id(row), **row}]
        yield recent[-1]


def peak() -> float:
    """MiB"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, data: Path, heldout: Path, work: Path) -> dict[str, float]:
    """In this process, which does nothing else."""
    spec = TypeAdapter(Scorer).validate_json(json.dumps(SPECS[name]))
    entry = SCORERS[spec.kind()]
    build = entry.load()
    files = shards(data)
    scorer = build(spec, {"heldout": heldout}) if entry.input_kind == "row" else build(spec)
    work.mkdir()
    signature_files: list[Path] = []
    rows = 0
    started, before = time.process_time(), 0.0
    for number, path in enumerate(files):
        table = pq.read_table(path, columns=["id", "text", "messages"]).to_pylist()
        if entry.input_kind == "row":
            scorer(table)
        else:
            signature_files.append(work / path.name)
            columns = {"id": [row["id"] for row in table], **scorer.compute_signatures(table)}
            pq.write_table(pa.table(columns), signature_files[-1])
        rows += len(table)
        if number == 3:
            before = peak()
    found = (
        sum(
            count(columns["score"]) for columns in scorer.resolve(RowSignatures(tuple(signature_files)), work / "files")
        )
        if signature_files
        else 0
    )
    seconds = time.process_time() - started
    return {
        "rows_per_second": rows / seconds,
        "seconds": seconds,
        "grown_mib": peak() - (before or peak()),
        "peak_mib": peak(),
        "found": found,
    }


def count(scores: Iterable[float]) -> int:
    return sum(score > 0 for score in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, *paths = arguments.measure
        print(json.dumps(measure(name, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        written = write_rows(variations(arguments.rows, arguments.seed), folder / "data")
        write_rows(variations(2000, arguments.seed + 1), folder / "heldout")
        print(f"{written:,} rows; CPU time, reading included")
        print(f"{'scorer':18} {'rows/s':>9} {'seconds':>8} {'peak grew':>10} {'peak':>9}  found")
        for name in arguments.only:
            paths = [str(folder / part) for part in ("data", "heldout", name)]
            told = subprocess.run(
                [sys.executable, __file__, "--measure", name, *paths], check=True, capture_output=True, text=True
            )
            got = json.loads(told.stdout)
            print(
                f"{name:18} {got['rows_per_second']:9,.0f} {got['seconds']:8.1f} {got['grown_mib']:6,.0f} MiB"
                f" {got['peak_mib']:5,.0f} MiB  {got['found'] or ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
