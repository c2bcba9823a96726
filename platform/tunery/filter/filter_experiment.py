"""The experiment that a filter is: dataset -> score -> select, as text. Pure, but for where things lie.

It stands beside the output, so that the filter can be read, kept, edited and run again by `tunery run`.
"""

from __future__ import annotations

import hashlib
import itertools
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
from tunery.selection.thresholds import describe
from tunery.spec import RANDOM, Dataset, Keep
from tunery.spec.error_messages import nearest
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import plain_scalar

MARKER = "# Written by `tunery filter`, which overwrites it: to edit it, copy it. `tunery run` runs it as it is."
"""First line: what has it may be overwritten."""
ROWS, SCORED, KEPT = "rows", "scored", "kept"
"""The stages."""
SEED = 17
MODEL_KINDS = ("perplexity", "ifd", "reward", "classifier", "embedding")
"""Scorers whose own value is a model."""

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
class FilterRequest:
    """The command line. Paths in it are relative to the current folder."""

    sources: tuple[str, ...]
    out: Path
    by: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    any_rule: bool = False
    columns: tuple[str, ...] = ()
    """`ROLE=NAME`, as in a dataset's `columns`."""
    limit: int | None = None
    seed: int = SEED
    scores: bool = False
    """The scores are written behind the rows' own columns."""

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
    options: Mapping[int, str]
    """By line of the text: the option, with its value, that the line comes from."""
    by_options: Sequence[tuple[Scorer, str]] = ()
    """The scorers, with the option that each comes from; paths as on the command line."""

    @property
    def described(self) -> dict[str, str]:
        """By a rule as the select stage describes it: as the command line has it."""
        return {
            describe(score, Keep.model_validate_json(json.dumps(rule), strict=True)): said(score, rule)
            for score, rule in self.keep.items()
        }


def build(asked: FilterRequest, *, answers: bool = True) -> Built:
    """`answers`: the rows have some; those of prompts are judged whole. Raises RequestError for what can't be meant;
    what an experiment can't say is left to its loader."""
    by = [(with_models(parse_by(text)), f"--by {text}") for text in asked.by]
    for scorer, option in by:
        if "embedding" in scorer and not isinstance(scorer.get("reference"), str):
            raise RequestError(
                f"`{option}` gives rows no score",
                cause="an embedding scores a row by the most similar of other rows, and none are named",
                remedy="add rows to be like: `reference: good.jsonl`",
            )
    keep: dict[str, tuple[Rule, str]] = {}
    for text in asked.keep:
        score, rule = parse_keep(text)
        if score in keep:
            raise RequestError(
                f"there are two rules on `{score}`: `{said(score, keep[score][0])}` and `{said(score, rule)}`",
                remedy=f'give one, such as `--keep "{score} 3..500"`',
            )
        keep[score] = rule, f"--keep {text}"
    notes: list[str] = []
    if not by and not keep:
        by = [(scorer, "") for scorer in [*map(parse_by, USUAL_BY), {"gopher": _usual_gopher(answers)}]]
        notes.append(
            "no --by and no --keep: dropping duplicates, near duplicates and what breaks Gopher's rules, "
            "without those that only fit long English pages"
        )
    elif by and not keep:
        notes.append("no --keep: each score has its usual rule")
    if not keep:
        for scorer, option in by:
            kind = next((key for key in scorer if key != "name"), "")
            keep[score_of(scorer)] = parse_keep(f"{RANDOM} {USUAL_KEEP.get(kind, 'best 80%')}")[1], option
        notes.append("rules: " + "; ".join(said(score, rule) for score, (rule, _) in keep.items()))
    made: dict[str, str] = {}
    for scorer, option in by:
        if (name := score_of(scorer)) in made:
            raise RequestError(
                f"`{made[name]}` and `{option}` both give the score `{name}`",
                remedy=f'name one of them, such as `--by "{{length: chars, name: {name}_2}}"`',
            )
        made[name] = option
    for score, (rule, option) in keep.items():
        if score in made or score == RANDOM:
            continue
        if (implied := without_value(score)) is not None:
            by.append((implied, option))
        elif words := asked_for(score):
            raise RequestError(
                f"the rule `{said(score, rule)}` needs to know more about the score",
                remedy=f"add a --by with {words}",
            )
        else:
            known = [*made, RANDOM, *(kind.kind() for kind in SCORERS)]
            raise RequestError(
                f"`{option}` is about `{score}`, and there is no such score", remedy=nearest(score, known)
            )
    text, options = _text(asked, by, keep)
    scorers, rules = [scorer for scorer, _ in by], {score: rule for score, (rule, _) in keep.items()}
    return Built(text, scorers, rules, notes, options, by)


