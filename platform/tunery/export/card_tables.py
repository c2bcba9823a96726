"""Tables and sentences of the model card: stages, evaluations and search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunery.events.formatting import measure, plain
from tunery.events.run_state import StageState, TrialState
from tunery.events.stage_summary import mappings_in, outcome
from tunery.export.export_target import ExportTarget
from tunery.export.lineage import LineageStep
from tunery.pipeline.cache_keys import stage_seed
from tunery.reporting.report_sections import versions
from tunery.spec import Dataset, Pretrained, Scratch, Select, Training, adapter_spec, tuner_of
from tunery.spec.references import model_name

Rows = list[tuple[str, ...]]

SOURCE_FIELDS = ("source", "subset", "config", "hub_split", "revision", "split", "limit", "corrupt_fraction")
"""Fields of a dataset that determine its rows."""
RUNTIME_FIELDS = ("workers", "device", "dtype", "zero_stage")
"""Runtime stats of a training that are listed."""


def fields(step: LineageStep, peft_config: Mapping[str, Any]) -> Rows:
    """Fields of a training, from its manifest, with the resolved values of `auto`; `peft_config` resolves the
    tuner's."""
    assert isinstance(step.stage, Training)
    auto_values = step.artifact.facts.get("resolved", {})
    resolved = {name: f"{plain(one['value'])} (auto: {one['rule']})" for name, one in auto_values.items()}
    adapter = adapter_spec(tuner_of(step.stage))
    for name, key in adapter.peft_fields.items():
        if key in peft_config:
            resolved[f"tuner.{adapter.kind}.{name}"] = f"{plain(peft_config[key])} (auto)"
    rows: Rows = [("initial model", _initial_model(step.stage.model))]
    for name, value in _flat(step.artifact.manifest["identity"]):
        if name not in ("version", "seed") and not name.startswith(("content of ", "model.")):
            rows.append((name, resolved.get(name, "auto") if value == "auto" else plain(value)))
    return rows


def _initial_model(model: str | Pretrained | Scratch) -> str:
    if isinstance(model, str):
        return f"the stage `{model}`"
    if isinstance(model, Scratch) or model.is_folder:
        return model_name(model)
    return model.pretrained + (f" at {model.revision}" if model.revision else "")


def training_results(step: LineageStep) -> Rows:
    """Final numbers of a training, and where it ran."""
    facts, config = step.artifact.manifest["facts"], step.artifact.manifest["identity"]
    runtime_stats = step.artifact.runtime_stats
    numbers = {key: value for key, value in facts.items() if key not in config and isinstance(value, int | float)}
    runtime = {key: runtime_stats[key] for key in RUNTIME_FIELDS if key in runtime_stats}
    return [(key.replace("_", " "), plain(value, key)) for key, value in {**numbers, **runtime}.items()]


def stage_line(step: LineageStep) -> str:
    """A stage of the lineage in one line: its inputs, outcome and details."""
    inputs = ", ".join(f"{field} `{stage}`" for field, stage in step.inputs.items())
    facts = step.artifact.facts
    parts = [outcome(StageState(step.name, step.stage.kind, facts=facts)), *_details(step)]
    of = f" of {inputs}" if inputs else ""
    return f"`{step.name}` ({step.stage.kind}{of}): {'; '.join(part for part in parts if part)}"


def _details(step: LineageStep) -> Iterator[str]:
    facts, identity = step.artifact.facts, step.artifact.manifest["identity"]
    if isinstance(step.stage, Dataset):
        values = {key: identity[key] for key in SOURCE_FIELDS if identity.get(key)}
        yield ", ".join(f"{key} {plain(value)}" for key, value in values.items())
    if isinstance(step.stage, Dataset) and facts.get("injected_corruption"):
        corruption = {kind or "intact": count for kind, count in facts["injected_corruption"].items()}
        yield f"injected corruption: {plain(corruption)}"
    if isinstance(step.stage, Select):
        for rule in mappings_in(facts.get("rules")):
            thresholds = " and ".join(measure(threshold) for threshold in rule["thresholds"])
            yield (
                f"{rule['rule']}" + (f" (threshold {thresholds})" if thresholds else "") + f" drops {rule['dropped']:,}"
            )
        if diverse := facts.get("diverse"):
            yield f"diverse subset by {diverse['method']}: {diverse['kept']:,} of {diverse['candidates']:,}"
        if step.stage.quota is not None:
            yield f"quota {plain(identity['quota'])}"
    if isinstance(step.stage, Training):
        yield ", ".join(f"{facts[key]:,} {key}" for key in ("rows", "steps", "tokens") if facts.get(key))


def loss_row(result: Mapping[str, Any], *, forgetting: bool) -> tuple[str, ...]:
    relative = [f"{result['forgetting']:+.1%}" if "forgetting" in result else "–"] if forgetting else []
    return (result["set"], plain(result["rows"]), measure(result["loss"]), measure(result["perplexity"]), *relative)


def win_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the win rate table; the card's model is bold."""
    names = [f"**{name}**" if name == result["name"] else name for name in (result["model"], result["baseline"])]
    prompts = f"{result['set']} ({result['rows']:,})"
    low, high = result["interval"]
    return (*names, prompts, result["judge"], f"{result['win_rate']:.3f}", f"{low:.3f}–{high:.3f}")


def search_line(target: ExportTarget) -> str:
    """The search in two sentences; empty if no finished search changes the model."""
    search, state = target.experiment.search, target.state.search
    if not target.is_searched or search is None or state is None or not state.finished or state.best is None:
        return ""
    states = [trial.status for trial in state.trials.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    goal = "minimized" if search.mode == "min" else "maximized"
    trained = "with the file's own values" if target.trial is None else f"by {_with_value(target.trial)}"
    return (
        f"The search {goal} `{search.metric}` over {len(states)} trials ({counts}); the best is "
        f"{_with_value(state.best)}. This model was trained {trained}."
    )


def _with_value(trial: TrialState) -> str:
    return f"{trial.name} with {plain(trial.value)}"


def space_rows(target: ExportTarget) -> Rows:
    """The search space, with the values that the model was trained with."""
    search = target.experiment.search
    stages = target.experiment.model_dump(mode="json")["stages"]
    space = search.space.items() if search else ()
    return [(path, dimension.describe(), plain(_value_at(stages, path))) for path, dimension in space]


def _value_at(stages: Any, path: str) -> Any:
    value = stages
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def version_rows(target: ExportTarget, step: LineageStep) -> Rows:
    """What is needed to reproduce the model."""
    trial = [("trial", target.trial.name)] if target.trial else []
    seed = str(stage_seed(step.stage, target.experiment))
    rows = [("stage", step.name), *trial, ("fingerprint", step.artifact.fingerprint), ("seed", seed)]
    return [("experiment", target.state.run), *rows, *versions(target.state)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested fields by path, without those that are None."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
