"""The experiment that a filter is: dataset -> score -> select, as text. Pure, but for where things lie.

It stands beside the output, so that the filter can be read, kept, edited and run again by `tunery run`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import RequestError
from tunery.filter.grammar import Rule, Scorer, asked_for, parse_by, parse_keep, said, score_of, without_value
from tunery.spec import RANDOM
from tunery.spec.yaml_source import plain_scalar

MARKER = "# Written by `tunery filter`, which writes it anew: to edit it, copy it. `tunery run` runs it as it is."
"""First line: what has it may be overwritten."""
ROWS, SCORED, KEPT = "rows", "scored", "kept"
"""The stages."""
SEED = 17

# Without --by and --keep: what is wrong with a row of any kind, in any language. Not among them: length (the reader
# puts empty texts into quarantine already), language (which one is yours to say), C4 (rules about web pages) and
# whatever needs a model.
USUAL_BY: tuple[str, ...] = ("duplicates=normalised", "near_duplicates")
PAGES_ONLY = (
    "words_min",  # a good answer may be one word
    "mean_word_min",  # and that word a number
    "mean_word_max",  # code, German, scripts without spaces
    "alphabetic_words_min",  # code and numbers
    "stop_words_min",  # English
    "bullet_lines_max",  # an answer may be a list
    "top_2gram_max",  # of a dozen words two are soon the same; the rules on 5 to 10 words still find what repeats
    "top_3gram_max",
    "top_4gram_max",
)
"""Gopher's rules that a short answer, code or another language than English violates without being bad."""

USUAL_KEEP: Mapping[str, str] = {
    "perplexity": "best 80%",  # as in experiments/quickstart.yaml
    "ifd": "best 80%",
    "reward": "best 80%",
    "classifier": ">= 0.5",
    "embedding": "best 80%",
    "length": "1..",
    "gopher": "<= 0",  # the paper drops a page for one violation
    "c4": "<= 0",
    "language": ">= 0.1",  # see spec/scorers.py: 0.9 drops a third of what is English
    "duplicates": "<= 0",
    "near_duplicates": "<= 0",
    "contamination": "<= 0",
}
"""The rule of a score that is asked for without any `--keep`."""


@dataclass(frozen=True)
class Asked:
    """The command's words."""

    sources: tuple[str, ...]
    out: Path
    by: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    any_rule: bool = False
    columns: tuple[str, ...] = ()
    """`ROLE=NAME`, as in a dataset's `columns`."""
    limit: int | None = None
    seed: int = SEED

    @property
    def file(self) -> Path:
        """Where the experiment stands."""
        return self.out.with_suffix(".yaml")


@dataclass(frozen=True)
class Built:
    text: str
    by: list[Scorer]
    keep: dict[str, Rule]
    notes: list[str]
    """What was chosen without being asked for."""


def build(asked: Asked, *, answers: bool = True) -> Built:
    """`answers`: the rows have some; those of prompts are judged whole. Raises RequestError for what can't be meant;
    what an experiment can't say is left to its loader."""
    by = [parse_by(text) for text in asked.by]
    keep: dict[str, Rule] = {}
    for text in asked.keep:
        score, rule = parse_keep(text)
        if score in keep:
            raise RequestError(
                f"there are two rules on `{score}`: `{said(score, keep[score])}` and `{said(score, rule)}`",
                remedy=f'give one, such as `--keep "{score} 3..500"`',
            )
        keep[score] = rule
    notes: list[str] = []
    if not by and not keep:
        by = [*map(parse_by, USUAL_BY), {"gopher": _usual_gopher(answers)}]
        notes.append(
            "no --by and no --keep: dropping duplicates, near duplicates and what breaks Gopher's rules, "
            "without those that only fit long English pages"
        )
    elif by and not keep:
        notes.append("no --keep: each score has its usual rule")
    if not keep:
        for scorer in by:
            kind = next((key for key in scorer if key != "name"), "")
            keep[score_of(scorer)] = parse_keep(f"{RANDOM} {USUAL_KEEP.get(kind, 'best 80%')}")[1]
        notes.append("rules: " + "; ".join(said(score, rule) for score, rule in keep.items()))
    made = {score_of(scorer) for scorer in by}
    for score in keep:
        if score in made or score == RANDOM:
            continue
        if (implied := without_value(score)) is not None:
            by.append(implied)
        elif words := asked_for(score):
            raise RequestError(
                f"the rule `{said(score, keep[score])}` needs to know more about the score",
                remedy=f"add a --by with {words}",
            )
    return Built(_text(asked, by, keep), by, keep, notes)


