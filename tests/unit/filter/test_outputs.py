"""Output files of `tunery filter`: the original records in every format, and the outcome of each record."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filter_runs import run_filter_in_process

from tunery.errors import RequestError, StageError, TuneryError
from tunery.filter import outputs
from tunery.filter.originals import originals, originals_of
from tunery.filter.writers import WRITERS, excel_writer
from tunery.ingest.formats.hub import HubDataset
from tunery.spec import Dataset

KEEP = ("length 3..5",)
CHAT = (
    '{"id": %d, "messages": [{"role":"user","content":"Question %d, \\u00e4?"},{"role":"assistant","content":"%s"}],'
    '  "meta": {"b": 1.50, "a": [1e2, null]}, "big": 12345678901234567890}'
)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(count: int) -> str:
    return " ".join(["word"] * count)


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


def read(name: str) -> str:
    return Path(name).read_bytes().decode()


def json_lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read(name).splitlines()]


def sheet_rows(name: str, sheet: str | None = None) -> list[tuple[Any, ...]]:
    book = openpyxl.load_workbook(name)
    return list((book[sheet] if sheet else book.active).iter_rows(values_only=True))


TICKETS = [
    'ticket;"question";answer; category ;rating;created',
    f'007;Why?;"{words(4)}";bug;1.50;2026-01-02',
    f"8;Why not?;{words(9)};ask;2;x",
    f'9;"a ""quoted""; question";=1+1 {words(3)};bug;;',
    f"10;short line;{words(3)}",
    f'11;"two\r\nlines";{words(5)};ask;1e3;-',
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\N{BYTE ORDER MARK}"])
def test_csv_lines_are_written_unchanged(end: str, bom: str) -> None:
    write("in.csv", bom + end.join(TICKETS) + end)
    result = run_filter_in_process("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP)
    assert read("good.csv") == bom + end.join([*TICKETS[:2], *TICKETS[3:]]) + end
    assert (
        read("bad.csv")
        == bom + end.join([f"{TICKETS[0]};dropped_by;dropped_reason", f"{TICKETS[2]};length 3..5;length is 9"]) + end
    )
    assert (result.kept.rows, result.kept.escaped) == (4, 0)


def test_scores_are_appended_to_short_and_long_csv_lines_in_their_column() -> None:
    write("in.csv", f"text,n\n{words(3)}\n{words(4)},1,,\n{words(5)},2\n")
    run_filter_in_process("in.csv", out="good.csv", keep=KEEP, scores=True)
    assert read("good.csv") == f"text,n,length\n{words(3)},,3.0\n{words(4)},1,4.0\n{words(5)},2,5.0\n"


def test_tsv_keeps_literal_quotes() -> None:
    text = f'text\tn\n"{words(3)}" he said\t1\n{words(4)}\t2\n'
    write("in.tsv", text)
    run_filter_in_process("in.tsv", out="good.tsv", keep=("length 1..9",), scores=True)
    assert read("good.tsv").splitlines()[1] == f'"{words(3)}" he said\t1\t5.0'
    run_filter_in_process("in.tsv", out="good.jsonl", keep=("length 1..9",))
    assert json_lines("good.jsonl")[0] == {"text": f'"{words(3)}" he said', "n": "1"}


def test_json_lines_are_written_unchanged() -> None:
    lines = [CHAT % (n, n, words(n)) for n in range(1, 9)]
    write("in.jsonl", "\n".join(lines) + "\n\n")
    run_filter_in_process("in.jsonl", out="good.jsonl", dropped="bad.jsonl", keep=KEEP)
    assert read("good.jsonl") == "\n".join(lines[2:5]) + "\n"
    dropped = read("bad.jsonl").splitlines()
    assert dropped[0] == lines[0][:-1] + ', "dropped_by": "length 3..5", "dropped_reason": "length is 1"}'
    assert len(dropped) == 5


def test_scores_are_added_to_json_under_an_unused_name() -> None:
    row = {"text": words(4), "length": "long", "length_score": None}
    write("in.jsonl", json.dumps(row) + "\n")
    result = run_filter_in_process("in.jsonl", out="good.jsonl", keep=KEEP, scores=True)
    assert result.added.scores == {"length": "length_score_2"}
    assert list(json_lines("good.jsonl")[0].items()) == [*row.items(), ("length_score_2", 4.0)]


def test_json_array_keeps_the_text_of_its_elements() -> None:
    elements = [f'{{\n    "text": "{words(n)}",\n    "n": [\n      {n}.50\n    ]\n  }}' for n in range(1, 7)]
    write("in.json", "[\n  " + ",\n  ".join(elements) + "\n]\n")
    run_filter_in_process("in.json", out="good.json", keep=KEEP)
    assert read("good.json") == "[\n  " + ",\n  ".join(elements[2:5]) + "\n]\n"
    run_filter_in_process("in.json", out="good.jsonl", keep=KEEP)
    assert read("good.jsonl").splitlines()[0] == f'{{ "text": "{words(3)}", "n": [ 3.50 ] }}'
    run_filter_in_process("in.json", out="bad/good.json", dropped="bad/bad.json", keep=KEEP, scores=True)
    assert [row["length"] for row in json.loads(read("bad/bad.json"))] == [1, 2, 6]


def workbook(name: str) -> str:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Tickets"
    sheet.append(["ticket", "instruction", "input", "output", "rating", "created", "done", None, 7])
    for n in range(1, 7):
        created = dt.datetime(2026, 1, n, 12 * (n % 2))
        sheet.append([n, f"=Question {n}", "in", words(n), n / 4, created, n % 2 == 0, "note", n])
        sheet.cell(n + 1, 2).data_type = "s"
        sheet.cell(n + 1, 5).number_format = "0.0%"
    sheet.append([None])
    sheet.append([8, "merged over two rows", None, words(4)])
    sheet.append([9, None, None, words(5)])
    sheet.merge_cells("B9:B10")
    more = book.create_sheet("More")
    more.append(["prompt", "completion", "n"])
    more.append(["Why?", words(3), 3])
    more.append(["Why?", "word", "#N/A"])
    more["C3"].data_type = "e"
    book.save(name)
    return name


def test_workbook_keeps_its_sheets_columns_types_and_number_formats() -> None:
    result = run_filter_in_process(workbook("in.xlsx"), out="good.xlsx", dropped="bad.xlsx", keep=KEEP, scores=True)
    assert (result.kept.rows, result.dropped.rows if result.dropped else 0) == (6, 4)
    header, *rows = sheet_rows("good.xlsx", "Tickets")
    assert header == ("ticket", "instruction", "input", "output", "rating", "created", "done", None, 7, "length")
    # Noon of January 3rd; text that starts like a formula remains text.
    expected = (3, "=Question 3", "in", words(3), 0.75, dt.datetime(2026, 1, 3, 12), False, "note", 3, 3)
    assert rows[0] == expected
    assert [row[1] for row in rows[3:]] == ["merged over two rows"] * 2
    book = openpyxl.load_workbook("good.xlsx")
    assert book.sheetnames == ["Tickets", "More"]
    cells = book["Tickets"][2]
    assert [cells[index].data_type for index in (0, 1, 4, 5, 6)] == ["n", "s", "n", "d", "b"]
    assert cells[4].number_format == "0.0%"
    assert sheet_rows("good.xlsx", "More")[1:] == [("Why?", words(3), 3, 3)]
    (bad,) = sheet_rows("bad.xlsx", "More")[1:]
    assert bad == ("Why?", "word", "#N/A", None, "quarantined", "the error #N/A in C3")


def nested(name: str, count: int = 6, **more: Any) -> pa.Table:
    table = pa.table(
        {
            "prompt": [f"Question {n}" for n in range(1, count + 1)],
            "completion": pa.array([words(n) for n in range(1, count + 1)], pa.large_string()),
            "meta": [{"tags": ["a", None], "n": n, "at": dt.datetime(2026, 1, 1)} for n in range(1, count + 1)],
            "rating": pa.array([n / 2 for n in range(1, count + 1)], pa.float32()),
            "kind": pa.array(["x"] * count).dictionary_encode(),
            "raw": pa.array([b"\xff\x00"] * count),
            **more,
        }
    ).replace_schema_metadata({"huggingface": "{}", "origin": "here"})
    pq.write_table(table, name, row_group_size=2)
    return pq.read_table(name)


def test_parquet_keeps_schema_nested_values_and_metadata() -> None:
    table = nested("in.parquet")
    run_filter_in_process("in.parquet", out="good.parquet", dropped="bad.parquet", keep=KEEP)
    assert pq.read_table("good.parquet").equals(table.slice(2, 3), check_metadata=True)
    dropped = pq.read_table("bad.parquet")
    assert dropped.drop_columns(["dropped_by", "dropped_reason"]).equals(table.take([0, 1, 5]))
    assert dropped.schema.metadata == {b"origin": b"here"}, "Hugging Face's would be wrong: it names all columns"
    run_filter_in_process("in.parquet", out="good.jsonl", keep=KEEP)
    assert json_lines("good.jsonl")[0] == {
        "prompt": "Question 3",
        "completion": words(3),
        "meta": {"tags": ["a", None], "n": 3, "at": "2026-01-01"},
        "rating": 1.5,
        "kind": "x",
        "raw": "/wA=",
    }


def test_arrow_file_is_written_as_parquet_with_its_schema() -> None:
    table = nested("in.parquet").combine_chunks()
    with pa.ipc.new_file("in.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    run_filter_in_process("in.arrow", out="good.parquet", keep=KEEP, scores=True)
    good = pq.read_table("good.parquet")
    assert good.column("length").to_pylist() == [3, 4, 5]
    assert good.drop_columns(["length"]).equals(table.slice(2, 3))


@pytest.mark.parametrize("ending", WRITERS)
def test_files_of_all_formats_are_written_to_one_file_with_all_columns(ending: str) -> None:
    write("a.csv", "\n".join(TICKETS) + "\n")
    write("b.jsonl", (CHAT % (1, 1, words(4))) + "\n{broken\n")
    write("c.json", json.dumps([{"text": words(3), "empty": {}, "mixed": 1}, {"text": words(4), "mixed": "x"}]))
    nested("d.parquet")
    write("e.txt", f"{words(4)}\n{words(7)}\n")
    with gzip.open("f.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": words(5)}) + "\n")
    names = ["a.csv", "b.jsonl", "c.json", "d.parquet", "e.txt", "f.jsonl.gz", workbook("g.xlsx")]
    result = run_filter_in_process(*names, out=f"good{ending}", dropped=f"bad{ending}", keep=KEEP, scores=True)
    assert (result.kept.rows, result.dropped.rows if result.dropped else 0) == (18, 10)
    good, bad = (rows_of(f"{name}{ending}") for name in ("good", "bad"))
    assert (len(good), len(bad)) == (18, 10)
    assert [str(row["length"]) for row in good[:4]] == [
        str(float(n)) if ending != ".xlsx" else str(n) for n in (4, 4, 3, 5)
    ]
    assert good[0]["ticket"] == "007"
    reasons = [row["dropped_by"] for row in bad]
    assert reasons.count("quarantined") == 2
    assert [row.get("raw_record") for row in bad].count("{broken") == 1
    # JSON records have their own columns; formats with a header have the columns of all rows.
    assert ending in (".jsonl", ".ndjson", ".json") or {"ticket", "messages", "meta", "instruction"} <= good[0].keys()


def rows_of(name: str) -> list[dict[str, Any]]:
    if name.endswith(".parquet"):
        return list(pq.read_table(name).to_pylist())
    if name.endswith(".json"):
        return list(json.loads(read(name)))
    if name.endswith((".jsonl", ".ndjson")):
        return json_lines(name)
    if name.endswith(".xlsx"):
        header, *rows = sheet_rows(name)
        return [dict(zip(header, row, strict=True)) for row in rows]
    delimiter = ";" if name.endswith(".csv") else "\t"
    return list(csv.DictReader(Path(name).open(encoding="utf-8-sig", newline=""), delimiter=delimiter))


def test_csv_files_with_different_columns_are_merged_by_name() -> None:
    write("a.csv", f"text,n\n{words(3)},1\n")
    write("b.csv", f"n,text,more\n2,=cmd() {words(3)},x\n")
    result = run_filter_in_process("a.csv", "b.csv", out="good.csv", keep=KEEP)
    assert read("good.csv") == f"text,n,more\n{words(3)},1,\n=cmd() {words(3)},2,x\n"
    assert result.kept.escaped == 0, "text from a CSV is not escaped"


def test_formula_like_texts_of_other_formats_are_escaped_in_a_csv() -> None:
    write("in.jsonl", json.dumps({"text": f"=1+1 {words(3)}", "n": -5, "d": "-"}) + "\n")
    result = run_filter_in_process("in.jsonl", out="good.csv", keep=KEEP)
    assert read("good.csv") == f"\N{BYTE ORDER MARK}text,n,d\n'=1+1 {words(3)},-5,'-\n"
    assert result.kept.escaped == 2


def test_unreadable_rows_are_dropped_with_their_text_and_the_reason() -> None:
    lines = ["text,n", f"{words(3)},1", '"open,2', "a,b,c,d", " ,3", f"{words(4)},4"]
    write("in.csv", ("\n".join(lines) + "\n").encode() + b"\xe4,5\n")
    result = run_filter_in_process("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP)
    assert read("good.csv") == "\n".join([lines[0], lines[1], lines[5]]) + "\n"
    header, *rows = csv.reader(read("bad.csv").splitlines())
    assert header == ["text", "n", "dropped_by", "dropped_reason", "raw_record"]
    assert [(row[1], row[2], row[4]) for row in rows] == [
        ("", "quarantined", '"open,2'),
        ("", "quarantined", "a,b,c,d"),
        ("3", "quarantined", ""),
        ("", "quarantined", "\\xe4,5"),
    ]
    assert ["not closed" in rows[0][3], "4 cells" in rows[1][3], rows[2][3], "not UTF-8" in rows[3][3]] == [
        True,
        True,
        "text is empty",
        True,
    ]
    assert result.dropped is not None
    assert result.dropped.rows == 4


def test_duplicate_rows_are_decided_separately() -> None:
    write("in.csv", f"text,n\n{words(3)},1\n{words(3)},2\n{words(4)},3\n{words(3)},4\n")
    run_filter_in_process("in.csv", out="good.csv", dropped="bad.csv", keep=("duplicates <= 0",))
    assert read("good.csv") == f"text,n\n{words(3)},1\n{words(4)},3\n"
    assert [row[1] for row in csv.reader(read("bad.csv").splitlines()[1:])] == ["2", "4"]


def test_corrupt_file_gives_its_readable_rows_and_the_rest_is_dropped_with_the_reason() -> None:
    write("in.jsonl.gz", gzip.compress("".join(f'{{"text": "{words(3)} {n}"}}\n' for n in range(5000)).encode())[:-400])
    nested("in.parquet")
    data = bytearray(Path("in.parquet").read_bytes())
    data[4:40] = b"\x00" * 36  # within the first row group
    write("in.parquet", bytes(data))
    result = run_filter_in_process(
        "in.jsonl.gz", "in.parquet", out="good.jsonl", dropped="bad.jsonl", keep=("length 1..9",)
    )
    reasons = [row["dropped_reason"] for row in json_lines("bad.jsonl")]
    assert "corrupt" in reasons[0]
    assert "rows 1 to 2 can't be read" in reasons[1]
    assert result.kept.rows == len(json_lines("good.jsonl")) > 4


def test_limit_applies_to_both_files() -> None:
    write("in.csv", "text\n" + "".join(f"{words(n)}\n" for n in range(1, 9)))
    result = run_filter_in_process("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP, limit=4)
    assert (result.kept.rows, result.dropped.rows if result.dropped else 0) == (2, 2)


def test_reason_lists_all_scores_with_any() -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    run_filter_in_process("in.csv", out="g.csv", dropped="b.jsonl", keep=("length ..3", "gopher <= 0"), any_rule=True)
    (row,) = json_lines("b.jsonl")
    assert row["dropped_by"] == "length ..3 and gopher <= 0"
    assert row["dropped_reason"].startswith("length is 8; gopher is ")
    assert "words_min" in row["dropped_reason"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"text\n{words(5)}\n{words(8)}\n", "changed while"),
        (f"text\n{words(5)}\n", "changed while"),
        (None, "there is no file `in.csv`"),
    ],
)
def test_source_that_changed_during_the_run_is_an_error_and_no_file_is_written(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    monkeypatch.setattr(outputs, "find_columns", _changing(outputs.find_columns, text))
    with pytest.raises(TuneryError, match=message) as caught:
        run_filter_in_process("in.csv", out="out/good.csv", dropped="out/bad.csv", keep=KEEP)
    assert "run the same command again" in caught.value.remedy
    assert [path.name for path in Path("out").iterdir()] == ["good.yaml"]


def test_mismatch_of_records_and_decisions_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n{words(4)}\n")
    all_originals = outputs.originals
    for change in (lambda items: items[:-1], lambda items: [items[0], *items], lambda items: items[::-1]):
        monkeypatch.setattr(
            outputs, "originals", lambda *words, change=change: iter(change(list(all_originals(*words))))
        )
        with pytest.raises(TuneryError, match=r"differ|there is no decision about `in.csv"):
            run_filter_in_process("in.csv", out="out/good.csv", dropped="out/bad.csv", keep=KEEP)
        assert [path.name for path in Path("out").iterdir()] == ["good.yaml"]


def _changing(find_columns: Any, text: str | None) -> Any:
    def find_and_change(*args: Any, **kwargs: Any) -> Any:
        columns = find_columns(*args, **kwargs)
        if text is None:
            Path("in.csv").unlink()
        else:
            write("in.csv", text)
        return columns

    return find_and_change


def test_row_that_does_not_fit_into_a_workbook_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("in.jsonl", json.dumps({"text": words(3), "long": "a" * 32_768}) + "\n" + json.dumps({"text": "b"}) + "\n")
    Path("good.xlsx").write_text("an earlier output")
    with pytest.raises(RequestError, match="32,768 characters") as caught:
        run_filter_in_process("in.jsonl", out="good.xlsx", dropped="bad.csv", keep=KEEP)
    assert ".parquet" in caught.value.remedy
    monkeypatch.setattr(excel_writer, "MAX_SHEET_ROWS", 1)
    write("in.jsonl", json.dumps({"text": words(3)}) + "\n" + json.dumps({"text": words(4)}) + "\n")
    with pytest.raises(RequestError, match="rows don't fit"):
        run_filter_in_process("in.jsonl", out="good.xlsx", dropped="bad.csv", keep=KEEP)
    assert Path("good.xlsx").read_text() == "an earlier output"
    assert sorted(path.name for path in Path().glob("*.*")) == ["good.xlsx", "good.yaml", "in.jsonl"]
    assert not list(Path().glob(".*"))


def test_unwritable_output_is_an_error_with_a_remedy() -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    write("file", "")
    with pytest.raises(TuneryError, match="can't be written") as caught:
        run_filter_in_process("in.csv", out="good.csv", dropped="file/bad.csv", keep=KEEP)
    assert caught.value.remedy.startswith("free some space")
    assert not Path("good.csv").exists()


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.json", "in.xlsx", "in.parquet", "in.txt"])
def test_originals_match_the_records_of_the_reader(name: str) -> None:
    if name == "in.xlsx":
        workbook(name)
    elif name == "in.parquet":
        nested(name)
    else:
        write(
            name,
            {"in.csv": "\n".join(TICKETS), "in.json": '[{"a": 1}, 2]', "in.txt": "a\n\nb"}.get(name, '{"a": 1}\n['),
        )
    from tunery.ingest.filesystem import local_file
    from tunery.ingest.read import records_of

    stage = Dataset.model_validate({"kind": "dataset", "source": name})
    file = local_file(Path.cwd() / name, Path.cwd())
    records = [(f"{name}#{record.part}" if record.part else name, record.line) for record in records_of(file, stage)]
    assert [(item.table.name, item.line) for item in originals(stage, Path.cwd())] == records


def test_error_without_passing_rows_uses_the_rules_of_the_command_line() -> None:
    Path("sub").mkdir()
    write("in.csv", "text\nword\n")
    with pytest.raises(TuneryError) as caught:
        run_filter_in_process("in.csv", out="sub/good.csv", keep=KEEP)
    assert not isinstance(caught.value, StageError)
    assert caught.value.cause == "`length 3..5` dropped 1"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("ending", [".jsonl", ".xlsx", ".parquet"])
def test_dropped_file_has_all_records_and_reasons_if_no_row_passes(ending: str) -> None:
    write("in.jsonl", f'{{"text": "word"}}\n{{broken\n{{"text": "{words(9)}"}}\n')
    with pytest.raises(TuneryError, match="no row of 2 passes") as caught:
        run_filter_in_process("in.jsonl", out=f"good{ending}", dropped=f"bad{ending}", keep=KEEP, scores=True)
    assert caught.value.exit_code == 1
    assert caught.value.remedy.endswith(f"bad{ending} has the reason for each row")
    rows = rows_of(f"bad{ending}")
    assert [(row["dropped_by"], row["dropped_reason"].split(":")[0]) for row in rows] == [
        ("length 3..5", "length is 1"),
        ("quarantined", "not JSON"),
        ("length 3..5", "length is 9"),
    ]
    assert not Path(f"good{ending}").exists()


def test_earlier_output_is_kept_if_no_row_passes() -> None:
    write("in.csv", f"text\n=1 {words(9)}\n")
    write("good.csv", "an earlier output")
    with pytest.raises(TuneryError, match="no row of 1 passes"):
        run_filter_in_process("in.csv", out="good.csv", dropped="bad.jsonl", keep=("random >= 2",))
    assert json_lines("bad.jsonl")[0]["dropped_reason"] == "not among the random rows"
    assert read("good.csv") == "an earlier output"


def test_rows_of_a_hub_dataset_keep_their_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("data").mkdir()
    nested("data/train.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    # A folder instead of a hub dataset, whose commit can only be read with a network.
    monkeypatch.setattr(HubDataset, "identity", lambda self: None)
    stage = Dataset.model_validate({"kind": "dataset", "source": "hub:org/name"})
    records = list(originals_of(HubDataset(f"hub:{tmp_path / 'data'}", None, None, None), stage))
    assert [record.line for record in records] == list(range(1, 7))
    assert records[1].values()["meta"] == {"tags": ["a", None], "n": 2, "at": dt.datetime(2026, 1, 1)}
    assert records[1].values()["rating"] == 1.0
