"""Write docs/experiment-reference.md: every key of an experiment, from the schema in tunery.spec.

PYTHONPATH=platform:tests/support python tests/support/experiment_reference.py
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from tunery.spec import (
    STAGE_KINDS,
    TRAINERS,
    C4Rules,
    ChainOfThought,
    Compute,
    Experiment,
    FewShot,
    GopherRules,
    Lora,
    Pretrained,
    PythonReward,
    Sampling,
    ScorerSpec,
    Scratch,
    Search,
    Tracking,
    Training,
    Wandb,
)
from tunery.spec.feedback import Kl, Ptx
from tunery.spec.scorers import SCORERS
from tunery.spec.scorers.corpus_scorers import ContaminationSettings, NearDuplicatesSettings
from tunery.spec.search import Budget, Constraint, Dimension, Objective
from tunery.spec.stages import Diverse, Keep, Quota
from tunery.spec.trainings import PositiveNegative, ReviewLabels, ScheduleOverride
from tunery.spec.tuners import ADAPTERS, LoraTuner, TunerSpec

PATH = Path(__file__).parents[2] / "docs" / "experiment-reference.md"
STAGES: dict[str, type[BaseModel]] = {kind: spec.config for kind, spec in STAGE_KINDS.items()}

SECTIONS: dict[type[BaseModel], str] = {
    Pretrained: "Pretrained model",
    Scratch: "New model",
    LoraTuner: "LoRA",
    Lora: "LoRA settings",
    PositiveNegative: "Two labelled stages",
    ReviewLabels: "Labels from a review",
    ScheduleOverride: "Scheduled change",
    Keep: "Rule",
    Quota: "Quota",
    Diverse: "Diversity",
    FewShot: "Few-shot examples",
    ChainOfThought: "Chain of thought",
    Sampling: "Sampling",
    PythonReward: "Python reward",
    Kl: "KL penalty",
    Ptx: "PPO-ptx",
    GopherRules: "Gopher rules",
    C4Rules: "C4 rules",
    NearDuplicatesSettings: "Near-duplicate settings",
    ContaminationSettings: "Contamination settings",
    Compute: "compute",
    Tracking: "tracking",
    Wandb: "tracking.wandb",
    Search: "search",
    Dimension: "Dimension",
    Objective: "Further metric",
    Constraint: "Constraint",
    Budget: "Budget",
}
"""Nested mappings that have their own section, with its title."""

STAGE_REFERENCES = {
    *((cls, "data") for cls in STAGES.values()),
    (STAGES["augment"], "heldout"),
    (Keep, "match_count_of"),
    (FewShot, "examples"),
    (PositiveNegative, "good"),
    (PositiveNegative, "bad"),
    (ReviewLabels, "review"),
    (Ptx, "data"),
    (ContaminationSettings, "sets"),
    *((entry.config, "reference") for entry in SCORERS.values()),
}
"""Fields whose strings are names of stages."""

PER_KIND = ("kind", "data", "model")
"""Keys of a training whose type depends on its kind."""
TYPES = {
    "stages": "mapping of name to [stage](#stages)",
    "eval_data": "stage; in `classifier` the forms of `data`",
    "space": "mapping of path to [Dimension](#dimension)",
}
"""Types that differ from the annotation."""

HEAD = """\
# Experiment reference

Every key of an experiment file. This page is generated from the schema
(`PYTHONPATH=platform:tests/support python tests/support/experiment_reference.py`); a test compares the two.

- An experiment is a YAML 1.2 mapping. Unknown keys, duplicate keys and the merge key `<<` are refused.
- "required" in the column *default* means that the key has no default. `null` means "not set".
- A **stage** is given by its name in `stages`. Every key of a stage belongs to its cache key; `compute` and `tracking`
  belong to none.
- Fractions are numbers between 0 and 1, lengths are in tokens unless the description says otherwise.
"""


def slug(title: str) -> str:
    """Return the anchor that GitHub generates for a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def link(title: str) -> str:
    return f"[{title}](#{slug(title)})"


def _bounds(metadata: Iterable[Any]) -> str:
    bounds = []
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            if isinstance(bound, annotated_types.Ge):
                bounds.append(f"≥ {bound.ge:g}")
            elif isinstance(bound, annotated_types.Gt):
                bounds.append(f"> {bound.gt:g}")
            elif isinstance(bound, annotated_types.Le):
                bounds.append(f"≤ {bound.le:g}")
            elif isinstance(bound, annotated_types.Lt):
                bounds.append(f"< {bound.lt:g}")
    return " " + ", ".join(bounds) if bounds else ""


