"""Parsing of --by and --keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tunery.errors import RequestError
from tunery.filter.grammar import format_rule, parse_by, parse_keep, scorer_without_value
from tunery.spec import Keep
from tunery.spec.scorers import SCORERS, Scorer

NUMBERS = st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
SCORES = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True)
ENDS = st.sampled_from([{}, {"prefer": "low"}, {"prefer": "high"}])
SHARES = st.integers(1, 1000).map(lambda tenths: {"keep_fraction": tenths / 1000})
RULES = st.one_of(
    st.tuples(NUMBERS, NUMBERS).map(lambda ends: {"range": sorted(ends)}),
    NUMBERS.map(lambda end: {"range": [end, None]}),
    NUMBERS.map(lambda end: {"range": [None, end]}),
    st.tuples(NUMBERS, st.sampled_from(["low", "high"])).map(lambda r: {"threshold": r[0], "prefer": r[1]}),
    st.tuples(SHARES, ENDS).map(lambda pair: pair[0] | pair[1]),
    st.tuples(st.integers(1, 10**12).map(lambda n: {"top_k": n}), ENDS).map(lambda pair: pair[0] | pair[1]),
)


@given(SCORES, RULES)
def test_formatted_rule_is_parsed_back_and_valid_in_an_experiment(score: str, rule: dict[str, Any]) -> None:
    assert parse_keep(format_rule(score, rule)) == (score, rule)
    Keep.model_validate_json(json.dumps(rule), strict=True)


@given(st.text(max_size=30) | st.from_regex(r"[a-z]{1,5} ?[<>=.0-9% -]{1,12}", fullmatch=True))
def test_any_text_is_a_rule_or_an_error(text: str) -> None:
    try:
        score, rule = parse_keep(text)
    except RequestError:
        return
    assert parse_keep(format_rule(score, rule)) == (score, rule)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("length 3..500", {"range": [3, 500]}),
        ("length 3..", {"range": [3, None]}),
        ("length ..  .5", {"range": [None, 0.5]}),
        ("  length   -2.5 .. 1e3", {"range": [-2.5, 1000.0]}),
        ("length >= 0.1", {"threshold": 0.1, "prefer": "high"}),
        ("length<=0", {"threshold": 0, "prefer": "low"}),
        ("length best 80%", {"keep_fraction": 0.8}),
        ("length best 7%", {"keep_fraction": 0.07}),
        ("length best 1000", {"top_k": 1000}),
        ("length lowest 10", {"top_k": 10, "prefer": "low"}),
        ("length highest 12.5%", {"keep_fraction": 0.125, "prefer": "high"}),
    ],
)
def test_rule_is_parsed(text: str, rule: dict[str, Any]) -> None:
    assert parse_keep(text) == ("length", rule)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("length", "the format is SCORE RULE"),
        ("length ..", "it has no bound"),
        ("length > 3", "use `>=` or `<=`"),
        ("length = 3", "for a single value use"),
        ("length best", "is not a number"),
        ("length best 1.5", "not a number of rows"),
        ("length best 0", "keeps no row"),
        ("length best 180%", "180% is not above 0% and at most 100%"),
        ("length best 0%", "0% is not above 0%"),
        ("length 5..3", "the lower bound 5 is above the upper bound 3"),
        ("length most 5", "is not a known rule"),
        ("length >= 1e999", "too large"),
        ("length 3...5..7", "is not a number"),
        ("Length >= 3", "the format is SCORE RULE"),
    ],
)
def test_invalid_rule_is_an_error_with_cause_and_syntax(text: str, cause: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_keep(text)
    assert cause in caught.value.cause
    assert "best 80%" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "scorer"),
    [
        ("length", {"length": "words"}),
        ("length=chars", {"length": "chars"}),
        ("gopher", {"gopher": {}}),
        ("language=en", {"language": "en"}),
        ("near_duplicates=0.9", {"near_duplicates": {"threshold": 0.9}}),
        ("perplexity=./model", {"perplexity": {"pretrained": "./model"}}),
        ("classifier=./model", {"classifier": {"pretrained": "./model"}, "label": "good"}),
        ("{length: chars, of: all, name: all}", {"length": "chars", "of": "all", "name": "all"}),
    ],
)
def test_score_is_parsed(text: str, scorer: dict[str, Any]) -> None:
    assert parse_by(text) == scorer
    TypeAdapter(Scorer).validate_json(json.dumps(scorer), strict=True)


@pytest.mark.parametrize(
    "text", ["language", "perplexity", "ifd", "contamination", "length=", "gopher=3", "lenght", ""]
)
def test_incomplete_score_is_an_error_with_a_remedy(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_by(text)
    assert caught.value.remedy


def test_every_kind_of_score_can_be_requested() -> None:
    for kind in SCORERS:
        if kind == "embedding":
            with pytest.raises(RequestError, match="is incomplete"):
                parse_by(f"{kind}=x")
            continue
        known = scorer_without_value(kind) or parse_by(f"{kind}=x")
        assert next(iter(known)) == kind
