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
from reading import build_dataset, content, dataset, quarantine_of, read

from tunery.errors import StageError
from tunery.ingest.read import MAX_PROBED_RECORDS, first_row_format, read_source, validate_source
from tunery.ingest.sources import BUILTIN, BadSource, resolve_sources, source_identity
from tunery.store.rows import SHARD, Row, read_rows, row_format, row_id, shards

PUBLIC_DATASETS = Path(__file__).parents[4] / "shared" / "data"


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


ROW_FORMATS: list[tuple[dict[str, Any], Row, str]] = [
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


@pytest.mark.parametrize(("record", "row", "expected_format"), ROW_FORMATS)
@pytest.mark.parametrize("form", ["jsonl", "json", "one object"])
def test_row_format_is_recognized_by_columns(
    record: dict[str, Any], row: Row, expected_format: str, form: str, tmp_path: Path
) -> None:
    text = json.dumps([record] if form == "json" else record)
    name = "a.jsonl" if form == "jsonl" else "a.json"
    (converted,), quarantined = read(tmp_path, text, name)
    assert not quarantined
    assert content(converted) == row
    assert row_format(converted) == expected_format == first_row_format(dataset(name), tmp_path)
    assert (converted["source"], converted["line"]) == (name, 1)


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
def test_configured_columns_are_read(columns: Any, record: dict[str, Any], row: Row, tmp_path: Path) -> None:
    (converted,), quarantined = read(tmp_path, json.dumps(record), columns=columns)
    assert content(converted) == row
    assert not quarantined


VALID = '{"text": "valid"}'
INVALID_RECORDS: list[tuple[bytes, str]] = [
    (b"{", "not JSON"),
    (b'{"text": "open', "not JSON"),
    (b"\x00\x00\x00", "not JSON"),
    (b'{"text": "a\x00b"}', "not JSON"),
    (b'{"text": "\xff\xfe"}', "not UTF-8: byte 0xff at position 10"),
    ('{"text": "ä"}'.encode("latin-1"), "not UTF-8: byte 0xe4"),
    ('{"text": "wide"}'.encode("utf-16"), "not UTF-8"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"text": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001, "nested too deep"),
    (b'{"n": ' + b"9" * 5000 + b"}", "a number that is too long"),
    (b"5", "a row must be an object, not int"),
    (b"null", "not NoneType"),
    (b'["text", "x"]', "not list"),
    (b'"text"', "not str"),
    (b"{}", "columns: none"),
    (b'{"body": "x", "n": 1}', "no row format matches; columns: `body`, `n`"),
    (b'{"\\ud800": 1}', "no row format matches"),
    (b'{"text": 5}', "text is int, not text"),
    (b'{"text": null}', "text is missing"),
    (b'{"text": ["x"]}', "text is list, not text"),
    (b'{"text": NaN}', "text is float, not text"),
    (b'{"text": " \\n\\t "}', "text is empty"),
    (b'{"text": "half \\ud83d"}', "a lone surrogate"),
    (b'{"question": "q", "answer": ""}', "response is empty"),
    (b'{"question": "q", "answer": 18}', "response is int, not text"),
    (b'{"question": "", "answer": "a"}', "prompt is empty"),
    (b'{"instruction": "q", "input": 5, "output": "a"}', "input is int, not text"),
    (b'{"prompt": "q", "chosen": "a", "rejected": null}', "rejected is missing"),
    (b'{"messages": []}', "not a list of messages"),
    (b'{"messages": "hello"}', "not a list of messages"),
    (b'{"messages": [5]}', "message 1 has no role or no content"),
    (b'{"messages": [{"role": "user"}]}', "message 1 has no role or no content"),
    (b'{"messages": [{"role": "judge", "content": "x"}]}', "message 1 has the role 'judge'"),
    (b'{"messages": [{"role": ["user"], "content": "x"}]}', "message 1 has the role ['user']"),
    (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}', "message 2 is empty"),
]


@pytest.mark.parametrize(("line", "reason"), INVALID_RECORDS, ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_line_is_quarantined_with_file_line_and_reason(line: bytes, reason: str, tmp_path: Path) -> None:
    rows, (quarantined,) = read(tmp_path, b"\n".join([VALID.encode(), line, VALID.encode()]))
    assert [row["line"] for row in rows] == [1, 3]
    assert (quarantined.source, quarantined.line) == ("a.jsonl", 2)
    assert reason in quarantined.reason
    assert len(quarantined.excerpt) <= 200


def is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize(("line", "reason"), [pair for pair in INVALID_RECORDS if is_json(pair[0])])
def test_invalid_record_of_a_json_array_is_quarantined_alone(line: bytes, reason: str, tmp_path: Path) -> None:
    rows, (quarantined,) = read(tmp_path, b"[%s,\n%s,\n%s]" % (VALID.encode(), line, VALID.encode()), "a.json")
    assert [row["line"] for row in rows] == [1, 3]
    assert (quarantined.source, quarantined.line) == ("a.json", 2)
    assert reason in quarantined.reason


@pytest.mark.parametrize("depth", [50, 400, 800, 900, 940, 960, 980, 1000, 3000])
def test_record_of_any_depth_is_read_or_quarantined(depth: int, tmp_path: Path) -> None:
    nested = '{"text": "x", "more": ' + "[" * depth + "]" * depth + "}"
    for name, text in (("a.jsonl", nested), ("a.json", f"[{nested}]")):
        rows, quarantined = read(tmp_path, text, name)
        assert len(rows) + len(quarantined) == 1


def test_truncated_json_file_keeps_its_complete_records(tmp_path: Path) -> None:
    (row,), (quarantined,) = read(tmp_path, f"[{VALID}, ", "a.json")
    assert row["text"] == "valid"
    assert (quarantined.line, quarantined.reason) == (2, "not JSON: the file ends within its array")


@given(
    st.lists(st.one_of(st.sampled_from([line for line, _ in INVALID_RECORDS]), st.integers(0, 99)), max_size=25),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_no_valid_row_is_lost_among_invalid_lines(
    lines: list[bytes | int], newline: bytes, bom: bool, final_newline: bool
) -> None:
    encoded = [line if isinstance(line, bytes) else json.dumps({"text": f"row {line}"}).encode() for line in lines]
    # A line in UTF-16 may contain a newline byte, which splits it.
    encoded = [line for line in encoded if b"\n" not in line]
    lines = [line for line in lines if isinstance(line, int) or b"\n" not in line]
    with tempfile.TemporaryDirectory() as folder:
        text = (codecs.BOM_UTF8 if bom else b"") + newline.join(encoded) + (newline if final_newline else b"")
        rows, quarantined = read(Path(folder), text)
    valid = [(number, f"row {line}") for number, line in enumerate(lines, 1) if isinstance(line, int)]
    assert [(row["line"], row["text"]) for row in rows] == valid
    assert [line.line for line in quarantined] == [
        number for number, line in enumerate(lines, 1) if isinstance(line, bytes)
    ]


@given(st.binary(max_size=300))
def test_any_bytes_are_rows_or_quarantined(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", "a.json"):
            rows, quarantined = read(Path(folder), content, name)
            assert not rows
            assert len(quarantined) <= (content.count(b"\n") + 1 if name == "a.jsonl" else len(content) + 1)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_byte_order_mark_and_windows_line_ends_are_not_part_of_a_row(name: str, newline: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", "zwei ü")]
    text = newline.join(lines) if name == "a.jsonl" else f"[{(',' + newline).join(lines)}]"
    rows, quarantined = read(tmp_path, codecs.BOM_UTF8 + text.encode(), name)
    assert [row["text"] for row in rows] == ["one", "zwei ü"]
    assert not quarantined


def test_blank_lines_are_skipped_but_counted_in_line_numbers(tmp_path: Path) -> None:
    rows, quarantined = read(tmp_path, f"\n  \n{VALID}\n\n\r\n{VALID}\n")
    assert [row["line"] for row in rows] == [3, 6]
    assert not quarantined


def test_text_is_not_changed(tmp_path: Path) -> None:
    text = "\u2028 tab\t nul\u0000 line\n\n end \U0001f600 "
    (row,), quarantined = read(tmp_path, json.dumps({"text": text}))
    assert row["text"] == text
    assert not quarantined


def test_one_file_may_have_several_row_formats(tmp_path: Path) -> None:
    rows, quarantined = read(tmp_path, "\n".join(json.dumps(record) for record, _, _ in ROW_FORMATS))
    assert [row_format(row) for row in rows] == [expected_format for _, _, expected_format in ROW_FORMATS]
    assert not quarantined


# Sources.


def test_pattern_reads_its_files_in_order_of_names(tmp_path: Path) -> None:
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
    (row,), _ = read(folder, VALID)
    assert row["source"] == "a.jsonl"


def test_absolute_path_is_read_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(VALID)
    (file,) = resolve_sources(dataset(str(tmp_path / "a.jsonl")), tmp_path / "elsewhere")
    assert file.name == str(tmp_path / "a.jsonl")


def test_limit_counts_valid_rows_and_stops_reading(tmp_path: Path) -> None:
    text = f"{VALID}\nbad\n{VALID}\nworse\n{VALID}"
    rows, quarantined = read(tmp_path, text, limit=2)
    assert [row["line"] for row in rows] == [1, 3]
    assert [line.line for line in quarantined] == [2]


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
        ({"text": "a text"}, "a text"),
        ({"messages": [{"role": "system", "content": "s"}, *conversation("q", "a")]}, "q"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q"),
        ({"messages": [{"role": "system", "content": "s"}]}, "s"),
    ],
)
def test_group_is_the_text_or_the_first_user_message(record: dict[str, Any], group: str, tmp_path: Path) -> None:
    (row,), _ = read(tmp_path, json.dumps(record))
    assert row["group"] == group


def write_files(files: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


INVALID_SOURCES: dict[str, tuple[dict[str, str], dict[str, Any], str, list[str]]] = {
    "missing": ({}, {}, "source", ["there is no file `a.jsonl`", "nothing matches", "experiment's folder"]),
    "empty": ({"a.jsonl": ""}, {}, "source", ["`a.jsonl` has no valid row", "at least one valid row"]),
    "blank": ({"a.jsonl": "\n \n"}, {}, "source", ["has no valid row"]),
    "no JSON": (
        {"a.jsonl": "x\ny\n"},
        {},
        "source",
        ["has no valid row", "none of its first 1,000 records is a valid row"],
    ),
    "unsupported ending": ({"a.pdf": "x"}, {"source": "a.pdf"}, "source", ["is a .pdf", ".jsonl, ", "format:"]),
    "old Excel": ({"a.xls": "x"}, {"source": "a.xls"}, "source", ["is a .xls", "save it as .xlsx"]),
    "no ending": ({"a": "x"}, {"source": "a"}, "source", ["file without ending"]),
    "empty folder": ({}, {"source": "."}, "source", ["no file in the folder"]),
    "folder without rows": ({"a.md": "x"}, {"source": "."}, "source", ["no file in `.` has a known ending"]),
    "unknown scheme": ({}, {"source": "ftp://host/a.jsonl"}, "source", ["unknown scheme", "s3://"]),
    "sheet without a workbook": ({"a.jsonl": VALID}, {"sheet": "one"}, "sheet", ["`sheet` applies to Excel files"]),
    "sample_by without texts": ({"a.jsonl": VALID}, {"sample_by": "line"}, "sample_by", ["applies to plain texts"]),
    "config of files": ({"a.jsonl": VALID}, {"config": "x"}, "config", ["applies to hub datasets"]),
    "revision of files": ({"a.jsonl": VALID}, {"revision": "x"}, "revision", ["applies to hub datasets"]),
    "split of files": ({"a.jsonl": VALID}, {"hub_split": "x"}, "hub_split", ["applies to hub datasets and saved"]),
    "format of the builtin": (
        {},
        {"source": BUILTIN, "subset": "texts", "format": "csv"},
        "format",
        ["applies to files"],
    ),
    "columns that match no format": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {},
        "source",
        ["the columns of `a.jsonl` match no row format", "columns: `body`, `n`", "columns: {text: body}"],
    ),
    "missing column": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {"columns": {"text": "bdoy"}},
        "columns",
        ["there is no column `bdoy`", "columns: `body`, `n`"],
    ),
    "names that fit no format": (
        {"a.jsonl": '{"body": "x", "n": 1}'},
        {"columns": {"completion": "body"}},
        "columns",
        ["`columns` names `completion`", "the row formats are", "prompt + completion"],
    ),
    "subset of files": (
        {"a.jsonl": VALID},
        {"subset": "texts"},
        "subset",
        ["`subset` applies to builtin sources only", "remove"],
    ),
    "unknown builtin": ({}, {"source": "builtin:docs"}, "source", ["`builtin:docs`", f"known: {BUILTIN}"]),
    "builtin without subset": ({}, {"source": BUILTIN}, "source", ["needs a subset", "texts, questions"]),
    "builtin with columns": (
        {},
        {"source": BUILTIN, "subset": "texts", "columns": {"text": "a"}},
        "columns",
        ["`columns` does not apply"],
    ),
}


@pytest.mark.parametrize("case", INVALID_SOURCES)
def test_invalid_source_is_an_error_with_field_cause_and_remedy(case: str, tmp_path: Path) -> None:
    files, fields, field, words = INVALID_SOURCES[case]
    write_files(files)(tmp_path)
    with pytest.raises(BadSource) as caught:
        validate_source(dataset(**fields), tmp_path)
    error = caught.value
    assert error.field == field
    for word in words:
        assert word in f"{error.message} {error.cause} {error.remedy}"


def test_file_that_starts_with_invalid_lines_is_valid(tmp_path: Path) -> None:
    write_files({"a.jsonl": "broken\n{}\n" + '{"version": 2}\n' * 5 + VALID})(tmp_path)
    validate_source(dataset(), tmp_path)
    assert first_row_format(dataset(), tmp_path) == "text"
    write_files({"a.jsonl": '{"version": 2}\n' * MAX_PROBED_RECORDS + VALID})(tmp_path)
    with pytest.raises(BadSource, match="match no row format"):
        validate_source(dataset(), tmp_path)


def test_one_usable_file_of_several_is_enough(tmp_path: Path) -> None:
    write_files({"a.jsonl": "", "b.jsonl": VALID})(tmp_path)
    validate_source(dataset("*.jsonl"), tmp_path)


def test_source_without_a_valid_record_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    write_files({"a.jsonl": '{"question": "q", "answer": ""}'})(tmp_path)
    for function in (validate_source, first_row_format):
        with pytest.raises(BadSource, match="has no valid row") as caught:
            function(dataset(), tmp_path)
        assert "the first: a.jsonl:1: response is empty" in caught.value.cause


@pytest.mark.parametrize(
    ("subset", "expected_format"),
    [("texts", "text"), ("questions", "conversation"), ("preferences", "preference"), ("prompts", "prompt")],
)
def test_builtin_subset_has_its_documented_row_format(subset: Any, expected_format: str, tmp_path: Path) -> None:
    stage = dataset(BUILTIN, subset=subset, limit=3)
    validate_source(stage, tmp_path)
    rows = list(read_source(stage, tmp_path, pytest.fail))
    assert {row_format(row) for row in rows} == {expected_format} == {first_row_format(stage, tmp_path)}
    assert [(row["source"], row["line"]) for row in rows] == [(f"{BUILTIN}/{subset}", n) for n in (1, 2, 3)]


# The stage.


def test_records_equal_rows_plus_quarantined_records(tmp_path: Path) -> None:
    lines = [line for line, _ in INVALID_RECORDS if b"\n" not in line]
    valid = [json.dumps({"question": f"q {n}", "answer": f"a {n % 9}"}).encode() for n in range(SHARD + 10)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, *valid, valid[0]]))
    result, out = build_dataset(tmp_path, "one", dataset())
    facts = result.facts
    assert (facts["rows"], facts["quarantined"], facts["duplicates"]) == (SHARD + 11, len(lines), 1)
    assert facts["rows"] + facts["quarantined"] == facts["records"] == len(lines) + len(valid) + 1
    assert (facts["row_format"], facts["source"], facts["split"], facts["injected_corruption"]) == (
        "conversation",
        "a.jsonl",
        "all",
        {},
    )
    rows = list(read_rows(out))
    assert len(shards(out)) == 2
    assert [row["line"] for row in rows] == list(range(len(lines) + 1, len(lines) + SHARD + 12))
    assert all(row["id"] == row_id(row) and row["injected_corruption"] is None for row in rows)
    quarantined = quarantine_of(out)
    assert [line["line"] for line in quarantined] == list(range(1, len(lines) + 1))
    assert all(line.keys() == {"source", "line", "reason", "excerpt"} and line["reason"] for line in quarantined)


def test_quarantine_preserves_lone_surrogates(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"text": "\\ud83d"}}, {{"\\udc00": 1}}, {VALID}]')
    result, out = build_dataset(tmp_path, "one", dataset("a.json"))
    assert (result.facts["rows"], result.facts["quarantined"]) == (1, 2)
    assert json.loads(quarantine_of(out)[0]["excerpt"]) == {"text": "\ud83d"}


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_same_rows_give_the_same_bytes(fraction: float, tmp_path: Path) -> None:
    records = [{"question": f"what is {n}?", "answer": " ".join(f"word{n + k}" for k in range(12))} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("bad\n" + "\n".join(map(json.dumps, records)))
    (one, first), (two, second) = (
        build_dataset(tmp_path, out, dataset(corrupt_fraction=fraction), seed=5) for out in ("one", "two")
    )
    assert one == two
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()]
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    kinds = Counter(row["injected_corruption"] for row in read_rows(first))
    assert sum(count for kind, count in kinds.items() if kind) == round(fraction * 80)
    assert one.facts["injected_corruption"] == ({} if fraction == 0 else dict(sorted(kinds.items())))