def _usual_gopher(answers: bool) -> dict[str, Any]:
    return {**({} if answers else {"of": "whole"}), **dict.fromkeys(PAGES_ONLY)}


def dataset(asked: FilterRequest, sources: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The stage that reads them, with paths relative to `folder`; None: to the current one, as on the command line."""
    here = [source if folder is None else _from(folder, source) for source in sources]
    stage: dict[str, Any] = {"kind": "dataset", "source": here[0] if len(here) == 1 else here}
    if asked.columns:
        stage["columns"] = dict(_column(text) for text in asked.columns)
    if asked.limit is not None:
        stage["limit"] = asked.limit
    return stage


def dataset_here(asked: FilterRequest, sources: Sequence[str]) -> Dataset:
    """The stage with paths as on the command line. Raises ValidationError."""
    return Dataset.model_validate_json(json.dumps(dataset(asked, sources, None)), strict=True)


def other_rows(scorer: Scorer) -> list[str]:
    """Sources of rows that a scorer compares with."""
    settings = scorer.get("contamination")
    sets = settings.get("sets") if isinstance(settings, dict) else None
    found = [str(source) for source in sets] if isinstance(sets, list) else []
    return [*found, str(scorer["reference"])] if isinstance(scorer.get("reference"), str) else found


def with_models(scorer: Scorer) -> Scorer:
    """A scorer whose model is `{pretrained: ...}`, by whatever words: there is no stage that it could be."""
    found = dict(scorer)
    for kind in MODEL_KINDS:
        if isinstance(found.get(kind), str):
            found[kind] = {"pretrained": found[kind]}
    return found


def model_folder(scorer: Scorer) -> Path | None:
    """Of a scorer whose model is a folder."""
    name = _model_name(scorer)
    return Path(name).expanduser() if name is not None and _is_folder(name) else None


def _model_name(scorer: Scorer) -> str | None:
    models = [scorer[kind] for kind in MODEL_KINDS if isinstance(scorer.get(kind), dict)]
    names = [model["pretrained"] for model in models if isinstance(model.get("pretrained"), str)]
    return names[0] if names else None


class _Lines:
    """The experiment's lines, and the option that each comes from."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.options: dict[int, str] = {}

    def add(self, text: str, option: str = "") -> None:
        self.lines.append(text)
        if option:
            self.options[len(self.lines)] = option

    def stage(self, name: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
        """A stage; each field's value comes with its option, that of a list or mapping with one for each item."""
        self.add(f"  {name}:")
        for key, (value, option) in fields.items():
            if isinstance(option, str):
                self.add(f"    {key}: {_flow(value)}", option)
            elif isinstance(value, list):
                self.add(f"    {key}:")
                for item, of_item in zip(value, option, strict=True):
                    self.add(f"      - {_flow(item)}", of_item)
            else:
                self.add(f"    {key}:")
                for (name_, item), of_item in zip(value.items(), option, strict=True):
                    self.add(f"      {_flow(str(name_))}: {_flow(item)}", of_item)


def _text(
    asked: FilterRequest, by: Sequence[tuple[Scorer, str]], keep: Mapping[str, tuple[Rule, str]]
) -> tuple[str, dict[int, str]]:
    """The experiment, and by line the option that it comes from: each option has lines of its own."""
    out = _Lines()
    for line in (MARKER, f"# {_command(asked)}", f"name: {run_name(asked.out)}"):
        out.add(line)
    out.add(f"seed: {asked.seed}", f"--seed {asked.seed}")
    out.add("stages:")
    fields = _with_options(asked, dataset(asked, asked.sources, asked.file.parent), list(asked.sources))
    out.stage(ROWS, fields)
    scorers: list[tuple[Scorer, str]] = []
    sets = itertools.count(1)
    for scorer, option in by:
        names = []
        for source in other_rows(scorer):
            names.append(f"set{next(sets)}")
            stage = dataset(FilterRequest((), asked.out), [source], asked.file.parent)
            out.stage(names[-1], {key: (value, option) for key, value in stage.items()})
        scorers.append((_in_experiment(asked, scorer, names), option))
    if scorers:
        items, options = [scorer for scorer, _ in scorers], [option for _, option in scorers]
        out.stage(SCORED, {"kind": ("score", ""), "data": (ROWS, ""), "by": (items, options)})
    selected = {"kind": ("select", ""), "data": (SCORED if scorers else ROWS, "")}
    rules, options = {score: rule for score, (rule, _) in keep.items()}, [option for _, option in keep.values()]
    any_rule = {"combine": ("any", "--any")} if asked.any_rule else {}
    out.stage(KEPT, {**selected, "keep": (rules, options), **any_rule})
    # A spreadsheet's filter is nobody's tracked experiment.
    out.add("tracking: {wandb: {mode: disabled}}")
    return "\n".join(out.lines) + "\n", out.options


def _with_options(asked: FilterRequest, stage: Mapping[str, Any], sources: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    options: dict[str, Any] = {
        "source": sources[0] if len(sources) == 1 else sources,
        "columns": [f"--column {text}" for text in {_column(text)[0]: text for text in asked.columns}.values()],
        "limit": f"--limit {asked.limit}",
    }
    return {key: (value, options.get(key, "")) for key, value in stage.items()}


def _in_experiment(asked: FilterRequest, scorer: Scorer, sets: Sequence[str]) -> Scorer:
    """The scorer with its model's path as the experiment has it, and stages for the sources that it names."""
    found = dict(scorer)
    for kind in MODEL_KINDS:
        model = found.get(kind)
        if isinstance(model, dict) and isinstance(name := model.get("pretrained"), str) and _is_folder(name):
            found[kind] = {**model, "pretrained": _folder_from(asked.file.parent, name)}
    names = list(sets)
    if isinstance(found.get("reference"), str):
        found["reference"] = names.pop()
    if names:
        found["contamination"] = {**found["contamination"], "sets": names}
    return found


def run_name(out: Path) -> str:
    """Of the run: by the output's name, and where it lies, since two folders may each have a `good.csv`."""
    where = hashlib.sha256(str(out.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:4]
    return f"filter-{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.stem)[:40]}-{where}"


def _command(asked: FilterRequest) -> str:
    words = ["tunery", "filter", *asked.sources, "--out", str(asked.out)]
    for option, values in (("--by", asked.by), ("--keep", asked.keep), ("--column", asked.columns)):
        words += [word for value in values for word in (option, value)]
    words += ["--any"] * asked.any_rule + ["--scores"] * asked.scores
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
    """A path that starts at the current folder as one that starts at `folder`."""
    if "://" in source or source.startswith(("builtin:", "hub:", "~", "/")):
        return source
    # `..` leads out of the folder that a link points to, not out of the one that the link is in.
    return os.path.relpath(source, os.path.realpath(folder))


def paths_in_experiment(asked: FilterRequest, built: Built) -> dict[str, str]:
    """Where a source or model folder has another path in the experiment: by that path the one on the command line."""
    folder = asked.file.parent
    sources = [*asked.sources, *(source for scorer, _ in built.by_options for source in other_rows(scorer))]
    models = [name for scorer, _ in built.by_options if (name := _model_name(scorer)) and _is_folder(name)]
    found = {_from(folder, source): source for source in sources} | {
        _folder_from(folder, name): name for name in models
    }
    return {written: given for written, given in found.items() if written != given}


def _is_folder(name: str) -> bool:
    """Of a model: `./model` is a folder; so is `model`, where there is such a one. Else it is a hub name."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def _folder_from(folder: Path, name: str) -> str:
    path = _from(folder, name)
    return path if path.startswith(("../", "/", "~")) else f"./{path}"


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
