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
from filter_bench import filter_here

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
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.parametrize("mark", ["", "\N{BYTE ORDER MARK}"])
def test_lines_of_a_csv_are_written_as_they_are(end: str, mark: str) -> None:
    write("in.csv", mark + end.join(TICKETS) + end)
    done = filter_here("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP)
    assert read("good.csv") == mark + end.join([*TICKETS[:2], *TICKETS[3:]]) + end
    assert (
        read("bad.csv")
        == mark + end.join([f"{TICKETS[0]};dropped_by;dropped_reason", f"{TICKETS[2]};length 3..5;length is 9"]) + end
    )
    assert (done.kept.rows, done.kept.guarded) == (4, 0)


def test_scores_are_appended_to_short_and_long_lines_of_a_csv_in_their_own_column() -> None:
    write("in.csv", f"text,n\n{words(3)}\n{words(4)},1,,\n{words(5)},2\n")
    filter_here("in.csv", out="good.csv", keep=KEEP, scores=True)
    assert read("good.csv") == f"text,n,length\n{words(3)},,3.0\n{words(4)},1,4.0\n{words(5)},2,5.0\n"


def test_a_tsv_stays_a_tsv_with_quotes_that_are_characters() -> None:
    text = f'text\tn\n"{words(3)}" he said\t1\n{words(4)}\t2\n'
    write("in.tsv", text)
    filter_here("in.tsv", out="good.tsv", keep=("length 1..9",), scores=True)
    assert read("good.tsv").splitlines()[1] == f'"{words(3)}" he said\t1\t5.0'
    filter_here("in.tsv", out="good.jsonl", keep=("length 1..9",))
    assert json_lines("good.jsonl")[0] == {"text": f'"{words(3)}" he said', "n": "1"}


def test_lines_of_json_are_written_byte_for_byte() -> None:
    lines = [CHAT % (n, n, words(n)) for n in range(1, 9)]
    write("in.jsonl", "\n".join(lines) + "\n\n")
    filter_here("in.jsonl", out="good.jsonl", dropped="bad.jsonl", keep=KEEP)
    assert read("good.jsonl") == "\n".join(lines[2:5]) + "\n"
    dropped = read("bad.jsonl").splitlines()
    assert dropped[0] == lines[0][:-1] + ', "dropped_by": "length 3..5", "dropped_reason": "length is 1"}'
    assert len(dropped) == 5


def test_scores_are_appended_to_json_under_a_name_that_is_free() -> None:
    row = {"text": words(4), "length": "long", "length_score": None}
    write("in.jsonl", json.dumps(row) + "\n")
    done = filter_here("in.jsonl", out="good.jsonl", keep=KEEP, scores=True)
    assert done.added.scores == {"length": "length_score_2"}
    assert list(json_lines("good.jsonl")[0].items()) == [*row.items(), ("length_score_2", 4.0)]


def test_a_json_array_keeps_the_text_of_its_elements() -> None:
    elements = [f'{{\n    "text": "{words(n)}",\n    "n": [\n      {n}.50\n    ]\n  }}' for n in range(1, 7)]
    write("in.json", "[\n  " + ",\n  ".join(elements) + "\n]\n")
    filter_here("in.json", out="good.json", keep=KEEP)
    assert read("good.json") == "[\n  " + ",\n  ".join(elements[2:5]) + "\n]\n"
    filter_here("in.json", out="good.jsonl", keep=KEEP)
    assert read("good.jsonl").splitlines()[0] == f'{{ "text": "{words(3)}", "n": [ 3.50 ] }}'
    filter_here("in.json", out="bad/good.json", dropped="bad/bad.json", keep=KEEP, scores=True)
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


def test_a_workbook_keeps_its_sheets_columns_types_and_number_formats() -> None:
    done = filter_here(workbook("in.xlsx"), out="good.xlsx", dropped="bad.xlsx", keep=KEEP, scores=True)
    assert (done.kept.rows, done.dropped.rows if done.dropped else 0) == (6, 4)
    header, *rows = sheet_rows("good.xlsx", "Tickets")
    assert header == ("ticket", "instruction", "input", "output", "rating", "created", "done", None, 7, "length")
    # The middle of January 3rd, and what begins like a formula is a text still.
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
    filter_here("in.parquet", out="good.parquet", dropped="bad.parquet", keep=KEEP)
    assert pq.read_table("good.parquet").equals(table.slice(2, 3), check_metadata=True)
    dropped = pq.read_table("bad.parquet")
    assert dropped.drop_columns(["dropped_by", "dropped_reason"]).equals(table.take([0, 1, 5]))
    assert dropped.schema.metadata == {b"origin": b"here"}, "Hugging Face's would be wrong: it names all columns"
    filter_here("in.parquet", out="good.jsonl", keep=KEEP)
    assert json_lines("good.jsonl")[0] == {
        "prompt": "Question 3",
        "completion": words(3),
        "meta": {"tags": ["a", None], "n": 3, "at": "2026-01-01"},
        "rating": 1.5,
        "kind": "x",
        "raw": "/wA=",
    }


def test_an_arrow_file_is_written_as_parquet_with_its_schema() -> None:
    table = nested("in.parquet").combine_chunks()
    with pa.ipc.new_file("in.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=4)
    filter_here("in.arrow", out="good.parquet", keep=KEEP, scores=True)
    good = pq.read_table("good.parquet")
    assert good.column("length").to_pylist() == [3, 4, 5]
    assert good.drop_columns(["length"]).equals(table.slice(2, 3))


@pytest.mark.parametrize("ending", WRITERS)
def test_files_of_every_format_go_into_one_with_the_columns_of_all(ending: str) -> None:
    write("a.csv", "\n".join(TICKETS) + "\n")
    write("b.jsonl", (CHAT % (1, 1, words(4))) + "\n{broken\n")
    write("c.json", json.dumps([{"text": words(3), "empty": {}, "mixed": 1}, {"text": words(4), "mixed": "x"}]))
    nested("d.parquet")
    write("e.txt", f"{words(4)}\n{words(7)}\n")
    with gzip.open("f.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": words(5)}) + "\n")
    names = ["a.csv", "b.jsonl", "c.json", "d.parquet", "e.txt", "f.jsonl.gz", workbook("g.xlsx")]
    done = filter_here(*names, out=f"good{ending}", dropped=f"bad{ending}", keep=KEEP, scores=True)
    assert (done.kept.rows, done.dropped.rows if done.dropped else 0) == (18, 10)
    good, bad = (rows_of(f"{name}{ending}") for name in ("good", "bad"))
    assert (len(good), len(bad)) == (18, 10)
    assert [str(row["length"]) for row in good[:4]] == [
        str(float(n)) if ending != ".xlsx" else str(n) for n in (4, 4, 3, 5)
    ]
    assert good[0]["ticket"] == "007"
    reasons = [row["dropped_by"] for row in bad]
    assert reasons.count("quarantined") == 2
    assert [row.get("raw_record") for row in bad].count("{broken") == 1
    # Columns of a row's own, and of all rows where the format has one header.
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