def _usual_gopher(answers: bool) -> dict[str, Any]:
    return {**({} if answers else {"of": "whole"}), **dict.fromkeys(PAGES_ONLY)}


def dataset(asked: Asked, sources: Sequence[str]) -> dict[str, Any]:
    """The stage that reads them."""
    here = [_from(asked.file.parent, source) for source in sources]
    stage: dict[str, Any] = {"kind": "dataset", "source": here[0] if len(here) == 1 else here}
    if asked.columns:
        stage["columns"] = dict(_column(text) for text in asked.columns)
    if asked.limit is not None:
        stage["limit"] = asked.limit
    return stage


def _text(asked: Asked, by: Sequence[Scorer], keep: Mapping[str, Rule]) -> str:
    stages: dict[str, dict[str, Any]] = {ROWS: dataset(asked, asked.sources)}
    scorers = []
    for scorer in by:
        if "contamination" in scorer:
            scorer = {**scorer, "contamination": _with_sets(asked, scorer["contamination"], stages)}
        for kind in ("perplexity", "ifd"):
            if isinstance(model := scorer.get(kind), dict) and isinstance(model.get("pretrained"), str):
                scorer = {**scorer, kind: {**model, "pretrained": _model(asked, model["pretrained"])}}
        scorers.append(scorer)
    if scorers:
        stages[SCORED] = {"kind": "score", "data": ROWS, "by": scorers}
    stages[KEPT] = {"kind": "select", "data": SCORED if scorers else ROWS, "keep": dict(keep)}
    if asked.any_rule:
        stages[KEPT]["combine"] = "any"
    lines = [MARKER, f"# {_command(asked)}", f"name: {run_name(asked.out)}", f"seed: {asked.seed}", "stages:"]
    lines += [f"  {name + ':':8} {_flow(stage)}" for name, stage in stages.items()]
    # A spreadsheet's filter is nobody's tracked experiment.
    lines += ["tracking: {wandb: {mode: disabled}}"]
    return "\n".join(lines) + "\n"


def _with_sets(asked: Asked, settings: Any, stages: dict[str, dict[str, Any]]) -> Any:
    """The sets that `contamination` names are sources here: each becomes a stage."""
    if not isinstance(settings, dict) or not isinstance(settings.get("sets"), list):
        return settings
    names = []
    for source in settings["sets"]:
        names.append(f"set{len(stages)}")
        stages[names[-1]] = dataset(Asked((), asked.out), [str(source)])
    return {**settings, "sets": names}


def run_name(out: Path) -> str:
    """Of the run: by the output's name, and where it lies, since two folders may each have a `good.csv`."""
    where = hashlib.sha256(str(out.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:4]
    return f"filter-{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.stem)[:40]}-{where}"


def _command(asked: Asked) -> str:
    words = ["tunery", "filter", *asked.sources, "--out", str(asked.out)]
    for option, values in (("--by", asked.by), ("--keep", asked.keep), ("--column", asked.columns)):
        words += [word for value in values for word in (option, value)]
    words += ["--any"] * asked.any_rule
    words += ["--limit", str(asked.limit)] if asked.limit is not None else []
    words += ["--seed", str(asked.seed)] if asked.seed != SEED else []
    return " ".join(shlex.join(words).splitlines())


def _column(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not (role and equals and name):
        raise RequestError(
            f"`--column {text}` names no column", remedy="say what it is and how it is called: `--column prompt=Frage`"
        )
    return role.strip(), name


def _from(folder: Path, source: str) -> str:
    """A path as given here, as the experiment has it: relative to its own folder."""
    if "://" in source or source.startswith(("builtin:", "hub:", "~", "/")):
        return source
    return os.path.relpath(source, folder)


def _model(asked: Asked, name: str) -> str:
    """`./model` is a folder; so is `model`, where there is such a one."""
    if name.startswith(("/", "~")) or not (name.startswith(("./", "../")) or Path(name).is_dir()):
        return name
    path = os.path.relpath(name, asked.file.parent)
    return path if path.startswith("../") else f"./{path}"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _flow(value: Any) -> str:
    """YAML in one line. Words stand as they are, other texts as JSON has them."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and plain_scalar(value) == value:
            return value
        # YAML reads JSON's escapes of surrogate pairs as two halves: other characters than control ones stay.
        quoted = json.dumps(value, ensure_ascii=False)
        return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
    return json.dumps(value)
