"""Build the experiment of a filter as text: dataset -> score -> select. No I/O except for resolving paths.

The experiment is written beside the output, so that the filter can be read, kept, copied and run again by `tunery run`.
"""

from __future__ import annotations

import copy
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

from pydantic import ValidationError

from tunery.errors import RequestError
from tunery.filter.grammar import (
    Rule,
    Scorer,
    format_rule,
    kind_of_scorer,
    parse_by,
    parse_keep,
    required_value,
    score_of,
    scorer_without_value,
)
from tunery.selection.thresholds import describe
from tunery.spec import RANDOM, Dataset, Keep, ScorerEntry, ScorerSpec
from tunery.spec.error_messages import nearest
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import plain_scalar

MARKER = "# Written by `tunery filter`, which overwrites it: copy it to edit it. Run it with `tunery run`."
"""First line of a generated experiment. Files that start with it may be overwritten."""
ROWS, SCORED, KEPT = "rows", "scored", "kept"
"""Stage names."""
SEED = 17

# Default scores without --by and --keep: they detect defects in rows of any kind, in any language. They do not include
# length (the reader already quarantines empty texts), language (only the user knows the expected one), C4 (rules for
# web pages) and scorers that need a model.
DEFAULT_BY: tuple[str, ...] = ("duplicates=normalised", "near_duplicates")
PAGE_RULES = (
    "words_min",  # a good response may be one word
    "mean_word_min",  # and that word may be a number
    "mean_word_max",  # code, German, scripts without spaces
    "alphabetic_words_min",  # code and numbers
    "stop_words_min",  # English
    "bullet_lines_max",  # a response may be a list
    "top_2gram_max",  # a dozen words easily repeat a 2-gram; the rules on 5- to 10-grams still find repetitive text
    "top_3gram_max",
    "top_4gram_max",
)
"""Gopher rules that short responses, code or languages other than English may violate without being of low quality."""


@dataclass(frozen=True)
class FilterRequest:
    """The command line. Paths are relative to the current folder."""

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
    """Whether to write the scores after the rows' own columns."""

    @property
    def file(self) -> Path:
        """Path of the generated experiment."""
        return self.out.with_suffix(".yaml")


@dataclass(frozen=True)
class GeneratedExperiment:
    """A generated experiment."""

    text: str
    by: list[Scorer]
    keep: dict[str, Rule]
    notes: list[str]
    """Defaults that were used."""
    options: Mapping[int, str]
    """Command-line option with its value, by number of the line that it produced in `text`."""
    by_options: Sequence[tuple[Scorer, str]] = ()
    """Scorers with the option that each comes from; paths as on the command line."""

    @property
    def given_rules(self) -> dict[str, str]:
        """Map rules as described by the select stage to rules as on the command line."""
        return {
            describe(score, Keep.model_validate_json(json.dumps(rule), strict=True)): format_rule(score, rule)
            for score, rule in self.keep.items()
        }


def generate_experiment(request: FilterRequest, *, has_responses: bool = True) -> GeneratedExperiment:
    """Generate the experiment of a filter. `has_responses`: whether the rows have responses; otherwise the default
    Gopher score covers the complete row.

    Raises RequestError for invalid or contradictory options; values that are invalid in an experiment are left to its
    loader.
    """
    by = [(with_pretrained(parse_by(text)), f"--by {text}") for text in request.by]
    for scorer, option in by:
        if (config := _config(scorer)) is not None and config.returns_embeddings:
            raise RequestError(
                f"`{option}` computes no score",
                cause=f"`{config.kind()}` scores a row by its similarity to reference rows, and there are none",
                remedy="add reference rows: `reference: good.jsonl`",
            )
    keep: dict[str, tuple[Rule, str]] = {}
    for text in request.keep:
        score, rule = parse_keep(text)
        if score in keep:
            raise RequestError(
                f"there are two rules on `{score}`: `{format_rule(score, keep[score][0])}` and "
                f"`{format_rule(score, rule)}`",
                remedy=f'use one, for example `--keep "{score} 3..500"`',
            )
        keep[score] = rule, f"--keep {text}"
    notes: list[str] = []
    if not by and not keep:
        by = [(scorer, "") for scorer in [*map(parse_by, DEFAULT_BY), {"gopher": _default_gopher(has_responses)}]]
        notes.append(
            "no --by and no --keep: dropping duplicates, near duplicates and rows that violate Gopher's rules, except "
            "the rules for long English pages"
        )
    elif by and not keep:
        notes.append("no --keep: each score has its default rule")
    if not keep:
        for scorer, option in by:
            kind = kind_of_scorer(scorer)
            default_rule = SCORERS[kind].default_rule if kind in SCORERS else ScorerEntry.default_rule
            keep[score_of(scorer)] = parse_keep(f"{RANDOM} {default_rule}")[1], option
        notes.append("rules: " + "; ".join(format_rule(score, rule) for score, (rule, _) in keep.items()))
    options_by_score: dict[str, str] = {}
    for scorer, option in by:
        if (name := score_of(scorer)) in options_by_score:
            raise RequestError(
                f"`{options_by_score[name]}` and `{option}` both compute the score `{name}`",
                remedy=f'rename one of them, for example `--by "{{length: chars, name: {name}_2}}"`',
            )
        options_by_score[name] = option
    for score, (rule, option) in keep.items():
        if score in options_by_score or score == RANDOM:
            continue
        if (implied := scorer_without_value(score)) is not None:
            by.append((implied, option))
        elif value := required_value(score):
            raise RequestError(
                f"the score of the rule `{format_rule(score, rule)}` needs a value",
                remedy=f"add a --by with {value}",
            )
        else:
            known = [*options_by_score, RANDOM, *SCORERS]
            raise RequestError(f"`{option}`: there is no score `{score}`", remedy=nearest(score, known))
    text, options = _text(request, by, keep)
    scorers, rules = [scorer for scorer, _ in by], {score: rule for score, (rule, _) in keep.items()}
    return GeneratedExperiment(text, scorers, rules, notes, options, by)