def type_text(annotation: Any, stage: bool = False) -> str:
    """Return the type as a user writes its values. `stage`: strings are names of stages."""
    if isinstance(annotation, FieldInfo):
        return type_text(annotation.annotation, stage) + _bounds(annotation.metadata)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        tags = [item.tag for item in metadata if isinstance(item, Tag)]
        if tags == ["mixture"]:
            return "mapping of stage to weight"
        return type_text(inner, stage or (inner is str and tags == ["stage"])) + _bounds(metadata)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType) and TunerSpec in get_args(annotation):
        kinds = [(kind, entry.config) for kind, entry in ADAPTERS.items()]
        return " or ".join(f"`{kind}`" if config is None else type_text(config) for kind, config in kinds)
    if annotation is ScorerSpec:
        return "[scores](#scores)"
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return " or ".join(dict.fromkeys(type_text(member, stage) for member in members))
    if origin is tuple:
        members = get_args(annotation)
        if len(members) == 2 and members[1] is Ellipsis:
            return f"list of {type_text(members[0], stage)}"
        null = any(type(None) in get_args(member) for member in members)
        return f"[{', '.join(type_text(member, stage) for member in members)}]" + (
            ", either may be null" if null else ""
        )
    if origin is dict:
        key, value = get_args(annotation)
        return f"mapping of {type_text(key)} to {type_text(value, stage)}"
    if inspect.isclass(annotation) and issubclass(annotation, ScorerSpec):
        return link(f"{annotation.kind()} score")
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return link(SECTIONS[annotation])
    return {str: "stage" if stage else "string", int: "integer", float: "number", bool: "boolean"}.get(
        annotation, "any"
    )


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(repr(item) if '{' in str(item) else str(item) for item in value)}]`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`" if "\n" in str(value) else f"`{value}`"


def _one_line(text: str) -> str:
    text = re.sub(r"\bdocs/([\w-]+\.md)", r"[\1](\1)", text)
    return " ".join(text.split()).replace("|", "\\|")


def table(model: type[BaseModel], exclude: Iterable[str] = ()) -> list[str]:
    lines = ["| key | type | default | description |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in exclude:
            continue
        kind = TYPES.get(name) or type_text(field, (model, name) in STAGE_REFERENCES)
        cells = (f"`{field.alias or name}`", kind, default_text(field), _one_line(field.description or ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def described(model: type[BaseModel]) -> list[str]:
    """Return the docstring of the class itself, not an inherited one."""
    text = model.__dict__.get("__doc__") or ""
    return [inspect.cleandoc(text), ""] if text else []


COMMON = [name for name in Training.__annotations__ if name in Training.model_fields and name not in PER_KIND]
"""Keys that all kinds of training have, with the same meaning."""


def _stage_section(kind: str, model: type[BaseModel]) -> list[str]:
    exclude = ["kind", *(COMMON if issubclass(model, Training) else ())]
    lines = [f"### {kind}", "", *described(model), *table(model, exclude), ""]
    if issubclass(model, Training):
        lines[-1:] = ["", f"and the {link('keys of every training')}.", ""]
        metrics = (f"`{name}` ({direction})" for name, direction in TRAINERS[kind].metrics.items())
        lines += [f"Metrics on `eval_data`: {', '.join(metrics)}.", ""]
    return lines


def _scorer_section(model: type[ScorerSpec]) -> list[str]:
    return [f"### {model.kind()} score", "", *described(model), *table(model), ""]


def _nested(*models: type[BaseModel], level: int = 3) -> list[str]:
    lines = []
    for model in models:
        lines += [f"{'#' * level} {SECTIONS[model]}", "", *described(model), *table(model), ""]
    return lines


def page() -> str:
    kinds = " ·\n".join(link(kind) for kind in STAGES)
    scores = " ·\n".join(link(f"{kind} score") for kind in SCORERS)
    lines = [HEAD, "## Experiment", "", *table(Experiment), ""]
    lines += ["## Stages", "", "Each stage has a `kind`:", "", kinds, ""]
    for kind, model in STAGES.items():
        lines += _stage_section(kind, model)
    lines += ["### Keys of every training", "", *table(Training, PER_KIND), ""]
    lines += ["## Scores", "", "An entry of `by` in a [score](#score) stage is a mapping whose first key names it:", ""]
    lines += [scores, ""]
    for scorer in SCORERS.values():
        lines += _scorer_section(scorer.config)
    lines += _nested(GopherRules, C4Rules, NearDuplicatesSettings, ContaminationSettings)
    lines += ["## Nested keys of stages", ""]
    lines += _nested(
        Pretrained,
        Scratch,
        LoraTuner,
        Lora,
        PositiveNegative,
        ReviewLabels,
        ScheduleOverride,
        Keep,
        Quota,
        Diverse,
        FewShot,
    )
    lines += _nested(ChainOfThought, Sampling, PythonReward, Kl, Ptx)
    lines += _nested(Search, level=2)
    lines += _nested(Dimension, Objective, Constraint, Budget)
    lines += _nested(Compute, Tracking, level=2)
    lines += _nested(Wandb)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
