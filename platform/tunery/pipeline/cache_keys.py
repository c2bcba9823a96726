"""Cache keys of the stages of an experiment, computed before anything runs.

A stage is built if the store has no artifact of its kind with its fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.ingest.sources import source_identity
from tunery.models.encode import ENCODING_VERSION
from tunery.review.decisions import decisions_identity
from tunery.spec import (
    STAGE_KINDS,
    Dataset,
    Experiment,
    Pretrained,
    PythonReward,
    Review,
    Score,
    Scratch,
    Stage,
    Training,
    adapter_spec,
    tuner_of,
)
from tunery.spec.graph import order
from tunery.spec.references import StageRef
from tunery.spec.scorers import SCORERS
from tunery.store import fingerprint
from tunery.store.fingerprint import folder_digest

DEFAULT_OMITTED_FIELDS = ("diverse", "keep_fraction_of_rest", "baseline", "schedule_overrides")
"""Fields that were added later. If one is not given it is omitted, so that existing fingerprints stay valid."""
IGNORED_FIELDS = ("max_unusable",)
"""Fields that can make a stage fail but do not change its result."""


@dataclass(frozen=True)
class CacheKey:
    """The cache key of a stage, and what it is computed from. The manifest of an artifact has the same fields."""

    fingerprint: str
    """The key itself: a hash of the stage's kind and the other two fields."""
    identity: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Fingerprints of the stages that it reads, by the path of the field that names them."""


def stage_seed(stage: Stage, experiment: Experiment) -> int:
    own: int | None = getattr(stage, "seed", None)
    return experiment.seed if own is None else own


def identity(stage: Stage, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Return everything about a stage that changes its result, except its inputs: its fields without the names of other
    stages, the seed if it is random, the content of the files, folders and hub datasets that it reads, and the versions
    of its implementation. Of a model on the hub it has the name and revision, not the content.
    """
    fields = _without_omitted(stage.model_dump(mode="json", exclude={"kind", "seed", *IGNORED_FIELDS}))
    mixture = _mixture(stage)
    for item in stage.inputs():
        if not (mixture and item.path[0] == "data"):
            _blank(fields, item.path)
    if mixture:
        fields["data"] = list(mixture.values())
    result: dict[str, Any] = {"version": STAGE_KINDS[stage.kind].version, **fields}
    if stage.uses_seed:
        result["seed"] = stage_seed(stage, experiment)
    if isinstance(stage, Training):
        result["encoding_version"] = ENCODING_VERSION
        if (tuner_version := adapter_spec(tuner_of(stage)).version) > 1:
            result["tuner_version"] = tuner_version
    if isinstance(stage, Score):
        result["scorer_versions"] = {spec.kind(): SCORERS[spec.kind()].version for spec in stage.by}
    if isinstance(stage, Dataset):
        result["content"] = source_identity(stage, folder)
    if isinstance(stage, Review):
        result["content"] = decisions_identity(stage, folder)
    if stage.result_names:
        result["names"] = stage.result_names
    for reference in stage.model_refs():
        if isinstance(reference.model, PythonReward):
            path = reference.model.python
            result[f"content of {path}"] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    for model in pretrained_models(stage):
        if model.is_folder:
            result[f"content of {model.pretrained}"] = folder_digest(model_folder(model, folder))
    return result


def models_of(stage: Stage) -> list[tuple[tuple[str | int, ...], str | Pretrained | Scratch]]:
    """Return (path in the stage, model) for every model of a stage: a stage, a pretrained or a scratch model."""
    return [(item.path, item.model) for item in stage.model_refs() if not isinstance(item.model, PythonReward)]


def pretrained_models(stage: Stage) -> list[Pretrained]:
    """Return the models of a stage that come from outside the experiment."""
    return [model for _, model in models_of(stage) if isinstance(model, Pretrained)]


def model_folder(model: Pretrained, folder: Path) -> Path:
    return (folder / Path(model.pretrained).expanduser()).resolve()


def cache_keys(experiment: Experiment, folder: Path) -> dict[str, CacheKey]:
    """Return the cache keys by stage, in topological order. `folder`: directory that relative paths refer to."""
    keys: dict[str, CacheKey] = {}
    for name in order(experiment.stages):
        stage = experiment.stages[name]
        own = identity(stage, experiment, folder)
        inputs = {_input_key(stage, item): keys[item.stage].fingerprint for item in stage.inputs()}
        keys[name] = CacheKey(fingerprint(stage.kind, own, inputs), own, inputs)
    return keys


def fingerprints(experiment: Experiment, folder: Path) -> dict[str, str]:
    """Return the fingerprints by stage, in topological order."""
    return {name: key.fingerprint for name, key in cache_keys(experiment, folder).items()}


def _mixture(stage: Stage) -> dict[str, float]:
    data = getattr(stage, "data", None)
    return data if isinstance(stage, Training) and isinstance(data, dict) else {}


def _input_key(stage: Stage, item: StageRef) -> str:
    """Return the field path of an input. For a mixture, whose keys are names of stages, the index replaces the name."""
    if (mixture := _mixture(stage)) and item.path[0] == "data":
        return f"data.{list(mixture).index(item.stage)}"
    return ".".join(map(str, item.path))


def _without_omitted(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {
            key: _without_omitted(value)
            for key, value in fields.items()
            if key not in DEFAULT_OMITTED_FIELDS or value not in (None, [])
        }
    return [_without_omitted(value) for value in fields] if isinstance(fields, list) else fields


def _blank(fields: Any, path: tuple[str | int, ...]) -> None:
    *parents, last = path
    for key in parents:
        fields = fields[key]
    fields[last] = None


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities, for example "learning_rate 0.001 -> 0.002"."""
    return [
        f"{key} {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
