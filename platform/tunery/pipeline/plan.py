"""Plan of a run, computed without Ray and without running any stage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunery.errors import RequestError
from tunery.events.formatting import duration
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.read import first_row_format, read_source
from tunery.models.model_folder import count_parameters
from tunery.models.row_encodings import row_encoding_of
from tunery.models.scratch import SHAPES
from tunery.pipeline.cache_keys import CacheKey, cache_keys, difference, model_folder
from tunery.pipeline.compute import Hardware, batch_sizes, local_hardware, resolve_compute
from tunery.pipeline.validate import notes
from tunery.pipeline.validate_templates import template_notes
from tunery.spec import (
    TRAINERS,
    Compute,
    Dataset,
    Experiment,
    Pretrained,
    ReviewLabels,
    Scratch,
    Stage,
    Training,
    adapter_spec,
    settings_of,
    tuner_of,
)
from tunery.spec.graph import order, root_dataset
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Store
from tunery.store.artifacts import read_artifact
from tunery.store.rows import read_rows
from tunery.training.auto import resolve_auto
from tunery.training.batches import plan_training
from tunery.training.deepspeed_config import frozen_bytes, model_state_bytes

CHARACTERS_PER_TOKEN = 3.3
"""For a small byte-level BPE on English and code; estimates the number of tokens of rows that are not tokenised."""


@dataclass(frozen=True)
class PlannedStage:
    name: str
    kind: str
    fingerprint: str
    reused: bool
    rebuild_reason: str
    """Why the stage is not reused; "" if it is."""
    rows: int | None = None
    steps: int | None = None
    memory_bytes: int | None = None
    """Per rank: weights, gradients and optimizer states, without activations."""
    seconds: float | None = None
    auto: dict[str, str] = field(default_factory=dict)
    """By field: the value of `auto` and the rule that chose it."""


@dataclass(frozen=True)
class Plan:
    experiment: str
    store: str
    stages: list[PlannedStage]
    search: list[str]
    """Plan of the search, one item per line; empty without a search."""
    compute: dict[str, Any]
    rules: dict[str, str]
    notes: list[str]
    """Notes on the first rows of each training, and what the run will stop for."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    experiment: Experiment,
    source: YamlSource,
    store: Store,
    search: Sequence[str] = (),
    hardware: Hardware | None = None,
) -> Plan:
    """Return the plan for `hardware`, this machine when not given. `search` are the lines of the search plan. Raises
    RequestError if the workers do not fit."""
    folder = Path(source.file).parent
    hardware = hardware or local_hardware()
    compute, rules = resolve_compute(experiment.compute, hardware, batch_sizes(experiment))
    keys = cache_keys(experiment, folder)
    before = _last_run(store, experiment.name)
    estimate = _Estimates(experiment, folder, compute)
    models: dict[str, Path] = {}
    stages = []
    for name in order(experiment.stages):
        stage = experiment.stages[name]
        artifact = store.find(stage.kind, keys[name].fingerprint)
        reason = "" if artifact else _rebuild_reason(name, keys[name], before)
        if artifact is not None and isinstance(stage, Training):
            models[name] = artifact.path
        stages.append(estimate.stage(name, stage, keys[name].fingerprint, artifact, reason, before.get(name)))
    compute_fields = compute.model_dump(exclude_defaults=False)
    plan_notes = [f"`{stage}`: {note}" for stage, note in template_notes(experiment, folder, models).items()]
    plan_notes += [
        f"`{name}` {stage.plan_note}"
        for name, stage in experiment.stages.items()
        if isinstance(stage, Training) and stage.plan_note
    ]
    plan_notes += notes(experiment, source)
    plan_notes += _memory_notes(stages, hardware)
    return Plan(experiment.name, str(store.root), stages, list(search), compute_fields, rules, plan_notes)


