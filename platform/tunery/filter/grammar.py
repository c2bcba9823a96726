"""Parse `--by` and `--keep` into scorers and rules of an experiment. No I/O.

--by length=words   --by gopher   --by language=en   --by perplexity=./model   --by "{length: chars, of: whole}"
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
from tunery.spec.scorer_entry import ByOption
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import read_yaml

Scorer = dict[str, Any]
Rule = dict[str, Any]
"""Scorers and rules as in an experiment file. They are validated by the loader of experiments."""

FORMS = "A..B, A.., ..B, >= A, <= A, best 80%, best 1000, lowest 80% or highest 80%"

_WORD = re.compile(r"[a-z][a-z0-9_]*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_ENDS = {"best": None, "lowest": "low", "highest": "high"}


def parse_by(text: str) -> Scorer:
    """Parse `KIND`, `KIND=VALUE`, or a scorer in braces as in an experiment. Raises RequestError."""
    if text.lstrip().startswith("{"):
        scorer = read_yaml(text, "--by").data
        assert isinstance(scorer, dict), "it is in braces"
        return scorer
    kind, equals, value = (part.strip() for part in text.partition("="))
    if kind not in SCORERS:
        raise RequestError(f"`--by {text}` names no score", remedy=nearest(kind, SCORERS))
    form = SCORERS[kind].by_option
    if isinstance(form, str):
        remedy = f"give {form}" if form else "write the scorer in braces, as in an experiment"
        raise RequestError(f"`--by {text}` does not say enough", remedy=remedy)
    if equals and not value:
        raise RequestError(f"`--by {text}` has no value behind `=`", remedy=f"`--by {kind}={_example(form)}`")
    if not value and form.default is None:
        raise RequestError(f"`--by {text}` lacks a value", remedy=f"add {form.required}")
    if value and not form.takes_value:
        raise RequestError(
            f"`--by {text}` has a value, and {kind} takes none",
            remedy=f'`--by {kind}`, or give its settings in braces: `--by "{{{kind}: {{..}}}}"`',
        )
    return {kind: form.settings(value or form.default or ""), **form.fields}


def _example(form: ByOption) -> str:
    return form.required.rstrip("`").rpartition("=")[2] or form.default or "0.8"


def without_value(kind: str) -> Scorer | None:
    """Return the scorer for a rule on `kind`, or None if the kind is unknown or needs a value."""
    form = SCORERS[kind].by_option if kind in SCORERS else ""
    return parse_by(kind) if isinstance(form, ByOption) and form.default is not None else None


def required_value(kind: str) -> str:
    """Describe the value that a `--by` of this kind requires; "" if it requires none."""
    form = SCORERS[kind].by_option if kind in SCORERS else ""
    return form.required if isinstance(form, ByOption) else form


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
    glued = re.match(r"([a-z][a-z0-9_]*)\s*([<>=].*)", text.strip())
    if glued:
        score, rule = glued[1], " ".join(glued[2].split())
    if not _WORD.fullmatch(score) or not rule:
        raise _no_rule(text, "it is a score, a blank and a rule")
    if ".." in rule:
        low, _, high = rule.partition("..")
        if not (low or high):
            raise _no_rule(text, "both ends are open")
        ends = [_number(end, text) if end.strip() else None for end in (low, high)]
        if ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
            raise _no_rule(text, f"the range ends ({high.strip()}) before it begins ({low.strip()})")
        return score, {"range": ends}
    if rule.startswith((">=", "<=")):
        return score, {"threshold": _number(rule[2:], text), "prefer": "high" if rule[0] == ">" else "low"}
    if rule[0] in "<>=":
        remedy = "`>=` and `<=` include their end" if rule[0] != "=" else "for one value give both ends: `gopher 0..0`"
        raise _no_rule(text, f"there is no `{rule.split()[0].rstrip('0123456789.') or rule[0]}`; {remedy}")
    word, _, amount = rule.partition(" ")
    if word not in _ENDS:
        raise _no_rule(text, f"`{rule}` is of no known form")
    end = _ENDS[word]
    end_rule: Rule = {"prefer": end} if end else {}
    if amount.endswith("%"):
        if not 0 < _number(amount[:-1], text) <= 100:
            raise _no_rule(text, f"{amount} is no share of the rows: more than 0% and at most 100%")
        # Decimal division is exact; as floats, 0.7 / 100 is 0.006999999999999999.
        return score, {"keep_fraction": float(Decimal(amount[:-1].strip()) / 100), **end_rule}
    rows = _number(amount, text)
    if not float(rows).is_integer():
        raise _no_rule(text, f"{amount} is no number of rows")
    if rows < 1:
        raise _no_rule(text, "it keeps no row")
    return score, {"top_k": int(rows), **end_rule}


def said(score: str, rule: Rule) -> str:
    """Format a rule as for `--keep`: `parse_keep(said(score, rule))` is `(score, rule)`."""
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
        raise _no_rule(rule, f"`{text}` is no number")
    value = float(text)
    if not math.isfinite(value):
        raise _no_rule(rule, f"{text} is too large for a number")
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else value


def _no_rule(text: str, cause: str) -> RequestError:
    return RequestError(f"`--keep {text}` is no rule", cause=cause, remedy=f"a score and one of: {FORMS}")