def _default_gopher(has_responses: bool) -> dict[str, Any]:
    return {**({} if has_responses else {"of": "all"}), **dict.fromkeys(PAGE_RULES)}


def dataset(request: FilterRequest, sources: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Return the dataset stage for the sources, with paths relative to `folder`, or unchanged if it is None."""
    paths = [source if folder is None else _from(folder, source) for source in sources]
    stage: dict[str, Any] = {"kind": "dataset", "source": paths[0] if len(paths) == 1 else paths}
    if request.columns:
        stage["columns"] = dict(_column(text) for text in request.columns)
    if request.limit is not None:
        stage["limit"] = request.limit
    return stage


def dataset_from_cwd(request: FilterRequest, sources: Sequence[str]) -> Dataset:
    """Return the dataset stage with paths as on the command line. Raises ValidationError."""
    return Dataset.model_validate_json(json.dumps(dataset(request, sources, None)), strict=True)


def _config(scorer: Scorer) -> ScorerSpec | None:
    """Return the validated config of a scorer; None if it is invalid, which the loader of experiments reports."""
    entry = SCORERS.get(kind_of_scorer(scorer))
    try:
        return entry.config.model_validate_json(json.dumps(scorer), strict=True) if entry is not None else None
    except ValidationError:
        return None


def _row_fields(scorer: Scorer) -> dict[tuple[str | int, ...], str]:
    """Return the sources of the rows that a scorer compares with, by their path in it."""
    config = _config(scorer)
    return {item.path: item.stage for item in config.inputs()} if config is not None else {}


def reference_sources(scorer: Scorer) -> list[str]:
    """Return the sources of the rows that a scorer compares with."""
    return list(_row_fields(scorer).values())


def _model_key(scorer: Scorer) -> str | None:
    """Return the key whose value is the model of a scorer."""
    kind = kind_of_scorer(scorer)
    return kind if kind in SCORERS and SCORERS[kind].needs_model else None


def with_pretrained(scorer: Scorer) -> Scorer:
    """Return a scorer with its model as `{pretrained: ...}`. A model given as a string is not a stage, since the
    experiment of a filter trains no model."""
    key = _model_key(scorer)
    return {**scorer, key: {"pretrained": scorer[key]}} if key and isinstance(scorer[key], str) else scorer


def model_folder(scorer: Scorer) -> Path | None:
    """Return the folder of a scorer's model; None if the scorer has no model or a hub name."""
    name = _model_name(scorer)
    return Path(name).expanduser() if name is not None and _is_folder(name) else None


def _model_name(scorer: Scorer) -> str | None:
    model = scorer[key] if (key := _model_key(scorer)) else None
    name = model.get("pretrained") if isinstance(model, dict) else None
    return name if isinstance(name, str) else None


class _Lines:
    """Lines of the experiment, and the option that each comes from."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.options: dict[int, str] = {}

    def add(self, text: str, option: str = "") -> None:
        self.lines.append(text)
        if option:
            self.options[len(self.lines)] = option

    def stage(self, name: str, fields: Mapping[str, tuple[Any, Any]]) -> None:
        """Add a stage. `fields`: (value, option) by name; with a list of options, each item of the value (a list or a
        mapping) is on its own line."""
        self.add(f"  {name}:")
        for key, (value, option) in fields.items():
            if isinstance(option, str):
                self.add(f"    {key}: {_flow(value)}", option)
            elif isinstance(value, list):
                self.add(f"    {key}:")
                for item, item_option in zip(value, option, strict=True):
                    self.add(f"      - {_flow(item)}", item_option)
            else:
                self.add(f"    {key}:")
                for (name_, item), item_option in zip(value.items(), option, strict=True):
                    self.add(f"      {_flow(str(name_))}: {_flow(item)}", item_option)


def _text(
    request: FilterRequest, by: Sequence[tuple[Scorer, str]], keep: Mapping[str, tuple[Rule, str]]
) -> tuple[str, dict[int, str]]:
    """Return the experiment, and the option by line number. Each line comes from at most one option."""
    out = _Lines()
    for line in (MARKER, f"# {_command(request)}", f"name: {run_name(request.out)}"):
        out.add(line)
    out.add(f"seed: {request.seed}", f"--seed {request.seed}")
    out.add("stages:")
    fields = _with_options(request, dataset(request, request.sources, request.file.parent), list(request.sources))
    out.stage(ROWS, fields)
    scorers: list[tuple[Scorer, str]] = []
    sets = itertools.count(1)
    for scorer, option in by:
        names = []
        for source in reference_sources(scorer):
            names.append(f"set{next(sets)}")
            stage = dataset(FilterRequest((), request.out), [source], request.file.parent)
            out.stage(names[-1], {key: (value, option) for key, value in stage.items()})
        scorers.append((_in_experiment(request, scorer, names), option))
    if scorers:
        items, options = [scorer for scorer, _ in scorers], [option for _, option in scorers]
        out.stage(SCORED, {"kind": ("score", ""), "data": (ROWS, ""), "by": (items, options)})
    selected = {"kind": ("select", ""), "data": (SCORED if scorers else ROWS, "")}
    rules, options = {score: rule for score, (rule, _) in keep.items()}, [option for _, option in keep.values()]
    any_rule = {"combine": ("any", "--any")} if request.any_rule else {}
    out.stage(KEPT, {**selected, "keep": (rules, options), **any_rule})
    # Filtering a file is not an experiment to track.
    out.add("tracking: {wandb: {mode: disabled}}")
    return "\n".join(out.lines) + "\n", out.options


def _with_options(
    request: FilterRequest, stage: Mapping[str, Any], sources: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    options: dict[str, Any] = {
        "source": sources[0] if len(sources) == 1 else sources,
        "columns": [f"--column {text}" for text in {_column(text)[0]: text for text in request.columns}.values()],
        "limit": f"--limit {request.limit}",
    }
    return {key: (value, options.get(key, "")) for key, value in stage.items()}


def _in_experiment(request: FilterRequest, scorer: Scorer, sets: Sequence[str]) -> Scorer:
    """Return the scorer with its model's path relative to the experiment, and its sources replaced with the stages
    `sets`."""
    result = copy.deepcopy(scorer)
    if (name := _model_name(result)) is not None and _is_folder(name):
        result[kind_of_scorer(result)]["pretrained"] = _folder_from(request.file.parent, name)
    for (*parents, last), stage in zip(_row_fields(scorer), sets, strict=True):
        node: Any = result
        for key in parents:
            node = node[key]
        node[last] = stage
    return result


def run_name(out: Path) -> str:
    """Return the name of the run: the output's name with a hash of its path, since two folders may each have a
    `good.csv`."""
    digest = hashlib.sha256(str(out.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:4]
    return f"filter-{re.sub(r'[^A-Za-z0-9_.-]+', '-', out.stem)[:40]}-{digest}"


def _command(request: FilterRequest) -> str:
    words = ["tunery", "filter", *request.sources, "--out", str(request.out)]
    for option, values in (("--by", request.by), ("--keep", request.keep), ("--column", request.columns)):
        words += [word for value in values for word in (option, value)]
    words += ["--any"] * request.any_rule + ["--scores"] * request.scores
    words += ["--limit", str(request.limit)] if request.limit is not None else []
    words += ["--seed", str(request.seed)] if request.seed != SEED else []
    return " ".join(shlex.join(words).splitlines())


def _column(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not (role and equals and name):
        raise RequestError(f"`--column {text}` is not ROLE=NAME", remedy="for example `--column prompt=Frage`")
    return role.strip(), name


def _from(folder: Path, source: str) -> str:
    """Convert a path relative to the current folder to one relative to `folder`; leave URLs and absolute paths
    unchanged."""
    if "://" in source or source.startswith(("builtin:", "hub:", "~", "/")):
        return source
    # If `folder` is a symbolic link, `..` is the parent of its target, not of the link.
    return os.path.relpath(source, os.path.realpath(folder))


def paths_in_experiment(request: FilterRequest, generated: GeneratedExperiment) -> dict[str, str]:
    """Map paths of sources and model folders in the experiment to those on the command line, where they differ."""
    folder = request.file.parent
    references = [source for scorer, _ in generated.by_options for source in reference_sources(scorer)]
    models = [name for scorer, _ in generated.by_options if (name := _model_name(scorer)) and _is_folder(name)]
    paths = {_from(folder, source): source for source in [*request.sources, *references]} | {
        _folder_from(folder, name): name for name in models
    }
    return {written: given for written, given in paths.items() if written != given}


def _is_folder(name: str) -> bool:
    """Whether a model is a folder: `./model` always is, `model` if the folder exists; otherwise it is a hub name."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).is_dir()


def _folder_from(folder: Path, name: str) -> str:
    path = _from(folder, name)
    return path if path.startswith(("../", "/", "~")) else f"./{path}"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _flow(value: Any) -> str:
    """Format a value as YAML on one line. Plain words are not quoted; other strings are quoted as in JSON."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and plain_scalar(value) == value:
            return value
        # YAML reads JSON's escaped surrogate pairs as two characters, so only unprintable characters are escaped.
        quoted = json.dumps(value, ensure_ascii=False)
        return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)
    return json.dumps(value)
