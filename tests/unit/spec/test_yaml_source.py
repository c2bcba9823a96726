"""Parsing of YAML 1.2, in contrast to 1.1, and the line of every key."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.errors import SpecError
from tunery.spec.yaml_source import YamlSource, read_yaml


def read(text: str) -> YamlSource:
    return read_yaml(text, "exp.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "no"),
        ("off", "off"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("+12", 12),
        ("-0", 0),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", "9223372036854775808"),
        ("-" + "9" * 5000, "-" + "9" * 5000),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("12:30:45", "12:30:45"),
        ("2024-05-01", "2024-05-01"),
        ("~", None),
        ("null", None),
        ("", None),
        ("nUll", "nUll"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("1.2.3", "1.2.3"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("'~'", "~"),
        ("''", ""),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, expected: object) -> None:
    value = read(f"key: {text}").data["key"]
    assert value == expected
    assert type(value) is type(expected)


def test_nan_is_a_number() -> None:
    assert math.isnan(read("key: .nan").data["key"])


@pytest.mark.parametrize("style", ["|", ">"])
def test_block_scalars_are_strings(style: str) -> None:
    assert read(f"key: {style}\n  17\n").data == {"key": "17\n"}


@given(st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False).map(float))
def test_numbers_written_by_python_are_read_back(number: float) -> None:
    value = read(f"key: {number!r}".replace("inf", ".inf")).data["key"]
    assert value == number
    assert type(value) is type(number)


def test_keys_are_strings() -> None:
    assert read("1: a\nno: b\n~: c").data == {"1": "a", "no": "b", "~": "c"}


NESTED = """\
# a comment
name: x

stages:
  docs: {kind: dataset,
         source: a.jsonl}
  sets:
    - one
    - two:
        deep: 1
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("stages",), 4),
        (("stages", "docs"), 5),
        (("stages", "docs", "kind"), 5),
        (("stages", "docs", "source"), 6),
        (("stages", "sets", 0), 8),
        (("stages", "sets", 1), 9),
        (("stages", "sets", 1, "two", "deep"), 10),
    ],
)
def test_every_key_and_item_has_its_line(path: tuple[str | int, ...], line: int) -> None:
    assert read(NESTED).lines[path] == line


@pytest.mark.parametrize(
    ("path", "line"), [(("stages", "docs", "split"), 5), (("stages", "sets", 7), 7), (("search", "metric"), 2), ((), 2)]
)
def test_missing_key_has_the_line_of_its_nearest_ancestor(path: tuple[str | int, ...], line: int) -> None:
    assert read(NESTED).line(path) == line


def test_alias_copies_the_value_and_keys_keep_their_lines() -> None:
    source = read("a: &common {rate: 1e-3}\nb: *common\n")
    assert source.data == {"a": {"rate": 1e-3}, "b": {"rate": 1e-3}}
    assert source.line(("a",)) == 1
    assert source.line(("b",)) == 2


def test_empty_file_has_no_data() -> None:
    assert read("").data is None
    assert read("# only a comment\n").data is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\nname: y\n", 2, ["`name` is given twice", "line 1", "rename"]),
        ("a:\n  b: {c: 1,\n      c: 2}\n", 3, ["`a.b.c` is given twice", "line 2"]),
        ("- {a: 1, a: 2}\n", 1, ["`0.a` is given twice"]),
        ("name: x\nseed: a: b\n", 2, ["not valid YAML", "mapping values", "quote text"]),
        ("name: x\n\tseed: 1\n", 2, ["not valid YAML", "\\t"]),
        ("name: [\nseed: 1\n", 3, ["not valid YAML", "flow sequence that starts in line 1"]),
        ("name: 'x\n", 2, ["not valid YAML", "quoted scalar that starts in line 1"]),
        ("name: x\n---\nname: y\n", 2, ["not valid YAML", "another document"]),
        ("name: x\nseed: *nowhere\n", 2, ["not valid YAML", "undefined alias"]),
        ("name: x\nseed: \x00\n", 2, ["0x00", "remove it"]),
        ("name: x\nseed: a\x07\n", 2, ["0x07"]),
        ("a: 1\n? [b, c]\n: 2\n", 2, ["a key must be a word"]),
        ("a: 1\nb: &b [1, *b]\n", 2, ["`b.1` contains itself"]),
        ("a: 1\nb: &b\n  c: *b\n", 2, ["`b.c` contains itself"]),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", 3, ["no merge key `<<`", "write the keys out"]),
        ("a: " + "[" * 1000 + "]" * 1000, 1, ["nested too deep"]),
    ],
)
def test_invalid_yaml_is_an_error_with_file_and_line(text: str, line: int, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert str(caught.value).startswith(f"exp.yaml:{line}: ")
    for word in words:
        assert word in str(caught.value)


@given(st.text(max_size=60) | st.text(alphabet="ab:-?[]{}&*!|>'\"%@#,~ \n\t", max_size=40))
def test_any_text_is_parsed_or_an_error(text: str) -> None:
    line = 1
    try:
        read(text)
    except SpecError as error:
        line = error.line
    assert line >= 1


def test_aliases_that_repeat_each_other_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]  # 9 ** 9 values
    with pytest.raises(SpecError, match=r"the file has [\d,]+ values") as refused:
        read("\n".join(lines))
    assert "aliases" in refused.value.cause


def test_large_file_is_refused() -> None:
    with pytest.raises(SpecError, match="the file has 1,000,012 characters") as refused:
        read("key: " + "x" * 1_000_007)
    assert "data file" in refused.value.remedy


def test_alias_of_a_small_value_is_read() -> None:
    assert read("a: &a {rank: 8}\nb: *a\nc: [*a, *a]").data["c"] == [{"rank": 8}, {"rank": 8}]
