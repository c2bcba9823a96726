"""Reading rows of all formats: no valid row is lost among invalid ones."""

from __future__ import annotations

import codecs
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import content, dataset, make, quarantine_of, read

from tunery.errors import StageError
from tunery.ingest.read import MAX_PROBED_RECORDS, check_source, first_shape, read_source
from tunery.ingest.sources import BUILTIN, BadSource, find_parts, source_identity
from tunery.store.rows import SHARD, Row, read_rows, row_format, row_id, shards

REAL = Path(__file__).parents[4] / "shared" / "data"


def conversation(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


SHAPES: list[tuple[dict[str, Any], Row, str]] = [
    ({"text": "a b"}, {"text": "a b"}, "text"),
    ({"messages": conversation("q", "a")}, {"messages": conversation("q", "a")}, "conversation"),
    ({"messages": conversation("q", "a", "r")}, {"messages": conversation("q", "a", "r")}, "prompt"),
    ({"prompt": "q", "completion": "a"}, {"messages": conversation("q", "a")}, "conversation"),
    ({"prompt": "q", "response": "a"}, {"messages": conversation("q", "a")}, "conversation"),
    ({"question": "q", "answer": "a"}, {"messages": conversation("q", "a")}, "conversation"),
    ({"instruction": "q", "output": "a"}, {"messages": conversation("q", "a")}, "conversation"),
    ({"instruction": "q", "input": "", "output": "a"}, {"messages": conversation("q", "a")}, "conversation"),
    ({"instruction": "q", "input": "i", "output": "a"}, {"messages": conversation("q\n\ni", "a")}, "conversation"),
    (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": conversation("q", "a"), "rejected": [{"role": "assistant", "content": "b"}]},
        "preference",
    ),
    ({"prompt": "q"}, {"messages": conversation("q")}, "prompt"),
    ({"prompt": conversation("q", "a", "r")}, {"messages": conversation("q", "a", "r")}, "prompt"),
    ({"question": "q", "answer": "a", "id": 7, "tags": ["x"]}, {"messages": conversation("q", "a")}, "conversation"),
]


@pytest.mark.parametrize(("record", "row", "shape"), SHAPES)
@pytest.mark.parametrize("form", ["jsonl", "json", "one object"])
def test_shape_is_recognised_by_its_columns(
    record: dict[str, Any], row: Row, shape: str, form: str, tmp_path: Path
) -> None:
    text = json.dumps([record] if form == "json" else record)
    name = "a.jsonl" if form == "jsonl" else "a.json"
    (found,), bad = read(tmp_path, text, name)
    assert not bad
    assert content(found) == row
    assert row_format(found) == shape == first_shape(dataset(name), tmp_path)
    assert (found["source"], found["line"]) == (name, 1)


@pytest.mark.parametrize(
    ("columns", "record", "row"),
    [
        ({"text": "body"}, {"body": "x", "text": 5}, {"text": "x"}),
        ({"prompt": "q", "completion": "a"}, {"q": "1", "a": "2"}, {"messages": conversation("1", "2")}),
        ({"messages": "turns"}, {"turns": conversation("q", "a")}, {"messages": conversation("q", "a")}),
        ({"prompt": "q"}, {"q": "1", "answer": "2"}, {"messages": conversation("1")}),
        (
            {"prompt": "q", "completion": "good", "rejected": "bad"},
            {"q": "1", "good": "2", "bad": "3"},
            {"messages": conversation("1", "2"), "rejected": [{"role": "assistant", "content": "3"}]},
        ),
    ],
)
def test_columns_that_are_named_are_taken(columns: Any, record: dict[str, Any], row: Row, tmp_path: Path) -> None:
    (found,), bad = read(tmp_path, json.dumps(record), columns=columns)
    assert content(found) == row
    assert not bad


GOOD = '{"text": "good"}'
HOSTILE: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b'{"text": "open', "not JSON"),
    (b"\x00\x00\x00", "not JSON"),
    (b'{"text": "a\x00b"}', "not JSON"),
    (b'{"text": "\xff\xfe"}', "not UTF-8: byte 0xff at position 10"),
    ('{"text": "ä"}'.encode("latin-1"), "not UTF-8: byte 0xe4"),
    ('{"text": "wide"}'.encode("utf-16"), "not UTF-8"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"text": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001, "nested too deep"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number is too long"),
    (b"5", "a row must be an object, this is int"),
    (b"null", "this is NoneType"),
    (b'["text", "x"]', "this is list"),
    (b'"text"', "this is str"),
    (b"{}", "columns found: none"),
    (b'{"body": "x", "n": 1}', "no known shape fits; columns found: `body`, `n`"),
    (b'{"\\ud800": 1}', "no known shape fits"),
    (b'{"text": 5}', "text is int, not text"),
    (b'{"text": null}', "text is missing"),
    (b'{"text": ["x"]}', "text is list, not text"),
    (b'{"text": NaN}', "text is float, not text"),
    (b'{"text": " \\n\\t "}', "text is empty"),
    (b'{"text": "half \\ud83d"}', "half of a surrogate pair"),
    (b'{"question": "q", "answer": ""}', "answer is empty"),
    (b'{"question": "q", "answer": 18}', "answer is int, not text"),
    (b'{"question": "", "answer": "a"}', "prompt is empty"),
    (b'{"instruction": "q", "input": 5, "output": "a"}', "input is int, not text"),
    (b'{"prompt": "q", "chosen": "a", "rejected": null}', "rejected is missing"),
    (b'{"messages": []}', "not a list of turns"),
    (b'{"messages": "hello"}', "not a list of turns"),
    (b'{"messages": [5]}', "turn 1 lacks role or content"),
    (b'{"messages": [{"role": "user"}]}', "turn 1 lacks role or content"),
    (b'{"messages": [{"role": "judge", "content": "x"}]}', "turn 1 has the role 'judge'"),
    (b'{"messages": [{"role": ["user"], "content": "x"}]}', "turn 1 has the role ['user']"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}', "turn 2 is empty"),
]


