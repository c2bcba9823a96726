"""Malformed files, a hundred by hand and more by hypothesis: no traceback, and no valid row is lost."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hostile_files import COLUMNS, HAND_MADE, JSON_FILES, JSON_LINES, TABLES, TEXTS, WORKBOOKS, Hostile, lines, said
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import dataset, make, quarantine_of

from tunery.ingest.formats import delimited, json_values, text
from tunery.ingest.formats import lines as formats_lines
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source
from tunery.store.rows import OPTIONAL_TURN_FIELDS, Row, read_rows

FEW = settings(max_examples=40, derandomize=True, deadline=None)


def read(folder: Path, name: str, **fields: Any) -> tuple[list[Row], list[Quarantined]]:
    """Rows and quarantine, which together are all that was read."""
    bad: list[Quarantined] = []
    tally = ReadCounts()
    rows = list(read_source(dataset(name, **fields), folder, bad.append, tally))
    assert tally.records == len(rows) + len(bad)
    return rows, bad


@pytest.mark.parametrize("file", HAND_MADE, ids=lambda file: file.name)
def test_hostile_file_gives_its_good_rows_and_says_what_is_wrong(file: Hostile, tmp_path: Path) -> None:
    (tmp_path / file.name).write_bytes(file.content)
    rows, bad = read(tmp_path, file.name, **file.fields)
    assert [said(row) for row in rows] == file.good
    assert len(bad) == file.bad, bad
    if bad:
        assert any(reason in bad[0].reason for reason in file.reason.split("|")), bad[0]
        assert all(line.source.split("#")[0] == file.name and line.line >= 1 for line in bad)


def test_folder_of_all_hostile_files_becomes_one_dataset(tmp_path: Path) -> None:
    files = [file for file in HAND_MADE if not file.fields and len(file.content) < 10_000_000]
    assert len(files) >= 100
    (tmp_path / "data").mkdir()
    for file in files:
        (tmp_path / "data" / file.name).write_bytes(file.content)
    result, out = make(tmp_path, "made", dataset("data"))
    expected = sorted((f"data/{file.name}", answer) for file in files for answer in file.good)
    assert sorted((row["source"].split("#")[0], said(row)) for row in read_rows(out)) == expected
    assert (result.facts["rows"], result.facts["quarantined"]) == (len(expected), sum(file.bad for file in files))
    assert len(quarantine_of(out)) == result.facts["quarantined"]


# Sizes: of the pieces that a file is read in, of a record, of what is in memory.


@pytest.mark.parametrize("piece", [3, 7, 64])
def test_pieces_that_a_file_is_read_in_change_nothing(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file for file in JSON_FILES + JSON_LINES + TABLES + TEXTS[:6] if len(file.content) < 5_000]
    for file in files:
        (tmp_path / file.name).write_bytes(file.content)
    before = [read(tmp_path, file.name, **file.fields) for file in files]
    for module in (json_values, formats_lines):
        monkeypatch.setattr(module, "CHUNK", piece)
    assert [read(tmp_path, file.name, **file.fields) for file in files] == before


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", '{"text": "one"}\n', '\n{"text": "two"}'),
        ("a.json", '[\n{"text": "one"},\n', ',\n{"text": "two"}\n]'),
        ("a.csv", "text\none\n", "\ntwo\n"),
        ("a.txt", "one\n", "\ntwo\n"),
    ],
)
def test_record_longer_than_the_longest_is_quarantined_unread(
    name: str, before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (json_values, formats_lines, delimited, text):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    for module in (json_values, formats_lines):
        monkeypatch.setattr(module, "CHUNK", 64)
    (tmp_path / name).write_text(before + '{"text": "' + "x" * 5000 + '"}' + after)
    rows, (bad,) = read(tmp_path, name)
    assert [said(row) for row in rows] == ["one", "two"]
    assert "bytes" in bad.reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    record = '{"text": "%s"}' % ("x" * 4000)
    content = {"json": f"[{','.join([record] * 2000)}]", "csv": "text\n" + f'"{"x" * 4000}"\n' * 2000}
    whole = content.get(name.split(".")[1], f"{record}\n" * 2000).encode()
    (tmp_path / name).write_bytes(gzip.compress(whole, 1) if name.endswith("gz") else whole)
    del content, whole
    tracemalloc.start()
    count = sum(1 for _ in read_source(dataset(name), tmp_path, pytest.fail))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 6 << 20, f"{peak:,} bytes for a file of 8 MB"


# Made by hypothesis.


def read_bytes(name: str, content: bytes, **fields: Any) -> tuple[list[Row], list[Quarantined]]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        return read(Path(folder), name, **fields)


@given(st.binary(max_size=400), st.sampled_from(["", ".gz", ".zst"]))
@FEW
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "xlsx", "parquet", "arrow"])
def test_any_bytes_under_any_name_are_told(ending: str, content: bytes, packing: str) -> None:
    rows, _ = read_bytes(f"a.{ending}{packing}", content)
    assert not rows


@given(st.binary(max_size=400), st.sampled_from(["line", "paragraph", "document"]))
@FEW
def test_any_bytes_as_text_are_rows_or_quarantine(content: bytes, by: str) -> None:
    rows, bad = read_bytes("a.txt", content, sample_by=by)
    assert bool(rows or bad) == bool(content.removeprefix(codecs.BOM_UTF8).strip())


@given(st.data())
@FEW
@pytest.mark.parametrize("file", [WORKBOOKS[2], COLUMNS[13], COLUMNS[14], COLUMNS[15]], ids=lambda file: file.name)
def test_file_with_any_damage_gives_no_row_that_was_not_there(file: Hostile, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(file.content) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=30))
    rows, _ = read_bytes(file.name, file.content[:at] + damage + file.content[at + len(damage) :])
    assert len(rows) <= len(file.good) + 1


ANSWERS = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8)


@given(ANSWERS, st.sampled_from([",", ";", "\t"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
@FEW
def test_whatever_a_table_quotes_comes_back(answers: list[str], delimiter: str, bom: bool, newline: str) -> None:
    answers = [answer.replace("\0", "0").replace("\r", "") or "x" for answer in answers]
    answers = [answer if answer.strip() else "x" for answer in answers]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=newline)
    writer.writerow(["question", "answer"])
    writer.writerows([["q", answer] for answer in answers])
    rows, bad = read_bytes("a.csv", (codecs.BOM_UTF8 if bom else b"") + out.getvalue().encode())
    assert ([said(row) for row in rows], bad) == (answers, [])


BROKEN = ['q,"open', 'q,"open" more', '"q,a', "q,a,b,c", "q", "q,\0"]


@given(st.lists(st.sampled_from([*BROKEN, "good", 'q,"a ""good"" one"']), max_size=20))
@FEW
def test_broken_record_of_a_table_costs_no_other(records: list[str]) -> None:
    written = [f"q,good {index}" if record == "good" else record for index, record in enumerate(records)]
    rows, _ = read_bytes("a.csv", lines("question,answer", *written))
    expected = [
        (number, line[2:].strip('"').replace('""', '"')) for number, line in enumerate(written, 2) if "good" in line
    ]
    assert [(row["line"], said(row)) for row in rows if "good" in said(row) and "\n" not in said(row)] == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "text",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "tools",
    "system",
    "role",
    "content",
    "history",
    "images",
    "functions",
    "reasoning_content",
]
RECORDS = st.dictionaries(
    st.sampled_from(NAMES),
    VALUES
    | st.lists(
        st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", *OPTIONAL_TURN_FIELDS, "thinking", "function_call"]),
            VALUES | st.sampled_from(["user", "assistant", "human", "gpt", "function_call"]),
        )
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "Assistant", "tool", "system"]), "content": VALUES},
            optional=dict.fromkeys([*OPTIONAL_TURN_FIELDS, "thinking", "train", "images", "function_call"], VALUES),
        ),
        max_size=3,
    ),
    max_size=5,
)


@given(st.lists(RECORDS, max_size=6), st.sampled_from([None, 1, 4]))
@FEW
def test_any_records_become_the_same_rows_from_lines_and_from_an_array(records: list[Any], indent: int | None) -> None:
    in_lines, bad = read_bytes("a.jsonl", lines(*(json.dumps(record) for record in records)))
    in_array, bad_there = read_bytes("a.json", json.dumps(records, indent=indent).encode())
    for row in in_lines + in_array:
        del row["source"], row["line"]
    assert in_lines == in_array
    assert [line.reason for line in bad] == [line.reason for line in bad_there]
    assert len(in_lines) + len(bad) == len(records)
    assert sum(table.num_rows for table in as_tables(in_lines, ReadCounts())) == len(in_lines)
