"""Lineage of a model from dataset to model, and its evaluations, from the artifacts' manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.spec import Experiment, Pretrained, Stage
from tunery.store import Artifact
from tunery.store.artifacts import input_of, read_artifact

TEXT_FACTS = ("samples", "quarantine", "responses")
"""Facts with texts of rows. They are not exported: publishing a model does not imply publishing its data."""


@dataclass(frozen=True)
class LineageStep:
    """A stage and its artifact."""

    name: str
    stage: Stage
    artifact: Artifact

    @property
    def inputs(self) -> dict[str, str]:
        """Input stages by the field that names them."""
        return {".".join(map(str, item.path)): item.stage for item in self.stage.inputs()}


def trace(stages: Mapping[str, Stage], name: str, artifact: Artifact) -> list[LineageStep]:
    """All upstream stages of the stage `name` in topological order; the stage itself is last. Raises StoreError if one
    of their artifacts was removed from the store."""
    steps: dict[str, LineageStep] = {}

    def visit(name: str, artifact: Artifact) -> None:
        if name not in steps:
            step = LineageStep(name, stages[name], artifact)
            for field, stage in step.inputs.items():
                visit(stage, input_of(artifact, field))
            steps[name] = step

    visit(name, artifact)
    return list(steps.values())


def pretrained_root(steps: list[LineageStep]) -> Pretrained | None:
    """The pretrained model that the last link's model is derived from; None if it was trained from scratch."""
    stages = {step.name: step.stage for step in steps}
    model: Any = steps[-1].name
    while isinstance(model, str):
        model = getattr(stages[model], "model", None)
    return model if isinstance(model, Pretrained) else None


def losses(artifact: Artifact) -> list[dict[str, Any]]:
    """Results of all `evaluate` artifacts in the store for a model (of any experiment): set, loss, perplexity, rows."""
    results = [
        result
        for evaluation, fields in _evaluations(artifact, "evaluate")
        for name in {
            name for index, name in enumerate(evaluation.manifest["identity"]["names"]) if f"models.{index}" in fields
        }
        for result in evaluation.facts["results"]
        if result["model"] == name
    ]
    return _distinct(results, ("set", "loss"))


def wins(artifact: Artifact) -> list[dict[str, Any]]:
    """Results of `win_rate` artifacts with the model on either side: model, baseline, set, rows, win_rate, interval,
    judge, and `name`: the model's name there."""
    results = []
    for evaluation, fields in _evaluations(artifact, "win_rate"):
        baseline, *models = evaluation.manifest["identity"]["names"][:-1]  # the last one is the name of the prompts
        own_names = {baseline} if "baseline" in fields else set()
        own_names |= {name for index, name in enumerate(models) if f"models.{index}" in fields}
        for result in evaluation.facts["results"]:
            if names := own_names & {result["model"], result["baseline"]["model"]}:
                sides = {"baseline": result["baseline"]["model"], "name": min(names)}
                results.append({**result, **sides, "judge": _judge(evaluation.manifest["identity"]["judge"])})
    return _distinct(results, ("model", "baseline", "set", "win_rate"))


def _judge(judge: dict[str, str] | None) -> str:
    """Short name of a judge. The manifest does not name a judge that is a stage (None)."""
    return (
        "a reward model of the experiment" if judge is None else Path(judge.get("python") or judge["pretrained"]).name
    )


def _evaluations(artifact: Artifact, kind: str) -> Iterator[tuple[Artifact, set[str]]]:
    """Evaluation artifacts that have the model as an input, with the fields that refer to it."""
    for path in sorted(artifact.path.parent.glob(f"{kind}-*")):
        if (evaluation := read_artifact(path)) is not None:
            inputs = evaluation.manifest["inputs"].items()
            if fields := {field for field, fingerprint in inputs if fingerprint == artifact.fingerprint}:
                yield evaluation, fields


def _distinct(results: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """Results without duplicates: a trial and the best trial's evaluation may have the same ones."""
    return list({tuple(result[key] for key in by): result for result in results}.values())


def manifests(steps: list[LineageStep]) -> list[dict[str, Any]]:
    """Stage name and manifest of each link, without texts of rows."""
    return [
        {
            "stage": step.name,
            **step.artifact.manifest,
            "facts": {key: value for key, value in step.artifact.manifest["facts"].items() if key not in TEXT_FACTS},
        }
        for step in steps
    ]


def local_paths(experiment: Experiment) -> set[str]:
    """Absolute paths in an experiment. They are meaningless on another machine, and reveal details of this one."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from texts(item)

    return {text for text in texts(experiment.model_dump(mode="json")) if text.startswith(("/", "~")) and len(text) > 1}


def strip_local_paths(value: Any, paths: set[str]) -> Any:
    """Replace each of the `paths` in keys and values by its last component."""
    if isinstance(value, str):
        for path in sorted(paths, key=len, reverse=True):
            value = value.replace(path, Path(path).name)
        return value
    if isinstance(value, Mapping):
        return {strip_local_paths(key, paths): strip_local_paths(item, paths) for key, item in value.items()}
    return [strip_local_paths(item, paths) for item in value] if isinstance(value, list) else value