def test_row_id_depends_on_normalized_content_only() -> None:
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


def test_dataset_without_a_valid_row_is_an_error_with_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": 5}\n')
    with pytest.raises(StageError, match="has no valid row") as caught:
        build_dataset(tmp_path, "one", dataset())
    assert "2 records are invalid" in caught.value.cause
    assert "text is empty" in caught.value.remedy


# Public datasets.

needs_public_datasets = pytest.mark.skipif(
    not PUBLIC_DATASETS.is_dir(), reason="the folder of public datasets is missing"
)


@needs_public_datasets
@pytest.mark.parametrize(
    ("name", "rows", "expected_format"),
    [
        ("alpaca_en.json", 999, "conversation"),
        ("gsm8k_train.jsonl", 7473, "conversation"),
        ("preference_en_sharegpt.json", 300, "preference"),
        ("kto_en.json", 300, "rated"),
    ],
)
def test_public_datasets_are_read_completely_without_settings(
    name: str, rows: int, expected_format: str, tmp_path: Path
) -> None:
    stage = dataset(str(PUBLIC_DATASETS / name))
    validate_source(stage, tmp_path)
    converted = list(read_source(stage, tmp_path, pytest.fail))
    assert len(converted) == rows
    assert {row_format(row) for row in converted} == {expected_format} == {first_row_format(stage, tmp_path)}
    assert [row["line"] for row in converted] == list(range(1, rows + 1))


def test_identity_of_a_source_is_the_content_of_its_files(tmp_path: Path) -> None:
    write_files({"a.jsonl": VALID, "b.jsonl": "x"})(tmp_path)
    one, both = source_identity(dataset(), tmp_path), source_identity(dataset("*.jsonl"), tmp_path)
    assert both[:1] == one
    assert len(both) == 2
