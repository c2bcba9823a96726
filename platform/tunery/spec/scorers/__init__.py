"""Scorers of a `score` stage: the registry `SCORERS` has everything that other packages need to know about a kind.

A scorer is a mapping whose first key is its kind: `{perplexity: base}`. A new scorer: its config and entry in the
module here that fits what it reads, and a file in scoring/scorers/ with the interface of its input kind
(scoring/scorers/interfaces.py); docs/extending.md has all steps.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from tunery.spec.plugins import KindUnion, Registry
from tunery.spec.scorers.corpus_scorers import CORPUS_SCORERS
from tunery.spec.scorers.model_scorers import MODEL_SCORERS
from tunery.spec.scorers.rule_scorers import RULE_SCORERS
from tunery.spec.scorers.scorer_entry import ScorerEntry, ScorerSpec

SCORERS: Registry[ScorerEntry] = Registry("scorers", ScorerEntry, (*MODEL_SCORERS, *RULE_SCORERS, *CORPUS_SCORERS))
"""Every kind of scorer."""


def _scorer_tag(value: Any) -> str:
    """Return the tag of the scorer that a value is closest to, so that errors are about that scorer. Tags differ from
    the keys, because the location of an error contains both, but the file only the key."""
    if isinstance(value, ScorerSpec):
        return f"{value.kind()} scorer"
    if isinstance(value, dict) and value:
        given = [str(key) for key in value]
        exact = [key for key in given if key in SCORERS]
        near = [kind for key in given for kind in difflib.get_close_matches(key, SCORERS, n=1)]
        return f"{(exact or near or given)[0]} scorer"
    return "no scorer"


def _configs_by_tag() -> dict[str, type[ScorerSpec]]:
    return {f"{kind} scorer": entry.config for kind, entry in SCORERS.items()}


Scorer = Annotated[ScorerSpec, KindUnion(_configs_by_tag, _scorer_tag)]
