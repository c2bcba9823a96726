"""Parsing of --by and --keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tunery.errors import RequestError
from tunery.filter.grammar import parse_by, parse_keep, said, without_value
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
def test_every_rule_is_read_back_from_how_it_is_said_and_fits_an_experiment(score: str, rule: dict[str, Any]) -> None:
    assert parse_keep(said(score, rule)) == (score, rule)
    Keep.model_validate_json(json.dumps(rule), strict=True)


@given(st.text(max_size=30) | st.from_regex(r"[a-z]{1,5} ?[<>=.0-9% -]{1,12}", fullmatch=True))
def test_whatever_is_said_is_a_rule_or_a_wrong_request(text: str) -> None:
    try:
        score, rule = parse_keep(text)
    except RequestError:
        return
    assert parse_keep(said(score, rule)) == (score, rule)


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
def test_rules(text: str, rule: dict[str, Any]) -> None:
    assert parse_keep(text) == ("length", rule)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("length", "a score, a blank and a rule"),
        ("length ..", "both ends are open"),
        ("length > 3", "`>=` and `<=` include their end"),
        ("length = 3", "give both ends"),
        ("length best", "no number"),
        ("length best 1.5", "no number of rows"),
        ("length best 0", "keeps no row"),
        ("length best 180%", "180% is no share"),
        ("length best 0%", "0% is no share"),
        ("length 5..3", "ends (3) before it begins (5)"),
        ("length most 5", "no known form"),
        ("length >= 1e999", "too large"),
        ("length 3...5..7", "no number"),
        ("Length >= 3", "a score, a blank and a rule"),
    ],
)
def test_what_is_no_rule_says_why_and_names_the_forms(text: str, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_keep(text)
    assert why in caught.value.cause
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
        ("{length: chars, of: whole, name: all}", {"length": "chars", "of": "whole", "name": "all"}),
    ],
)
def test_scores(text: str, scorer: dict[str, Any]) -> None:
    assert parse_by(text) == scorer
    TypeAdapter(Scorer).validate_json(json.dumps(scorer), strict=True)


@pytest.mark.parametrize(
    "text", ["language", "perplexity", "ifd", "contamination", "length=", "gopher=3", "lenght", ""]
)
def test_a_score_that_is_not_said_whole_is_refused_with_what_to_say(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_by(text)
    assert caught.value.remedy


def test_every_kind_of_score_can_be_asked_for() -> None:
    for kind in SCORERS:
        if kind == "embedding":
            with pytest.raises(RequestError, match="does not say enough"):
                parse_by(f"{kind}=x")
            continue
        known = without_value(kind) or parse_by(f"{kind}=x")
        assert next(iter(known)) == kind