def test_csv_files_with_other_columns_are_put_together_by_name() -> None:
    write("a.csv", f"text,n\n{words(3)},1\n")
    write("b.csv", f"n,text,more\n2,=cmd() {words(3)},x\n")
    done = filter_here("a.csv", "b.csv", out="good.csv", keep=KEEP)
    assert read("good.csv") == f"text,n,more\n{words(3)},1,\n=cmd() {words(3)},2,x\n"
    assert done.kept.guarded == 0, "what is text in a CSV was like that before"


def test_texts_of_other_formats_are_no_formulas_in_a_csv() -> None:
    write("in.jsonl", json.dumps({"text": f"=1+1 {words(3)}", "n": -5, "d": "-"}) + "\n")
    done = filter_here("in.jsonl", out="good.csv", keep=KEEP)
    assert read("good.csv") == f"\N{BYTE ORDER MARK}text,n,d\n'=1+1 {words(3)},-5,'-\n"
    assert done.kept.guarded == 2


def test_unreadable_rows_are_dropped_with_their_text_and_the_reason() -> None:
    lines = ["text,n", f"{words(3)},1", '"open,2', "a,b,c,d", " ,3", f"{words(4)},4"]
    write("in.csv", ("\n".join(lines) + "\n").encode() + b"\xe4,5\n")
    done = filter_here("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP)
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
    assert done.dropped is not None
    assert done.dropped.rows == 4


def test_rows_that_are_there_twice_are_decided_each() -> None:
    write("in.csv", f"text,n\n{words(3)},1\n{words(3)},2\n{words(4)},3\n{words(3)},4\n")
    filter_here("in.csv", out="good.csv", dropped="bad.csv", keep=("duplicates <= 0",))
    assert read("good.csv") == f"text,n\n{words(3)},1\n{words(4)},3\n"
    assert [row[1] for row in csv.reader(read("bad.csv").splitlines()[1:])] == ["2", "4"]


def test_a_damaged_file_gives_what_can_be_read_and_the_rest_is_dropped_with_the_reason() -> None:
    write("in.jsonl.gz", gzip.compress("".join(f'{{"text": "{words(3)} {n}"}}\n' for n in range(5000)).encode())[:-400])
    nested("in.parquet")
    data = bytearray(Path("in.parquet").read_bytes())
    data[4:40] = b"\x00" * 36  # within the first row group
    write("in.parquet", bytes(data))
    done = filter_here("in.jsonl.gz", "in.parquet", out="good.jsonl", dropped="bad.jsonl", keep=("length 1..9",))
    reasons = [row["dropped_reason"] for row in json_lines("bad.jsonl")]
    assert "damaged" in reasons[0]
    assert "rows 1 to 2 can't be read" in reasons[1]
    assert done.kept.rows == len(json_lines("good.jsonl")) > 4


def test_a_limit_ends_both_files_at_the_same_row() -> None:
    write("in.csv", "text\n" + "".join(f"{words(n)}\n" for n in range(1, 9)))
    done = filter_here("in.csv", out="good.csv", dropped="bad.csv", keep=KEEP, limit=4)
    assert (done.kept.rows, done.dropped.rows if done.dropped else 0) == (2, 2)


def test_of_any_rule_the_reason_names_all_scores() -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    filter_here("in.csv", out="g.csv", dropped="b.jsonl", keep=("length ..3", "gopher <= 0"), any_rule=True)
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
def test_a_source_that_changed_while_it_was_filtered_is_an_error_and_no_file_is_written(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    monkeypatch.setattr(outputs, "find_columns", _changing(outputs.find_columns, text))
    with pytest.raises(TuneryError, match=message) as caught:
        filter_here("in.csv", out="out/good.csv", dropped="out/bad.csv", keep=KEEP)
    assert "give the same command again" in caught.value.remedy
    assert [path.name for path in Path("out").iterdir()] == ["good.yaml"]


def test_records_without_a_verdict_and_verdicts_without_a_record_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n{words(4)}\n")
    whole = outputs.originals
    for change in (lambda found: found[:-1], lambda found: [found[0], *found], lambda found: found[::-1]):
        monkeypatch.setattr(outputs, "originals", lambda *words, change=change: iter(change(list(whole(*words)))))
        with pytest.raises(TuneryError, match=r"differ|nothing was decided about `in.csv"):
            filter_here("in.csv", out="out/good.csv", dropped="out/bad.csv", keep=KEEP)
        assert [path.name for path in Path("out").iterdir()] == ["good.yaml"]


def _changing(find: Any, text: str | None) -> Any:
    def find_and_change(*words: Any, **more: Any) -> Any:
        found = find(*words, **more)
        if text is None:
            Path("in.csv").unlink()
        else:
            write("in.csv", text)
        return found

    return find_and_change


def test_a_workbook_that_can_not_hold_a_row_is_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.jsonl", json.dumps({"text": words(3), "long": "a" * 32_768}) + "\n" + json.dumps({"text": "b"}) + "\n")
    Path("good.xlsx").write_text("an earlier one")
    with pytest.raises(RequestError, match="32,768 characters") as caught:
        filter_here("in.jsonl", out="good.xlsx", dropped="bad.csv", keep=KEEP)
    assert ".parquet" in caught.value.remedy
    monkeypatch.setattr(excel_writer, "SHEET_ROWS", 1)
    write("in.jsonl", json.dumps({"text": words(3)}) + "\n" + json.dumps({"text": words(4)}) + "\n")
    with pytest.raises(RequestError, match="rows don't fit"):
        filter_here("in.jsonl", out="good.xlsx", dropped="bad.csv", keep=KEEP)
    assert Path("good.xlsx").read_text() == "an earlier one"
    assert sorted(path.name for path in Path().glob("*.*")) == ["good.xlsx", "good.yaml", "in.jsonl"]
    assert not list(Path().glob(".*"))


def test_a_path_that_can_not_be_written_is_an_error_with_a_remedy() -> None:
    write("in.csv", f"text\n{words(3)}\n{words(8)}\n")
    write("file", "")
    with pytest.raises(TuneryError, match="can't be written") as caught:
        filter_here("in.csv", out="good.csv", dropped="file/bad.csv", keep=KEEP)
    assert caught.value.remedy.startswith("make room")
    assert not Path("good.csv").exists()


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.json", "in.xlsx", "in.parquet", "in.txt"])
def test_originals_are_the_readers_records(name: str) -> None:
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


def test_nothing_passes_in_the_words_of_the_command_line() -> None:
    Path("sub").mkdir()
    write("in.csv", "text\nword\n")
    with pytest.raises(TuneryError) as caught:
        filter_here("in.csv", out="sub/good.csv", keep=KEEP)
    assert not isinstance(caught.value, StageError)
    assert caught.value.cause == "`length 3..5` dropped 1"
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("ending", [".jsonl", ".xlsx", ".parquet"])
def test_where_nothing_passes_the_dropped_file_has_every_record_and_its_reason(ending: str) -> None:
    write("in.jsonl", f'{{"text": "word"}}\n{{broken\n{{"text": "{words(9)}"}}\n')
    with pytest.raises(TuneryError, match="no row of 2 passes") as caught:
        filter_here("in.jsonl", out=f"good{ending}", dropped=f"bad{ending}", keep=KEEP, scores=True)
    assert caught.value.exit_code == 1
    assert caught.value.remedy.endswith(f"why each row was dropped is in bad{ending}")
    rows = rows_of(f"bad{ending}")
    assert [(row["dropped_by"], row["dropped_reason"].split(":")[0]) for row in rows] == [
        ("length 3..5", "length is 1"),
        ("quarantined", "not JSON"),
        ("length 3..5", "length is 9"),
    ]
    assert not Path(f"good{ending}").exists()


def test_where_nothing_passes_an_earlier_output_stays_and_rules_without_a_score_have_a_reason() -> None:
    write("in.csv", f"text\n=1 {words(9)}\n")
    write("good.csv", "an earlier one")
    with pytest.raises(TuneryError, match="no row of 1 passes"):
        filter_here("in.csv", out="good.csv", dropped="bad.jsonl", keep=("random >= 2",))
    assert json_lines("bad.jsonl")[0]["dropped_reason"] == "not among the random rows"
    assert read("good.csv") == "an earlier one"


def test_rows_of_a_hub_dataset_keep_their_types(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("data").mkdir()
    nested("data/train.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    # A folder in the place of a hub dataset, which needs a network to say what commit it is at.
    monkeypatch.setattr(HubDataset, "identity", lambda self: None)
    stage = Dataset.model_validate({"kind": "dataset", "source": "hub:org/name"})
    records = list(originals_of(HubDataset(f"hub:{tmp_path / 'data'}", None, None, None), stage))
    assert [record.line for record in records] == list(range(1, 7))
    assert records[1].values()["meta"] == {"tags": ["a", None], "n": 2, "at": dt.datetime(2026, 1, 1)}
    assert records[1].values()["rating"] == 1.0
