"""What a model was made from, from dataset to model, and what was measured of it. From the artifacts' manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.spec import Experiment, Pretrained, Stage
from tunery.store import Artifact
from tunery.store.artifacts import input_of, read_artifact

EXCERPTS = ("samples", "quarantine", "responses")
"""Facts that hold texts of rows: whoever hands a model on need not mean to hand on its data."""


@dataclass(frozen=True)
class Link:
    """A stage and what it made."""

    name: str
    stage: Stage
    artifact: Artifact

    @property
    def reads(self) -> dict[str, str]:
        """Other stages, by the field that names them."""
        return {".".join(map(str, item.path)): item.stage for item in self.stage.inputs()}


def trace(stages: Mapping[str, Stage], name: str, artifact: Artifact) -> list[Link]:
    """All that the stage `name` was made from, inputs before users; itself is the last. Raises StoreError where
    something of it was removed from the store."""
    found: dict[str, Link] = {}

    def visit(name: str, artifact: Artifact) -> None:
        if name not in found:
            link = Link(name, stages[name], artifact)
            for field, stage in link.reads.items():
                visit(stage, input_of(artifact, field))
            found[name] = link

    visit(name, artifact)
    return list(found.values())


def root_of(links: list[Link]) -> Pretrained | None:
    """The model from outside that the last link's goes back to; None where it began with random weights."""
    stages = {link.name: link.stage for link in links}
    model: Any = links[-1].name
    while isinstance(model, str):
        model = getattr(stages[model], "model", None)
    return model if isinstance(model, Pretrained) else None


def losses(artifact: Artifact) -> list[dict[str, Any]]:
    """What `evaluate` stages measured of a model, in whatever experiment: set, loss, perplexity, rows .."""
    found = [
        result
        for measured, fields in _measured(artifact, "evaluate")
        for name in {
            called for place, called in enumerate(measured.manifest["identity"]["names"]) if f"models.{place}" in fields
        }
        for result in measured.facts["results"]
        if result["model"] == name
    ]
    return _distinct(found, ("set", "loss"))


def wins(artifact: Artifact) -> list[dict[str, Any]]:
    """What `win_rate` stages say of a model, on either side: model, against, set, rows, win_rate, interval, judge, and
    `mine`: what it is called there."""
    found = []
    for measured, fields in _measured(artifact, "win_rate"):
        against, *models = measured.manifest["identity"]["names"][:-1]  # the last one names the prompts
        mine = {against} if "baseline" in fields else set()
        mine |= {called for place, called in enumerate(models) if f"models.{place}" in fields}
        for result in measured.facts["results"]:
            if here := mine & {result["model"], result["baseline"]["model"]}:
                sides = {"baseline": result["baseline"]["model"], "mine": min(here)}
                found.append({**result, **sides, "judge": _judge(measured.manifest["identity"]["judge"])})
    return _distinct(found, ("model", "baseline", "set", "win_rate"))


def _judge(given: dict[str, str] | None) -> str:
    """In a few words; the fields of a measurement don't name other stages."""
    return (
        "a reward model of the experiment" if given is None else Path(given.get("python") or given["pretrained"]).name
    )


def _measured(artifact: Artifact, kind: str) -> Iterator[tuple[Artifact, set[str]]]:
    """Measurements with the model among their inputs, and the fields where it stands."""
    for path in sorted(artifact.path.parent.glob(f"{kind}-*")):
        if (measured := read_artifact(path)) is not None:
            inputs = measured.manifest["inputs"].items()
            if fields := {field for field, print_ in inputs if print_ == artifact.fingerprint}:
                yield measured, fields


def _distinct(results: list[dict[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    """A trial measures some of what the evaluation of the best one measures too."""
    return list({tuple(result[key] for key in by): result for result in results}.values())


def manifests(links: list[Link]) -> list[dict[str, Any]]:
    """Of each link its stage's name and its manifest, without the texts of rows."""
    return [
        {
            "stage": link.name,
            **link.artifact.manifest,
            "facts": {key: value for key, value in link.artifact.manifest["facts"].items() if key not in EXCERPTS},
        }
        for link in links
    ]


def local_paths(experiment: Experiment) -> set[str]:
    """Absolute paths in an experiment: they mean nothing on another machine, and tell of this one."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from texts(item)

    return {text for text in texts(experiment.model_dump(mode="json")) if text.startswith(("/", "~")) and len(text) > 1}


def strip_local_paths(value: Any, known: set[str]) -> Any:
    """The same with the last part of each path only."""
    if isinstance(value, str):
        for place in sorted(known, key=len, reverse=True):
            value = value.replace(place, Path(place).name)
        return value
    if isinstance(value, Mapping):
        return {strip_local_paths(key, known): strip_local_paths(item, known) for key, item in value.items()}
    return [strip_local_paths(item, known) for item in value] if isinstance(value, list) else value
