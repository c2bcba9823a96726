"""A hundred malformed or unusual files, with their valid rows and their errors (test_hostile_files.py)."""

from __future__ import annotations

import codecs
import datetime
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openpyxl
import openpyxl.chart
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from tunery.store.rows import Row


@dataclass(frozen=True)
class Hostile:
    """A file with the expected contents of its rows, the number of quarantined records, and the reason of the first."""

    name: str
    content: bytes
    contents: list[str] = field(default_factory=list)
    num_quarantined: int = 0
    reason: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def response_of(row: Row) -> str:
    """Return the text of a row, or the content of its last message."""
    return str(row["text"] if row.get("text") else row["messages"][-1]["content"])


def qa(*responses: str) -> list[str]:
    return [json.dumps({"question": f"q{index}", "answer": response}) for index, response in enumerate(responses)]


def lines(*records: str | bytes, end: bytes = b"\n") -> bytes:
    return end.join(record if isinstance(record, bytes) else record.encode() for record in records)


def compressed(content: bytes, codec: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def workbook(*sheets: list[list[Any]], change: Callable[[Any], None] = lambda book: None) -> bytes:
    book = openpyxl.Workbook()
    for index, rows in enumerate(sheets):
        sheet = book.active if index == 0 else book.create_sheet()
        for row in rows:
            sheet.append(row)
    change(book)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def with_cached_value(content: bytes, value: str) -> bytes:
    """Return the workbook with a cached value for its formulas, which Excel stores and openpyxl does not."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(
                name,
                old.read(name)
                .replace(b"<v></v>", b"<v>%s</v>" % value.encode())
                .replace(b"<v />", b"<v>%s</v>" % value.encode()),
            )
    return out.getvalue()


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def arrow(table: pa.Table, stream: bool = True, rows: int | None = None) -> bytes:
    out = pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table, rows)
    return bytes(out.getvalue().to_pybytes())


def table(*responses: Any) -> pa.Table:
    return pa.table({"question": [f"q{n}" for n in range(len(responses))], "answer": list(responses)})


NOT_UTF8 = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).view(pa.string())
RESPONSES = [f"response {n} {n * n % 977}" for n in range(3000)]
HEAD = ["question", "answer"]
CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

JSON_LINES = [
    Hostile("bom.jsonl", codecs.BOM_UTF8 + lines(*qa("a", "b")), ["a", "b"]),
    Hostile("bom-in-the-middle.jsonl", lines(*qa("a"), codecs.BOM_UTF8 + qa("b")[0].encode()), ["a"], 1, "not JSON"),
    Hostile("crlf.jsonl", lines(*qa("a", "b", "c"), b"", end=b"\r\n"), ["a", "b", "c"]),
    Hostile("mixed-line-ends.jsonl", b"\r\n".join([lines(*qa("a", "b")), *map(str.encode, qa("c"))]), ["a", "b", "c"]),
    Hostile("carriage-returns.jsonl", lines(*qa("a", "b"), end=b"\r"), [], 1, "not JSON"),
    Hostile(
        "latin-1.jsonl", lines(*qa("a"), '{"text": "\u00e4"}'.encode("latin-1"), *qa("b")), ["a", "b"], 1, "not UTF-8"
    ),
    Hostile("utf-16.jsonl", lines(*qa("a"), end=b"\n").decode().encode("utf-16"), [], 1, "not UTF-8"),
    Hostile("cut-in-a-character.jsonl", lines(*qa("a"), '{"text": "\u00e4'.encode()[:-1]), ["a"], 1, "not UTF-8"),
    Hostile("nul-line.jsonl", lines(*qa("a"), b"\0" * 4096, *qa("b")), ["a", "b"], 1, "not JSON"),
    Hostile("nul-tail.jsonl", lines(*qa("a"), b"\0" * 4096), ["a"], 1, "not JSON"),
    Hostile("nul-escape.jsonl", lines('{"text": "a\\u0000b"}'), ["a\0b"]),
    Hostile("nul-in-string.jsonl", lines(b'{"text": "a\0b"}', *qa("b")), ["b"], 1, "not JSON"),
    Hostile("surrogate.jsonl", lines('{"text": "\\ud800"}', *qa("b")), ["b"], 1, "a lone surrogate"),
    Hostile("surrogate-key.jsonl", lines('{"\\ud800": "x"}', *qa("b")), ["b"], 1, "no row format matches"),
    Hostile("separators.jsonl", lines(*qa("a\u2028b", "c\u0085d\x0be")), ["a\u2028b", "c\u0085d\x0be"]),
    Hostile("only-spaces.jsonl", lines("  ", "\t", *qa("a"), "\x0c"), ["a"]),
    Hostile("empty.jsonl", b""),
    Hostile(
        "number-answer.jsonl", lines('{"question": "q", "answer": 42}', *qa("b")), ["b"], 1, "response is int, not text"
    ),
    Hostile("bool-answer.jsonl", lines('{"question": "q", "answer": true}', *qa("b")), ["b"], 1, "response is bool"),
    Hostile(
        "list-answer.jsonl",
        lines('{"question": "q", "answer": ["x"]}', *qa("b")),
        ["b"],
        1,
        "is not a list of messages|has no role",
    ),
    Hostile("empty-answer.jsonl", lines(*qa(""), *qa("b")), ["b"], 1, "response is empty"),
    Hostile("blank-answer.jsonl", lines(*qa(" \u00a0\n"), *qa("b")), ["b"], 1, "response is empty"),
    Hostile("null-answer.jsonl", lines('{"question": "q", "answer": null}', *qa("b")), ["b"], 1, "response is missing"),
    Hostile("null-row.jsonl", lines("null", *qa("b")), ["b"], 1, "must be an object"),
    Hostile(
        "nested-nulls.jsonl",
        lines('{"messages": [null, {"role": null, "content": null}]}', *qa("b")),
        ["b"],
        1,
        "message 1 has no role",
    ),
    Hostile("null-turns.jsonl", lines('{"messages": null}', *qa("b")), ["b"], 1, "not a list of messages"),
    Hostile(
        "null-tool-calls.jsonl",
        lines(json.dumps({"messages": [{**message, "tool_calls": None, "name": None} for message in CONVERSATION]})),
        ["a"],
    ),
    Hostile("unused-nulls.jsonl", lines('{"text": "a", "meta": {"x": [null, {"y": null}]}}'), ["a"]),
    Hostile("twice.jsonl", lines('{"text": "a", "text": "b"}', *qa("b")), ["b"], 1, "occurs twice"),
    Hostile("twice-the-same.jsonl", lines('{"text": "a", "text": "a"}'), ["a"]),
    Hostile("twice-elsewhere.jsonl", lines('{"text": "a", "meta": {"k": 1, "k": 2}, "n": 1, "n": 2}'), ["a"]),
    Hostile(
        "twice-in-a-turn.jsonl",
        lines('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', *qa("b")),
        ["b"],
        1,
        "twice",
    ),
    Hostile("python-dict.jsonl", lines("{'text': 'a'}", *qa("b")), ["b"], 1, "not JSON"),
    Hostile("trailing-comma.jsonl", lines('{"text": "a",}', *qa("b")), ["b"], 1, "not JSON"),
    Hostile("two-on-a-line.jsonl", lines("".join(qa("a", "c")), *qa("b")), ["b"], 1, "not JSON"),
    Hostile("comment.jsonl", lines("// rows", *qa("b")), ["b"], 1, "not JSON"),
    Hostile(
        "deep.jsonl",
        lines('{"text": "a", "x": ' + "[" * 90_000 + "]" * 90_000 + "}", *qa("b")),
        ["b"],
        1,
        "nested too deep",
    ),
    Hostile(
        "huge-number.jsonl",
        lines('{"text": "a", "n": ' + "9" * 5000 + "}", *qa("b")),
        ["b"],
        1,
        "number that is too long",
    ),
    Hostile("nan.jsonl", lines('{"text": "a", "score": NaN, "more": -Infinity}'), ["a"]),
    Hostile("html.jsonl", lines("<html>", "<body>404</body>", "</html>", *qa("b")), ["b"], 3, "not JSON"),
    Hostile(
        "conflict.jsonl", lines("<<<<<<< HEAD", *qa("a"), "=======", *qa("b"), ">>>>>>> x"), ["a", "b"], 3, "not JSON"
    ),
    Hostile(
        "mixed-shapes.jsonl",
        lines('{"text": "a"}', *qa("b"), json.dumps({"messages": CONVERSATION}), '{"x": 1}'),
        ["a", "b", "a"],
        1,
        "no row format matches",
    ),
    Hostile(
        "a-thousand-columns.jsonl",
        lines(json.dumps({f"c{n}": n for n in range(1000)}), *qa("b")),
        ["b"],
        1,
        "and 970 more",
    ),
    Hostile("any-case.jsonl", lines('{"Question": "q", " ANSWER ": "a"}'), ["a"]),
    Hostile("array-of-texts.jsonl", lines('["a", "b"]', *qa("b")), ["b"], 1, "not list"),
    Hostile(
        "unknown-role.jsonl",
        lines('{"messages": [{"role": "narrator", "content": "x"}]}', *qa("b")),
        ["b"],
        1,
        "role 'narrator'",
    ),
    Hostile(
        "image-part.jsonl",
        lines('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}', *qa("b")),
        ["b"],
        1,
        "not text",
    ),
    Hostile(
        "nameless-call.jsonl",
        lines('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]}', *qa("b")),
        ["b"],
        1,
        "without a name",
    ),
    Hostile(
        "user-calls.jsonl",
        lines('{"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}', *qa("b")),
        ["b"],
        1,
        "has tool calls and the role user",
    ),
    Hostile(
        "bad-tools.jsonl",
        lines(json.dumps({"messages": CONVERSATION, "tools": "call me"}), *qa("b")),
        ["b"],
        1,
        "tools is not JSON",
    ),
    Hostile(
        "bad-label.jsonl",
        lines(json.dumps({"messages": CONVERSATION, "label": "fine"}), *qa("b")),
        ["b"],
        1,
        "label is 'fine'",
    ),
    Hostile(
        "rated-question.jsonl",
        lines(json.dumps({"messages": CONVERSATION[:1], "label": True}), *qa("b")),
        ["b"],
        1,
        "has no response",
    ),
    Hostile(
        "same-sides.jsonl", lines('{"prompt": "q", "chosen": "x", "rejected": "x"}', *qa("b")), ["b"], 1, "are the same"
    ),
    Hostile(
        "pair-without-prompt.jsonl",
        lines('{"chosen": "x", "rejected": "y"}', *qa("b")),
        ["b"],
        1,
        "responses without a prompt",
    ),
]

LONG = "x" * 50_000_000
JSON_FILES = [
    Hostile("bom.json", codecs.BOM_UTF8 + b"[" + lines(*qa("a", "b"), end=b",\r\n") + b"]", ["a", "b"]),
    Hostile("empty.json", b""),
    Hostile("no-rows.json", b" [ ] "),
    Hostile("one-object.json", qa("a")[0].encode(), ["a"]),
    Hostile("really-lines.json", lines(*qa("a", "b"), "oops", *qa("c")), ["a", "b", "c"], 1, "not JSON"),
    Hostile("bad-element.json", lines("[", *qa("a"), ", {a: 1},", *qa("b"), "]"), ["a", "b"], 1, "not JSON"),
    Hostile("no-commas.json", lines("[", *qa("a", "b"), "]"), ["a", "b"]),
    Hostile("comma-at-the-end.json", lines("[", *qa("a"), ",", "]"), ["a"]),
    Hostile("cut-off.json", lines("[", *qa("a"), ",", *qa("b"), ", {", end=b""), ["a", "b"], 2, "ends within"),
    Hostile(
        "open-string.json",
        b"[\n" + lines(*qa("a"), '{"text": "open}', *qa("b"), end=b",\n") + b"\n]",
        ["a", "b"],
        1,
        "string is not closed",
    ),
    Hostile(
        "line-end-in-string.json",
        b"[\n  " + lines(*qa("a"), '{"text": "one\ntwo"}', *qa("b"), end=b",\n  ") + b"\n]",
        ["a", "b"],
        1,
        "not closed on its line",
    ),
    Hostile(
        "missing-brace.json",
        b"[\n" + lines(*qa("a"), '{"text": "open"', *qa("b"), end=b",\n") + b"\n]",
        ["a", "b"],
        1,
        "has no opening bracket",
    ),
    Hostile(
        "extra-brace.json",
        b"[\n" + lines(*qa("a"), '{"text": "c"}}', *qa("b"), end=b",\n") + b"\n]",
        ["a", "c", "b"],
        1,
        "not JSON",
    ),
    Hostile("brackets-in-strings.json", b"[" + lines(*qa('}]"\\', "[{"), end=b",") + b"]", ['}]"\\', "[{"]),
    Hostile(
        "latin-1.json",
        b"[" + lines(*qa("a"), '{"text": "\u00e4"}'.encode("latin-1"), *qa("b"), end=b",") + b"]",
        ["a", "b"],
        1,
        "not UTF-8",
    ),
    Hostile(
        "deep.json",
        b"[" + lines('{"text": "a", "x": ' + "[" * 90_000 + "]" * 90_000 + "}", *qa("b"), end=b",") + b"]",
        ["b"],
        1,
        "nested too deep",
    ),
    Hostile("only-brackets.json", b"[" * 100_000, [], 2, "ends within"),
    Hostile("numbers.json", b'[1, 2.5, true, null, "x"]', [], 5, "must be an object"),
    Hostile("wrapped.json", json.dumps({"data": [{"text": "a"}]}).encode(), [], 1, "columns: `data`"),
    Hostile("two-arrays.json", b"[" + qa("a")[0].encode() + b"]\n[" + qa("b")[0].encode() + b"]", ["a", "b"]),
    Hostile("nul.json", b"\0" * 5000, [], 1, "not JSON"),
    Hostile("50-megabytes.jsonl", lines(*qa("a"), json.dumps({"text": LONG}), *qa("b")), ["a", LONG, "b"]),
    Hostile("50-megabytes.json", b"[" + lines(json.dumps({"text": LONG}), *qa("b"), end=b",") + b"]", [LONG, "b"]),
]

TABLES = [
    Hostile("bom.csv", codecs.BOM_UTF8 + lines("question,answer", "q,a", end=b"\r\n"), ["a"]),
    Hostile("semicolons.csv", lines("question;answer", "q;a, b"), ["a, b"]),
    Hostile("tabs.csv", lines("question\tanswer", "q\ta"), ["a"]),
    Hostile(
        "numbers.csv",
        lines("question,answer", "How many?,42", "When?,2026-11-23", "Really?,TRUE"),
        ["42", "2026-11-23", "TRUE"],
    ),
    Hostile(
        "quoted.csv", lines("question,answer", '"a ""quoted"" q, really","two', 'lines"', "q,b"), ["two\nlines", "b"]
    ),
    Hostile(
        "open-quote.csv", lines("question,answer", "q,a", 'q,"open', "q,b", "q,c"), ["a", "b", "c"], 1, "not closed"
    ),
    Hostile(
        "open-quote-closed-later.csv",
        lines("question,answer", 'q,"open', '"q, too","b"', 'q,"c"'),
        ["b", "c"],
        1,
        "closing quote",
    ),
    Hostile("text-after-quote.csv", lines("question,answer", 'q,"a" b', "q,b"), ["b"], 1, "closing quote"),
    Hostile("quote-in-the-middle.csv", lines("question,answer", 'q,5" pipe', "q,b"), ['5" pipe', "b"]),
    Hostile("too-many-cells.csv", lines("question,answer", "q,a,b,c", "q,b,,"), ["b"], 1, "4 cells"),
    Hostile("too-few-cells.csv", lines("question,answer", "q", "q,b"), ["b"], 1, "response is missing"),
    Hostile("blank-lines.csv", lines("", "question,answer", "", "q,a", "  ", "q,b", ""), ["a", "b"]),
    Hostile("empty-cells.csv", lines("question,answer", ",", "q,a"), ["a"], 1, "is missing"),
    Hostile(
        "latin-1.csv",
        lines("question,answer", "q,\u00e4".encode("latin-1"), "q,b"),
        ["b"],
        1,
        "not UTF-8: byte 0xe4 in column `answer`",
    ),
    Hostile("nul.csv", lines("question,answer", b"q,a\0", "q,b"), ["b"], 1, "NUL"),
    Hostile("same-names.csv", lines("question,answer,answer", "q,a,x", "q,b,b"), ["b"], 1, "twice"),
    Hostile("utf-16.csv", "question,answer\nq,a\n".encode("utf-16"), [], 1, "the whole file: it looks like UTF-16"),
    Hostile("header-alone.csv", b"question,answer\n"),
    Hostile("empty.csv", b""),
    Hostile("long-cell.csv", lines("question,answer", "q," + "y" * 300_000), ["y" * 300_000]),
    Hostile(
        "mixed-shapes.csv", lines("text,question,answer", "a,,", ",q,b", ",q,"), ["a", "b"], 1, "response is missing"
    ),
    Hostile("carriage-returns.csv", b"question,answer\rq,a\r", [], 1, "not CSV"),
    Hostile(
        "quotes-are-text.tsv",
        lines("question\tanswer", 'q\t"Yes" he said', 'q\t"open', "q\tb"),
        ['"Yes" he said', '"open', "b"],
    ),
    Hostile("quoted.tsv", lines("question\tanswer", 'q\t"a\tb"'), ["a\tb"]),
    Hostile("commas.tsv", lines("question\tanswer", "q\ta, b; c"), ["a, b; c"]),
]


def _merge(book: Any) -> None:
    book.active.merge_cells("A2:A4")


def _with_chart(book: Any) -> None:
    book.active["C9"].number_format = "0.00"
    book.create_chartsheet().add_chart(openpyxl.chart.BarChart())


WORKBOOKS = [
    Hostile(
        "numbers.xlsx", workbook([HEAD, ["How many?", 42], ["And?", 1.5], ["Really?", True]]), ["42", "1.5", "true"]
    ),
    Hostile(
        "dates.xlsx",
        workbook(
            [
                HEAD,
                ["q", datetime.date(2026, 11, 23)],
                ["q", datetime.datetime(2026, 11, 23, 9, 30)],
                ["q", datetime.time(9, 30)],
            ]
        ),
        ["2026-11-23", "2026-11-23T09:30:00", "09:30:00"],
    ),
    Hostile("sheets.xlsx", workbook([HEAD, ["q", "a"]], [["text"], ["b"]], []), ["a", "b"]),
    Hostile("one-sheet.xlsx", workbook([HEAD, ["q", "a"]], [["text"], ["b"]]), ["b"], fields={"sheet": "Sheet1"}),
    Hostile(
        "notes-sheet.xlsx",
        workbook([["Notes", None], ["by", "me"]], [HEAD, ["q", "a"]]),
        ["a"],
        1,
        "columns: `notes`|`Notes`",
    ),
    Hostile(
        "no-such-sheet.xlsx",
        workbook([HEAD, ["q", "a"]]),
        [],
        1,
        "there is no sheet `x`; sheets: Sheet",
        {"sheet": "x"},
    ),
    Hostile(
        "merged.xlsx",
        workbook([HEAD, ["q", "a"], [None, "b"], [None, "c"], ["r", "d"]], change=_merge),
        ["a", "b", "c", "d"],
    ),
    Hostile("formula.xlsx", workbook([HEAD, ["q", "=1+1"], ["q", "b"]]), ["b"], 1, "formula in B2 has no cached value"),
    Hostile("computed.xlsx", with_cached_value(workbook([HEAD, ["q", "=1+1"], ["q", "b"]]), "2"), ["2", "b"]),
    Hostile("error.xlsx", workbook([HEAD, ["q", "#N/A"], ["q", "b"]]), ["b"], 1, "the error #N/A in B2"),
    Hostile(
        "gaps.xlsx",
        workbook([[], HEAD, [], ["q", "a"], [None, None], ["q", None], ["q", "b"]], change=_with_chart),
        ["a", "b"],
        1,
        "response is missing",
    ),
    Hostile("empty.xlsx", workbook([])),
    Hostile("not-a-zip.xlsx", b"PK\x03\x04 but no", [], 1, "the whole file"),
    Hostile("empty-file.xlsx", b"", [], 1, "the whole file"),
    Hostile("cut-off.xlsx", workbook([HEAD, ["q", "a"]])[:-900], [], 1, "not a readable Excel workbook"),
    Hostile("compressed.xlsx.gz", compressed(workbook([HEAD, ["q", "a"]]), "gzip"), ["a"]),
]

COLUMNS = [
    Hostile("numbers.parquet", parquet(table(42, 7, None)), ["42", "7"], 1, "response is missing"),
    Hostile("floats.parquet", parquet(table(1.5, float("nan"))), ["1.5"], 1, "response is missing"),
    Hostile("dates.parquet", parquet(table(datetime.date(2026, 11, 23), None)), ["2026-11-23"], 1, "missing"),
    Hostile("bytes.parquet", parquet(table(b"x", b"y")), [], 2, "response is bytes"),
    Hostile(
        "nested.parquet",
        parquet(pa.table({"messages": [CONVERSATION, None, [], [None]]})),
        ["a"],
        3,
        "not a list|no role",
    ),
    Hostile("not-utf-8.parquet", parquet(pa.table({"text": NOT_UTF8})), ["one", "three"], 1, "text can't be read"),
    Hostile(
        "far-dates.parquet",
        parquet(pa.table({"text": ["a", "b"], "at": pa.array([2**60, 0], pa.timestamp("ms"))})),
        ["a", "b"],
    ),
    Hostile(
        "unused-images.parquet", parquet(pa.table({"text": ["a"], "image": [{"bytes": b"\xff", "path": None}]})), ["a"]
    ),
    Hostile("no-rows.parquet", parquet(table("a").slice(0, 0))),
    Hostile("many-groups.parquet", parquet(table(*RESPONSES), row_group_size=7), RESPONSES),
    Hostile("cut-off.parquet", parquet(table("a"))[:-10], [], 1, "not a readable Parquet file"),
    Hostile("text.parquet", b"question,answer\nq,a\n", [], 1, "not a readable Parquet file"),
    Hostile("empty.parquet", b"", [], 1, "not a readable Parquet file"),
    Hostile("compressed.parquet.zst", compressed(parquet(table("a")), "zstd"), ["a"]),
    Hostile("stream.arrow", arrow(table("a", "b")), ["a", "b"]),
    Hostile("file.arrow", arrow(table("a", "b"), stream=False), ["a", "b"]),
    Hostile(
        "cut-off.arrow",
        arrow(table(*RESPONSES), rows=1000)[: -len(arrow(table(*RESPONSES[:1000])))],
        RESPONSES[:2000],
        1,
        "from this line on",
    ),
    Hostile("text.arrow", b"hello\n" * 20, [], 1, "not a readable Arrow file"),
    Hostile(
        "twice.arrow",
        arrow(pa.Table.from_arrays([pa.array(["a", "b"]), pa.array(["x", "b"])], ["text", "text"])),
        ["b"],
        1,
        "twice",
    ),
]

LINES = lines(*qa(*RESPONSES), b"")
TEXTS = [
    Hostile("lines.txt", lines("one", "", "  ", "two", end=b"\r\n"), ["one", "two"]),
    Hostile("bom.txt", codecs.BOM_UTF8 + b"one", ["one"]),
    Hostile("latin-1.txt", lines("one", "\u00e4".encode("latin-1"), "two"), ["one", "two"], 1, "not UTF-8"),
    Hostile("binary.txt", b"one\n\x7fELF\0\0\n", ["one"], 1, "a NUL byte"),
    Hostile("paragraphs.txt", b"\n\na\r\nb\r\n \r\nc\n\n\n", ["a\nb", "c"], fields={"sample_by": "paragraph"}),
    Hostile("document.txt", b"\na\n\nb\n\n", ["a\n\nb"], fields={"sample_by": "document"}),
    Hostile("long-line.txt", b"z" * 5_000_000, ["z" * 5_000_000]),
    Hostile("complete.jsonl.gz", compressed(LINES, "gzip"), RESPONSES),
    Hostile("two-members.jsonl.gz", compressed(LINES, "gzip") * 2, RESPONSES * 2),
    Hostile(
        "rest-of-gz.jsonl.gz",
        compressed(LINES, "gzip") + b"garbage",
        RESPONSES,
        1,
        "from this line on: the compressed file is corrupt",
    ),
    Hostile("rest-of-zst.jsonl.zst", compressed(LINES, "zstd") + b"garbage", RESPONSES, 1, "from this line on"),
    Hostile("not-compressed.jsonl.gz", LINES, [], 1, "the whole file"),
    Hostile("not-compressed.csv.zst", b"question,answer\nq,a\n", [], 1, "the whole file"),
    Hostile("nothing.jsonl.gz", b""),
    Hostile("compressed.csv.GZ", compressed(b"question,answer\nq,a\n", "gzip"), ["a"]),
]

FILES = [*JSON_LINES, *JSON_FILES, *TABLES, *WORKBOOKS, *COLUMNS, *TEXTS]