def _memory_notes(stages: Sequence[PlannedStage], hardware: Hardware) -> list[str]:
    """Return a note for each training whose states do not fit on a GPU of known memory."""
    if hardware.gpu_gb is None:
        return []
    return [
        f"`{stage.name}` needs {_bytes(stage.memory_bytes)} per GPU for weights, gradients and optimizer states, and "
        f"memory for activations; a GPU has {hardware.gpu_gb:g} GB: use more workers with `zero_stage: 3`, `offload`, "
        "or LoRA"
        for stage in stages
        if stage.memory_bytes is not None and stage.memory_bytes > hardware.gpu_gb * 1e9
    ]


def _last_run(store: Store, name: str) -> dict[str, dict[str, Any]]:
    """Return manifest and runtime statistics of the artifacts that the last run of this name built or reused, by
    stage."""
    from tunery.events.event_log import read_events

    manifests: dict[str, dict[str, Any]] = {}
    for event in read_events(store.run(name) / "events"):
        if event["event"] == "stage_finished" and not event.get("trial"):
            artifact = read_artifact(Path(event["artifact"]))
            if artifact is not None:
                manifests[event["stage"]] = {**artifact.manifest, "runtime_stats": artifact.runtime_stats}
    return manifests


def _rebuild_reason(name: str, key: CacheKey, before: dict[str, dict[str, Any]]) -> str:
    last = before.get(name)
    if last is None:
        return "never built"
    changed = difference(last["identity"], json.loads(json.dumps(key.identity)))
    changed += [f"{path} changed" for path, value in key.inputs.items() if last["inputs"].get(path) != value]
    return ", ".join(changed) or "its artifact was removed"


class _Estimates:
    """Estimates rows, steps, memory and time of stages from their artifacts, or from their input data."""

    def __init__(self, experiment: Experiment, folder: Path, compute: Compute) -> None:
        self._experiment, self._folder, self._compute = experiment, folder, compute
        self._rows: dict[str, int] = {}
        self._characters: dict[str, int] = {}
        self._parameters: dict[str, int | None] = {}

    def stage(
        self,
        name: str,
        stage: Stage,
        cache_key: str,
        artifact: Artifact | None,
        rebuild_reason: str,
        before: dict[str, Any] | None,
    ) -> PlannedStage:
        planned: Callable[..., PlannedStage] = partial(
            PlannedStage, name, stage.kind, cache_key, artifact is not None, rebuild_reason
        )
        facts = artifact.facts if artifact else {}
        if "parameters" in facts:
            self._parameters[name] = facts["parameters"]
        if stage.output_type == "metrics":
            rows = sum(self._rows[item.stage] for item in stage.eval_refs()) * len(stage.evaluated_models)
            return planned(rows=rows, seconds=self._seconds(artifact, before, 1.0))
        if isinstance(stage, Training):
            return self._training(planned, name, stage, artifact, before)
        rows = int(facts["rows"]) if artifact else self._count(name, stage)
        self._rows[name] = rows
        if artifact is not None:
            self._characters[name] = sum(map(characters_of, read_rows(artifact.path, ["text", "messages"])))
        self._characters.setdefault(name, self._characters.get(getattr(stage, "data", ""), 0))
        scale = rows / max(1, before["facts"].get("rows", rows)) if before else 1.0
        return planned(rows=rows, seconds=self._seconds(artifact, before, scale))

    def _count(self, name: str, stage: Any) -> int:
        if isinstance(stage, Dataset):
            count = characters = 0
            try:
                for row in read_source(stage, self._folder, lambda line: None):
                    count, characters = count + 1, characters + characters_of(row)
            except UnavailableFile as error:
                raise RequestError(f"{name}: {error}", remedy="check the network and permissions") from error
            self._characters[name] = characters
            return count
        return int(stage.estimate_rows(self._rows[stage.data]))

    def _training(
        self,
        planned: Callable[..., PlannedStage],
        name: str,
        stage: Training[Any],
        artifact: Artifact | None,
        before: dict[str, Any] | None,
    ) -> PlannedStage:
        rows = self._rows_read(stage.data)
        resolved, rules = resolve_auto(stage, rows)
        spec, sequences = TRAINERS[stage.kind], rows
        row_encoding = row_encoding_of(stage)
        if row_encoding is not None and row_encoding.in_blocks:
            characters = sum(self._characters.get(name, 0) for name in data_refs(stage.data).values())
            sequences = max(1, math.ceil(characters / CHARACTERS_PER_TOKEN / stage.max_length))
        if spec.sequences_per_format:
            sequences = sum(
                self._rows[data]
                * spec.sequences_per_format.get(
                    first_row_format(root_dataset(self._experiment.stages, data), self._folder), 1
                )
                for data in data_refs(stage.data).values()
            )
        workers = self._compute.workers
        assert workers != "auto", "resolved"
        batching = plan_training(resolved, sequences, workers, self._compute.micro_batch_size)
        steps = artifact.facts["steps"] if artifact else batching.steps
        parameters = self._parameters.setdefault(name, self._size(stage.model))
        tuner = tuner_of(stage)
        adapter = adapter_spec(tuner)
        trainable = None if parameters is None else adapter.num_trainable(settings_of(tuner), parameters)
        memory = None
        if parameters is not None and trainable is not None:
            bf16 = self._compute.device == "gpu" and self._compute.precision != "fp32"
            zero = self._compute.zero_stage
            trained, frozen = spec.num_trained_models, resolved.num_frozen_models
            if adapter.has_adapter:  # all models share the base
                memory = model_state_bytes(parameters, trained * trainable, zero, workers, bf16)
            else:
                memory = model_state_bytes(trained * parameters, trained * trainable, zero, workers, bf16)
                memory += frozen * frozen_bytes(parameters, zero, workers, bf16)
        scale = steps / max(1, before["facts"].get("steps", steps)) if before else 1.0
        auto = {item.field: f"{item.value} ({item.rule})" for item in rules}
        seconds = self._seconds(artifact, before, scale)
        return planned(rows=rows, steps=steps, memory_bytes=memory, seconds=seconds, auto=auto)

    def _rows_read(self, data: Any) -> int:
        """Return the number of rows that a training reads. For a review assume that all requested rows are decided."""
        if isinstance(data, ReviewLabels):
            return getattr(self._experiment.stages[data.review], "rows", 0)
        return sum(self._rows[stage] for stage in data_refs(data).values())

    def _size(self, model: str | Pretrained | Scratch) -> int | None:
        if isinstance(model, Scratch):
            return SHAPES[model.scratch].parameters
        if isinstance(model, Pretrained):
            return count_parameters(model_folder(model, self._folder)) if model.is_folder else None
        return self._parameters.get(model)

    @staticmethod
    def _seconds(artifact: Artifact | None, before: dict[str, Any] | None, scale: float) -> float | None:
        if artifact is not None:
            return 0.0
        return before["runtime_stats"]["seconds"] * scale if before else None


