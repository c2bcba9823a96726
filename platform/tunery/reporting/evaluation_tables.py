"""Summary tables of evaluations: losses of all models, with the effect of filtering, and win rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.reporting.tables import SummaryTable
from tunery.spec import STAGE_KINDS, Evaluate, Experiment, PythonReward, Review, Score, Select, Stage, Training, WinRate
from tunery.spec.graph import with_upstream
from tunery.spec.references import model_name
from tunery.store import Artifact

FORGETTING = 4
"""Index of the forgetting column in the loss table, which is omitted if no stage has a baseline."""


def loss_table(
    experiment: Experiment, artifacts: Mapping[str, Artifact], best: Mapping[str, Artifact]
) -> SummaryTable | None:
    """Loss of each model on each set, best first; also of the best trial's models that the search changes."""
    rows: list[list[Any]] = []
    searched = {path.split(".")[0] for path in experiment.search.space} if experiment.search else set()
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Evaluate):
            continue
        for result in artifacts[name].facts["results"]:
            rows.append(_loss_row(result, result["model"], experiment, artifacts))
        for result in best[name].facts["results"] if name in best else []:
            if _depends(experiment, result["model"], searched):
                rows.append(_loss_row(result, f"{result['model']} (best trial)", experiment, best))
    if not rows:
        return None
    rows.sort(key=lambda row: (row[1], STAGE_KINDS["evaluate"].cost("loss", row[2])))
    columns = ["model", "held-out set", "loss", "perplexity", "forgetting", "training rows", "steps"]
    if all(row[FORGETTING] is None for row in rows):
        del columns[FORGETTING]
        rows = [row[:FORGETTING] + row[FORGETTING + 1 :] for row in rows]
    notes = filter_effects(experiment, artifacts)
    return {"title": "Held-out loss (nats per response token)", "columns": columns, "rows": rows, "notes": notes}


SEED_STD = 0.02
"""Standard deviation of the loss over seeds, in nats per token, at the quickstart's size
(benchmarks/filtering_helps.py)."""


def filter_effects(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> list[str]:
    """Whether filtering changed the loss: each model trained on selected rows against its matched baseline."""
    stages = experiment.stages
    losses = {
        (result["model"], result["set"]): result["loss"]
        for name, stage in stages.items()
        if isinstance(stage, Evaluate)
        for result in artifacts[name].facts["results"]
    }
    cost, notes = STAGE_KINDS["evaluate"].cost, []
    for (filtered, data), loss in losses.items():
        for (other, other_data), other_loss in losses.items():
            if data == other_data and _is_matched_baseline(stages.get(filtered), stages.get(other), stages):
                if artifacts[filtered].facts["steps"] != artifacts[other].facts["steps"]:
                    continue
                effect = (
                    "helped"
                    if cost("loss", loss) < cost("loss", other_loss) - SEED_STD
                    else "hurt"
                    if cost("loss", loss) > cost("loss", other_loss) + SEED_STD
                    else "made no difference that one seed can show"
                )
                notes.append(
                    f"filtering {effect} on {data}: {filtered} {loss:.3f}, {other} {other_loss:.3f} "
                    f"({loss - other_loss:+.3f}) after the same number of steps"
                )
    return notes


def _is_matched_baseline(filtered: Stage | None, other: Stage | None, stages: Mapping[str, Stage]) -> bool:
    """Return whether `other` is trained like `filtered`, but on the rows before the selection."""
    if not isinstance(filtered, Training) or not isinstance(other, Training):
        return False
    may_differ = {"data", "epochs"}  # fewer rows for more epochs: the caller compares the steps
    if filtered.model_dump(exclude=may_differ) != other.model_dump(exclude=may_differ):
        return False
    if not isinstance(filtered.data, str):
        return False
    data = stages[filtered.data]
    if isinstance(data, Review):
        data = stages[data.data]
    if not isinstance(data, Select):
        return False
    scored = stages[data.data]
    return isinstance(scored, Score) and other.data in (data.data, scored.data)


def _loss_row(
    result: Mapping[str, Any], label: str, experiment: Experiment, artifacts: Mapping[str, Artifact]
) -> list[Any]:
    facts = artifacts[result["model"]].facts if result["model"] in experiment.stages else {}
    forgetting = f"{result['forgetting']:+.1%}" if "forgetting" in result else None
    training = [facts.get("rows", ""), facts.get("steps", "")]
    return [label, result["set"], result["loss"], result["perplexity"], forgetting, *training]


def win_table(
    experiment: Experiment, artifacts: Mapping[str, Artifact], best: Mapping[str, Artifact]
) -> SummaryTable | None:
    """Win rate of each model against its baseline, best first; also of the best trial's models that the search
    changes."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    searched = {path.split(".")[0] for path in experiment.search.space} if experiment.search else set()
    for name, stage in experiment.stages.items():
        if not isinstance(stage, WinRate):
            continue
        judge = stage.judge.python if isinstance(stage.judge, PythonReward) else model_name(stage.judge)
        references = [reference for reference in (stage.baseline, stage.judge) if isinstance(reference, str)]
        for result in artifacts[name].facts["results"]:
            rows.append(_win_row(result, result["model"], judge))
        for result in best[name].facts["results"] if name in best else []:
            if any(_depends(experiment, stage_name, searched) for stage_name in (result["model"], *references)):
                rows.append(_win_row(result, f"{result['model']} (best trial)", judge))
        for result in artifacts[name].facts["results"]:
            if any(result["left_out"].values()):
                skipped = result["left_out"]
                notes.append(
                    f"{name}: {result['model']} and {result['baseline']['model']} are compared on {result['rows']:,} "
                    f"prompts of {result['set']}; skipped: {skipped['too_long']:,} prompts too long for one of the "
                    f"models, {skipped['unusable']:,} rows without a prompt"
                )
    if not rows:
        return None
    rows.sort(key=lambda row: (row[2], row[3], STAGE_KINDS["win_rate"].cost("win_rate", row[4])))
    columns = ["model", "baseline", "prompts", "judge", "win rate", "95% interval", "reward", "baseline reward"]
    columns += ["tokens per response"]
    return {"title": "Win rates", "columns": columns, "rows": rows, "notes": notes}


def _win_row(result: Mapping[str, Any], label: str, judge: str) -> list[Any]:
    low, high = result["interval"]
    baseline = result["baseline"]
    comparison = [label, baseline["model"], result["set"], judge, result["win_rate"], f"{low:.3f}–{high:.3f}"]
    return [*comparison, result["reward"], baseline["reward"], result["response_length"]]


def _depends(experiment: Experiment, name: str, searched: set[str]) -> bool:
    """Return whether `name` is a stage whose result depends on a searched field."""
    return name in experiment.stages and bool(searched & with_upstream(experiment.stages, [name]).keys())