@pytest.mark.parametrize(("line", "reason"), HOSTILE, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_line_costs_that_line_and_is_told_with_file_line_and_reason(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    rows, (bad,) = read(tmp_path, b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    assert [row["line"] for row in rows] == [1, 3]
    assert (bad.source, bad.line) == ("a.jsonl", 2)
    assert reason in bad.reason
    assert len(bad.excerpt) <= 200


def is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize(("line", "reason"), [pair for pair in HOSTILE if is_json(pair[0])])
def test_bad_record_of_a_json_array_costs_that_record(line: bytes, reason: str, tmp_path: Path) -> None:
    rows, (bad,) = read(tmp_path, b"[%s,\n%s,\n%s]" % (GOOD.encode(), line, GOOD.encode()), "a.json")
    assert [row["line"] for row in rows] == [1, 3]
    assert (bad.source, bad.line) == ("a.json", 2)
    assert reason in bad.reason


@pytest.mark.parametrize("depth", [50, 400, 800, 900, 940, 960, 980, 1000, 3000])
def test_record_of_any_depth_is_read_or_quarantined(depth: int, tmp_path: Path) -> None:
    nested = '{"text": "x", "more": ' + "[" * depth + "]" * depth + "}"
    for name, text in (("a.jsonl", nested), ("a.json", f"[{nested}]")):
        rows, bad = read(tmp_path, text, name)
        assert len(rows) + len(bad) == 1


def test_json_file_that_ends_early_loses_its_end_alone(tmp_path: Path) -> None:
    (row,), (bad,) = read(tmp_path, f"[{GOOD}, ", "a.json")
    assert row["text"] == "good"
    assert (bad.line, bad.reason) == (2, "not JSON: the file ends within its array")


@given(
    st.lists(st.one_of(st.sampled_from([line for line, _ in HOSTILE]), st.integers(0, 99)), max_size=25),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_no_good_row_is_lost_among_hostile_lines(
    lines: list[bytes | int], newline: bytes, bom: bool, ends: bool
) -> None:
    written = [line if isinstance(line, bytes) else json.dumps({"text": f"row {line}"}).encode() for line in lines]
    # UTF-16 holds bytes of line ends: there one bad line is two.
    written = [line for line in written if b"\n" not in line]
    lines = [line for line in lines if isinstance(line, int) or b"\n" not in line]
    with tempfile.TemporaryDirectory() as folder:
        text = (codecs.BOM_UTF8 if bom else b"") + newline.join(written) + (newline if ends else b"")
        rows, bad = read(Path(folder), text)
    good = [(number, f"row {line}") for number, line in enumerate(lines, 1) if isinstance(line, int)]
    assert [(row["line"], row["text"]) for row in rows] == good
    assert [line.line for line in bad] == [number for number, line in enumerate(lines, 1) if isinstance(line, bytes)]


@given(st.binary(max_size=300))
def test_any_bytes_are_rows_or_quarantine(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", "a.json"):
            rows, bad = read(Path(folder), content, name)
            assert not rows
            assert len(bad) <= (content.count(b"\n") + 1 if name == "a.jsonl" else len(content) + 1)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(name: str, newline: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", "zwei ü")]
    text = newline.join(lines) if name == "a.jsonl" else f"[{(',' + newline).join(lines)}]"
    rows, bad = read(tmp_path, codecs.BOM_UTF8 + text.encode(), name)
    assert [row["text"] for row in rows] == ["one", "zwei ü"]
    assert not bad


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    rows, bad = read(tmp_path, f"\n  \n{GOOD}\n\n\r\n{GOOD}\n")
    assert [row["line"] for row in rows] == [3, 6]
    assert not bad


def test_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    text = "\u2028 tab\t nul\u0000 line\n\n end \U0001f600 "
    (row,), bad = read(tmp_path, json.dumps({"text": text}))
    assert row["text"] == text
    assert not bad


def test_shapes_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    rows, bad = read(tmp_path, "\n".join(json.dumps(record) for record, _, _ in SHAPES))
    assert [row_format(row) for row in rows] == [shape for _, _, shape in SHAPES]
    assert not bad


# Sources.


def test_pattern_reads_its_files_by_name_and_names_them(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    rows = list(read_source(dataset("**/*.json*"), tmp_path, pytest.fail))
    assert [(row["source"], row["text"]) for row in rows] == [
        (name, name) for name in ("a.json", "b.jsonl", "deep/c.jsonl")
    ]


def test_folder_with_pattern_characters_in_its_name_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    (row,), _ = read(folder, GOOD)
    assert row["source"] == "a.jsonl"


def test_absolute_path_is_read_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (file,) = find_parts(dataset(str(tmp_path / "a.jsonl")), tmp_path / "elsewhere")
    assert file.name == str(tmp_path / "a.jsonl")


def test_limit_counts_good_rows_from_the_top_and_reads_no_further(tmp_path: Path) -> None:
    text = f"{GOOD}\nbad\n{GOOD}\nworse\n{GOOD}"
    rows, bad = read(tmp_path, text, limit=2)
    assert [row["line"] for row in rows] == [1, 3]
    assert [line.line for line in bad] == [2]


@pytest.mark.parametrize("eval_fraction", [0.1, 0.45])
def test_splits_share_no_group_and_lose_no_row(eval_fraction: float, tmp_path: Path) -> None:
    records = [{"messages": conversation(f"question {n % 120}", f"answer {n}")} for n in range(360)]
    text = "\n".join(map(json.dumps, records))
    groups: dict[str, set[str]] = {}
    lines: list[int] = []
    for split in ("train", "validation", "test"):
        rows, _ = read(tmp_path, text, split=split, eval_fraction=eval_fraction)
        groups[split] = {row["group"] for row in rows}
        lines += [row["line"] for row in rows]
    assert all(groups.values())
    assert groups["train"].isdisjoint(groups["validation"] | groups["test"])
    assert groups["validation"].isdisjoint(groups["test"])
    assert sorted(lines) == list(range(1, 361))


@pytest.mark.parametrize(
    ("record", "group"),
    [
        ({"text": "whole"}, "whole"),
        ({"messages": [{"role": "system", "content": "s"}, *conversation("q", "a")]}, "q"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
        ({"messages": [{"role": "system", "content": "s"}]}, "s"),
    ],
)
def test_group_is_what_a_row_is_about(record: dict[str, Any], group: str, tmp_path: Path) -> None:
    (row,), _ = read(tmp_path, json.dumps(record))
    assert row["group"] == group


def put(files: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


WRONG_SOURCES: dict[str, tuple[dict[str, str], dict[str, Any], str, list[str]]] = {
    "missing": ({}, {}, "source", ["there is no file `a.jsonl`", "nothing matches", "experiment's folder"]),
    "empty": ({"a.jsonl": ""}, {}, "source", ["`a.jsonl` holds no row", "at least one row"]),
    "blank": ({"a.jsonl": "\n \n"}, {}, "source", ["holds no row"]),
    "nothing readable": ({"a.jsonl": "x\ny\n"}, {}, "source", ["holds no row", "none of its records makes a row"]),
    "other ending": ({"a.pdf": "x"}, {"source": "a.pdf"}, "source", ["is a .pdf", ".jsonl, ", "format:"]),
    "old Excel": ({"a.xls": "x"}, {"source": "a.xls"}, "source", ["is a .xls", "save it as .xlsx"]),
    "no ending": ({"a": "x"}, {"source": "a"}, "source", ["file without ending"]),
    "empty folder": ({}, {"source": "."}, "source", ["no file in the folder"]),
    "folder without rows": ({"a.md": "x"}, {"source": "."}, "source", ["no file below `.` has a known ending"]),
    "form of address": ({}, {"source": "ftp://host/a.jsonl"}, "source", ["of no known form", "s3://"]),
    "sheet of no workbook": ({"a.jsonl": GOOD}, {"sheet": "one"}, "sheet", ["`sheet` is for Excel files"]),
    "samples of no text": ({"a.jsonl": GOOD}, {"sample_by": "line"}, "sample_by", ["for plain texts"]),
    "config of files": ({"a.jsonl": GOOD}, {"config": "x"}, "config", ["for hub datasets"]),
    "revision of files": ({"a.jsonl": GOOD}, {"revision": "x"}, "revision", ["for hub datasets"]),
    "split of files": ({"a.jsonl": GOOD}, {"hub_split": "x"}, "hub_split", ["for hub datasets and saved"]),
    "format of the builtin": ({}, {"source": BUILTIN, "subset": "texts", "format": "csv"}, "format", ["for files"]),
    "columns that fit nothing": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {},
        "source",
        ["the columns of `a.jsonl` don't fit", "columns found: `body`, `n`", "columns: {text: body}"],
    ),
    "named column that isn't there": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {"columns": {"text": "bdoy"}},
        "columns",
        ["there is no column `bdoy`", "columns found: `body`, `n`"],
    ),
    "names that make no shape": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {"columns": {"completion": "body"}},
        "columns",
        ["`columns` names `completion`", "a shape is one of", "prompt + completion"],
    ),
    "subset of files": ({"a.jsonl": GOOD}, {"subset": "texts"}, "subset", ["files have no subset", "remove"]),
    "unknown builtin": ({}, {"source": "builtin:docs"}, "source", ["`builtin:docs`", f"known: {BUILTIN}"]),
    "builtin without subset": ({}, {"source": BUILTIN}, "source", ["needs a subset", "texts, questions"]),
    "builtin with columns": (
        {},
        {"source": BUILTIN, "subset": "texts", "columns": {"text": "a"}},
        "columns",
        ["nothing that `columns` names"],
    ),
}


@pytest.mark.parametrize("case", WRONG_SOURCES)
def test_wrong_source_is_told_before_anything_runs(case: str, tmp_path: Path) -> None:
    files, fields, field, words = WRONG_SOURCES[case]
    put(files)(tmp_path)
    with pytest.raises(BadSource) as caught:
        check_source(dataset(**fields), tmp_path)
    error = caught.value
    assert error.field == field
    for word in words:
        assert word in f"{error.message} {error.cause} {error.remedy}"


def test_head_of_bad_lines_does_not_condemn_a_file(tmp_path: Path) -> None:
    put({"a.jsonl": "broken\n{}\n" + '{"version": 2}\n' * 5 + GOOD})(tmp_path)
    check_source(dataset(), tmp_path)
    assert first_shape(dataset(), tmp_path) == "text"
    put({"a.jsonl": '{"version": 2}\n' * MAX_PROBED_RECORDS + GOOD})(tmp_path)
    with pytest.raises(BadSource, match="don't fit"):
        check_source(dataset(), tmp_path)


def test_one_usable_file_of_several_is_enough(tmp_path: Path) -> None:
    put({"a.jsonl": "", "b.jsonl": GOOD})(tmp_path)
    check_source(dataset("*.jsonl"), tmp_path)


def test_source_whose_records_all_make_no_row_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    put({"a.jsonl": '{"question": "q", "answer": ""}'})(tmp_path)
    for ask in (check_source, first_shape):
        with pytest.raises(BadSource, match="holds no row") as caught:
            ask(dataset(), tmp_path)
        assert "the first: a.jsonl:1: answer is empty" in caught.value.cause


@pytest.mark.parametrize(
    ("subset", "shape"),
    [("texts", "text"), ("questions", "conversation"), ("preferences", "preference"), ("prompts", "prompt")],
)
def test_builtin_subset_has_the_shape_that_is_said_of_it(subset: Any, shape: str, tmp_path: Path) -> None:
    stage = dataset(BUILTIN, subset=subset, limit=3)
    check_source(stage, tmp_path)
    rows = list(read_source(stage, tmp_path, pytest.fail))
    assert {row_format(row) for row in rows} == {shape} == {first_shape(stage, tmp_path)}
    assert [(row["source"], row["line"]) for row in rows] == [(f"{BUILTIN}/{subset}", n) for n in (1, 2, 3)]


# The stage.


def test_rows_in_are_rows_and_quarantine(tmp_path: Path) -> None:
    lines = [line for line, _ in HOSTILE if b"\n" not in line]
    good = [json.dumps({"question": f"q {n}", "answer": f"a {n % 9}"}).encode() for n in range(SHARD + 10)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, *good, good[0]]))
    result, out = make(tmp_path, "one", dataset())
    facts = result.facts
    assert (facts["rows"], facts["quarantined"], facts["duplicates"]) == (SHARD + 11, len(lines), 1)
    assert facts["rows"] + facts["quarantined"] == facts["records"] == len(lines) + len(good) + 1
    assert (facts["shape"], facts["source"], facts["split"], facts["planted"]) == ("conversation", "a.jsonl", "all", {})
    rows = list(read_rows(out))
    assert len(shards(out)) == 2
    assert [row["line"] for row in rows] == list(range(len(lines) + 1, len(lines) + SHARD + 12))
    assert all(row["id"] == row_id(row) and row["planted"] is None for row in rows)
    told = quarantine_of(out)
    assert [line["line"] for line in told] == list(range(1, len(lines) + 1))
    assert all(line.keys() == {"source", "line", "reason", "excerpt"} and line["reason"] for line in told)


def test_quarantine_of_a_json_array_holds_what_utf_8_cannot(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"text": "\\ud83d"}}, {{"\\udc00": 1}}, {GOOD}]')
    result, out = make(tmp_path, "one", dataset("a.json"))
    assert (result.facts["rows"], result.facts["quarantined"]) == (1, 2)
    assert json.loads(quarantine_of(out)[0]["excerpt"]) == {"text": "\ud83d"}


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_same_rows_make_the_same_bytes(fraction: float, tmp_path: Path) -> None:
    records = [{"question": f"what is {n}?", "answer": " ".join(f"word{n + k}" for k in range(12))} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("bad\n" + "\n".join(map(json.dumps, records)))
    (one, first), (two, second) = (
        make(tmp_path, out, dataset(corrupt_fraction=fraction), seed=5) for out in ("one", "two")
    )
    assert one == two
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    planted = Counter(row["planted"] for row in read_rows(first))
    assert sum(count for kind, count in planted.items() if kind) == round(fraction * 80)
    assert one.facts["planted"] == ({} if fraction == 0 else dict(sorted(planted.items())))


def test_id_is_the_same_for_the_same_content_however_it_is_written() -> None:
    row = {"messages": conversation("caf\u00e9", "a")}
    assert row_id(row) == row_id({"messages": conversation("cafe\u0301 \n", "a\t"), "source": "b", "line": 9})
    others = [
        {"messages": conversation("cafe", "a")},
        {"messages": conversation("caf\u00e9", " a")},
        {"messages": conversation("caf\u00e9")},
        {"text": "caf\u00e9"},
        {"messages": conversation("caf\u00e9", "a"), "rejected": conversation("b")},
    ]
    assert len({row_id(other) for other in [row, *others]}) == 6


def test_dataset_without_any_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": 5}\n')
    with pytest.raises(StageError, match="gave no row") as caught:
        make(tmp_path, "one", dataset())
    assert "2 lines could not be read" in caught.value.cause
    assert "text is empty" in caught.value.remedy


# Files as people have them.

needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real rows is not here")


@needs_real_rows
@pytest.mark.parametrize(
    ("name", "rows", "shape"),
    [
        ("alpaca_en.json", 999, "conversation"),
        ("gsm8k_train.jsonl", 7473, "conversation"),
        ("preference_en_sharegpt.json", 300, "preference"),
        ("kto_en.json", 300, "rated"),
    ],
)
def test_real_rows_are_all_read_without_a_setting(name: str, rows: int, shape: str, tmp_path: Path) -> None:
    stage = dataset(str(REAL / name))
    check_source(stage, tmp_path)
    found = list(read_source(stage, tmp_path, pytest.fail))
    assert len(found) == rows
    assert {row_format(row) for row in found} == {shape} == {first_shape(stage, tmp_path)}
    assert [row["line"] for row in found] == list(range(1, rows + 1))


def test_identity_of_a_source_is_the_content_of_its_files(tmp_path: Path) -> None:
    put({"a.jsonl": GOOD, "b.jsonl": "x"})(tmp_path)
    one, both = source_identity(dataset(), tmp_path), source_identity(dataset("*.jsonl"), tmp_path)
    assert both[:1] == one
    assert len(both) == 2