def characters_of(row: dict[str, Any]) -> int:
    """Return the number of characters of all messages."""
    return len(row["text"]) if row.get("text") else sum(len(message["content"]) for message in row["messages"])


def render_plan(plan: Plan) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("stage", "kind"):
        table.add_column(column)
    for column in ("rows", "steps", "memory/rank", "time"):
        table.add_column(column, justify="right")
    table.add_column("plan")
    for stage in plan.stages:
        state = Text("reused", style="green") if stage.reused else Text(f"run: {stage.rebuild_reason}")
        table.add_row(
            stage.name,
            stage.kind,
            "" if stage.rows is None else f"{stage.rows:,}",
            "" if stage.steps is None else f"{stage.steps:,}",
            "" if stage.memory_bytes is None else _bytes(stage.memory_bytes),
            "?" if stage.seconds is None else "" if stage.reused else duration(stage.seconds),
            state,
        )
    lines: list[RenderableType] = [Text(f"{plan.experiment}  (store {plan.store})", style="bold"), table]
    lines += [
        Text(f"  auto: {stage.name}.{name} = {value}") for stage in plan.stages for name, value in stage.auto.items()
    ]
    lines += [Text(f"  auto: compute.{name} = {plan.compute[name]} ({rule})") for name, rule in plan.rules.items()]
    lines += [Text(f"  search: {line}") for line in plan.search]
    lines += [Text(f"  note: {note}") for note in plan.notes]
    return Group(*lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
