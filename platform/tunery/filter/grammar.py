"""Parse `--by` and `--keep` into scorers and rules of an experiment. No I/O.

--by length=words   --by gopher   --by language=en   --by perplexity=./model   --by "{length: chars, of: all}"
--keep "length 3..500"         from 3 to 500, both included; either bound may be omitted
--keep "language >= 0.1"       at least 0.1; <= is at most
--keep "perplexity best 80%"   the best 80% of the rows by the score; lowest and highest set the direction explicitly
--keep "random best 1000"      1000 rows
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from tunery.errors import RequestError
from tunery.spec.error_messages import nearest
from tunery.spec.scorers import SCORERS
from tunery.spec.scorers.scorer_entry import ByOption
from tunery.spec.yaml_source import read_yaml

Scorer = dict[str, Any]
Rule = dict[str, Any]
"""Scorers and rules as in an experiment file. They are validated by the loader of experiments."""

RULE_SYNTAX = "A..B, A.., ..B, >= A, <= A, best 80%, best 1000, lowest 80% or highest 80%"

_WORD = re.compile(r"[a-z][a-z0-9_]*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_PREFER = {"best": None, "lowest": "low", "highest": "high"}


def parse_by(text: str) -> Scorer:
    """Parse `KIND`, `KIND=VALUE`, or a scorer in braces as in an experiment. Raises RequestError."""
    if text.lstrip().startswith("{"):
        scorer = read_yaml(text, "--by").data
        assert isinstance(scorer, dict), "it is in braces"
        return scorer
    kind, equals, value = (part.strip() for part in text.partition("="))
    if kind not in SCORERS:
        raise RequestError(f"`--by {text}`: there is no score `{kind}`", remedy=nearest(kind, SCORERS))
    by_option = SCORERS[kind].by_option
    if isinstance(by_option, str):
        remedy = f"use {by_option}" if by_option else "write the scorer in braces, as in an experiment"
        raise RequestError(f"`--by {text}` is incomplete", remedy=remedy)
    if equals and not value:
        raise RequestError(f"`--by {text}` has no value after `=`", remedy=f"`--by {kind}={_example(by_option)}`")
    if not value and by_option.default is None:
        raise RequestError(f"`--by {text}` has no value", remedy=f"add {by_option.required}")
    if value and not by_option.takes_value:
        raise RequestError(
            f"`--by {text}` has a value, but {kind} takes none",
            remedy=f'`--by {kind}`, or write its settings in braces: `--by "{{{kind}: {{..}}}}"`',
        )
    return {kind: by_option.settings(value or by_option.default or ""), **by_option.fields}


def _example(by_option: ByOption) -> str:
    return by_option.required.rstrip("`").rpartition("=")[2] or by_option.default or "0.8"


def scorer_without_value(kind: str) -> Scorer | None:
    """Return the scorer for a rule on `kind`, or None if the kind is unknown or needs a value."""
    by_option = SCORERS[kind].by_option if kind in SCORERS else ""
    return parse_by(kind) if isinstance(by_option, ByOption) and by_option.default is not None else None


def required_value(kind: str) -> str:
    """Describe the value that a `--by` of this kind requires; "" if it requires none."""
    by_option = SCORERS[kind].by_option if kind in SCORERS else ""
    return by_option.required if isinstance(by_option, ByOption) else by_option


def kind_of_scorer(scorer: Scorer) -> str:
    """Return the kind of a scorer: a key that is a known kind, or else its first key."""
    keys = [key for key in scorer if key != "name"]
    return next((key for key in keys if key in SCORERS), keys[0] if keys else "")


def score_of(scorer: Scorer) -> str:
    """Return the name of a scorer's score."""
    return str(scorer.get("name") or next((key for key in scorer if key != "name"), ""))


def parse_keep(text: str) -> tuple[str, Rule]:
    """Parse `SCORE RULE`; return the score, and the rule as in an experiment. Raises RequestError."""
    score, _, rule = text.strip().partition(" ")
    rule = " ".join(rule.split())
    without_space = re.match(r"([a-z][a-z0-9_]*)\s*([<>=].*)", text.strip())
    if without_space:
        score, rule = without_space[1], " ".join(without_space[2].split())
    if not _WORD.fullmatch(score) or not rule:
        raise _invalid_rule(text, "the format is SCORE RULE")
    if ".." in rule:
        low, _, high = rule.partition("..")
        if not (low or high):
            raise _invalid_rule(text, "it has no bound")
        ends = [_number(end, text) if end.strip() else None for end in (low, high)]
        if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
            raise _invalid_rule(text, f"the lower bound {low.strip()} is above the upper bound {high.strip()}")
        return score, {"range": ends}
    if rule.startswith((">=", "<=")):
        return score, {"threshold": _number(rule[2:], text), "prefer": "high" if rule[0] == ">" else "low"}
    if rule[0] in "<>=":
        remedy = "use `>=` or `<=`" if rule[0] != "=" else "for a single value use `gopher 0..0`"
        raise _invalid_rule(text, f"there is no `{rule.split()[0].rstrip('0123456789.') or rule[0]}`; {remedy}")
    word, _, amount = rule.partition(" ")
    if word not in _PREFER:
        raise _invalid_rule(text, f"`{rule}` is not a known rule")
    prefer = _PREFER[word]
    direction: Rule = {"prefer": prefer} if prefer else {}
    if amount.endswith("%"):
        if not 0 < _number(amount[:-1], text) <= 100:
            raise _invalid_rule(text, f"{amount} is not above 0% and at most 100%")
        # Decimal division is exact; as floats, 0.7 / 100 is 0.006999999999999999.
        return score, {"keep_fraction": float(Decimal(amount[:-1].strip()) / 100), **direction}
    rows = _number(amount, text)
    if not float(rows).is_integer():
        raise _invalid_rule(text, f"{amount} is not a number of rows")
    if rows < 1:
        raise _invalid_rule(text, "it keeps no row")
    return score, {"top_k": int(rows), **direction}


def format_rule(score: str, rule: Rule) -> str:
    """Format a rule as for `--keep`: `parse_keep(format_rule(score, rule))` is `(score, rule)`."""
    word = {None: "best", "low": "lowest", "high": "highest"}[rule.get("prefer")]
    if "range" in rule:
        low, high = ("" if end is None else _plain(end) for end in rule["range"])
        return f"{score} {low}..{high}"
    if "threshold" in rule:
        return f"{score} {'>=' if rule['prefer'] == 'high' else '<='} {_plain(rule['threshold'])}"
    if "keep_fraction" in rule:
        return f"{score} {word} {_plain(Decimal(repr(rule['keep_fraction'])) * 100)}%"
    return f"{score} {word} {rule['top_k']}"


def _plain(value: float | Decimal) -> str:
    """Format a number: a Decimal without an exponent, a float with an integer value without `.0`."""
    text = format(value.normalize(), "f") if isinstance(value, Decimal) else repr(value)
    return text.removesuffix(".0")


def _number(text: str, rule: str) -> int | float:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        raise _invalid_rule(rule, f"`{text}` is not a number")
    value = float(text)
    if not math.isfinite(value):
        raise _invalid_rule(rule, f"{text} is too large")
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else value


def _invalid_rule(text: str, cause: str) -> RequestError:
    return RequestError(f"`--keep {text}` is not a rule", cause=cause, remedy=f"use a score and one of: {RULE_SYNTAX}")
