"""What a card says of stages, scores and search, as cells and sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunery.events.formatting import measure, plain
from tunery.events.run_state import StageState, TrialState
from tunery.events.stage_summary import listed, outcome
from tunery.export.choose import ExportTarget
from tunery.export.lineage import Link
from tunery.pipeline.cache_keys import stage_seed
from tunery.reporting.report_sections import versions
from tunery.spec import Dataset, Pretrained, Scratch, Select, Training
from tunery.spec.references import model_name

Rows = list[tuple[str, ...]]

SOURCE = ("source", "subset", "config", "hub_split", "revision", "split", "limit", "corrupt_fraction")
"""Fields of a dataset that say which rows it is."""
RAN = ("workers", "device", "dtype", "zero_stage")
"""Measured of a training: where it ran."""


def fields(link: Link, settings: Mapping[str, Any]) -> Rows:
    """Of a training, from its manifest: what it really was made with, and what `auto` became; `settings` are PEFT's."""
    assert isinstance(link.stage, Training)
    became = link.artifact.facts.get("resolved", {})
    resolved = {name: f"{plain(one['value'])} (auto: {one['rule']})" for name, one in became.items()}
    for name, setting in (("alpha", "lora_alpha"), ("target_modules", "target_modules")):
        if setting in settings:
            resolved[f"tuner.lora.{name}"] = f"{plain(settings[setting])} (auto)"
    rows: Rows = [("begins with", _beginning(link.stage.model))]
    for name, value in _flat(link.artifact.manifest["identity"]):
        if name not in ("version", "seed") and not name.startswith(("content of ", "model.")):
            rows.append((name, resolved.get(name, "auto") if value == "auto" else plain(value)))
    return rows


def _beginning(model: str | Pretrained | Scratch) -> str:
    if isinstance(model, str):
        return f"the stage `{model}`"
    if isinstance(model, Scratch) or model.is_folder:
        return model_name(model)
    return model.pretrained + (f" at {model.revision}" if model.revision else "")


def outcomes(link: Link) -> Rows:
    """Of a training: numbers that it came to, and where it ran."""
    told, listed_above = link.artifact.manifest["facts"], link.artifact.manifest["identity"]
    measured = link.artifact.measured
    found = {key: value for key, value in told.items() if key not in listed_above and isinstance(value, int | float)}
    ran = {key: measured[key] for key in RAN if key in measured}
    return [(key.replace("_", " "), plain(value, key)) for key, value in {**found, **ran}.items()]


def step(link: Link) -> str:
    """A sentence on how a stage's rows or model came about."""
    reads = ", ".join(f"{field} `{stage}`" for field, stage in link.reads.items())
    facts = link.artifact.facts
    said = [outcome(StageState(link.name, link.stage.kind, facts=facts)), *_details(link)]
    of = f" of {reads}" if reads else ""
    return f"`{link.name}` ({link.stage.kind}{of}): {'; '.join(part for part in said if part)}"


def _details(link: Link) -> Iterator[str]:
    facts, identity = link.artifact.facts, link.artifact.manifest["identity"]
    if isinstance(link.stage, Dataset):
        told = {key: identity[key] for key in SOURCE if identity.get(key)}
        yield ", ".join(f"{key} {plain(value)}" for key, value in told.items())
    if isinstance(link.stage, Dataset) and facts.get("planted"):
        planted = {kind or "as they were": count for kind, count in facts["planted"].items()}
        yield f"damaged on purpose: {plain(planted)}"
    if isinstance(link.stage, Select):
        for rule in listed(facts.get("rules")):
            cuts = " and ".join(measure(cut) for cut in rule["cuts"])
            yield f"{rule['rule']}" + (f" (cut at {cuts})" if cuts else "") + f" drops {rule['dropped']:,}"
        if diverse := facts.get("diverse"):
            yield f"unlike each other by {diverse['method']}: {diverse['kept']:,} of {diverse['candidates']:,}"
        if link.stage.quota is not None:
            yield f"quota {plain(identity['quota'])}"
    if isinstance(link.stage, Training):
        yield ", ".join(f"{facts[key]:,} {key}" for key in ("rows", "steps", "tokens") if facts.get(key))


def loss_row(result: Mapping[str, Any], *, forgetting: bool) -> tuple[str, ...]:
    forgotten = [f"{result['forgetting']:+.1%}" if "forgetting" in result else "–"] if forgetting else []
    return (result["set"], plain(result["rows"]), measure(result["loss"]), measure(result["perplexity"]), *forgotten)


def win_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The model of the card in bold."""
    names = [f"**{name}**" if name == result["mine"] else name for name in (result["model"], result["baseline"])]
    prompts = f"{result['set']} ({result['rows']:,})"
    low, high = result["interval"]
    return (*names, prompts, result["judge"], f"{result['win_rate']:.3f}", f"{low:.3f}–{high:.3f}")


def search_line(chosen: ExportTarget) -> str:
    """Empty where no search changes the model, or none is finished."""
    search, told = chosen.experiment.search, chosen.state.search
    if not chosen.is_searched or search is None or told is None or not told.finished or told.best is None:
        return ""
    states = [trial.status for trial in told.trials.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    aim = "lowest" if search.mode == "min" else "highest"
    own = "with the file's own values" if chosen.trial is None else f"by {_valued(chosen.trial)}"
    return (
        f"Its trials ({len(states)}: {counts}) were for the {aim} `{search.metric}`; the best is {_valued(told.best)}. "
        f"This model was made {own}."
    )


def _valued(trial: TrialState) -> str:
    return f"{trial.name} with {plain(trial.value)}"


def space_rows(chosen: ExportTarget) -> Rows:
    """What was searched, and the values that the model was made with."""
    search = chosen.experiment.search
    stages = chosen.experiment.model_dump(mode="json")["stages"]
    space = search.space.items() if search else ()
    return [(path, dimension.describe(), plain(_at(stages, path))) for path, dimension in space]


def _at(stages: Any, path: str) -> Any:
    found = stages
    for key in path.split("."):
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def version_rows(chosen: ExportTarget, link: Link) -> Rows:
    """What is needed to make the model again."""
    trial = [("trial", chosen.trial.name)] if chosen.trial else []
    seed = str(stage_seed(link.stage, chosen.experiment))
    own = [("stage", link.name), *trial, ("fingerprint", link.artifact.fingerprint), ("seed", seed)]
    return [("experiment", chosen.state.run), *own, *versions(chosen.state)]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested fields by their path; those that aren't given are left out, and names of other stages with them."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None:
            yield f"{above}{name}", value
