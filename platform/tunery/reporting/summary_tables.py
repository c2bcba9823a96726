"""Summary tables printed at the end of a run, built from the facts of its artifacts, and the same numbers as JSON.

Each table is {"title", "columns", "rows", "notes"}, or None if the experiment has no stage of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.event_reducer import replay
from tunery.events.formatting import size
from tunery.events.leaderboard import leaderboard, winner_summary
from tunery.events.run_state import SearchState
from tunery.events.stage_summary import rewards
from tunery.spec import (
    STAGE_KINDS,
    TRAINERS,
    Evaluate,
    Experiment,
    PythonReward,
    Review,
    Score,
    Select,
    Stage,
    Training,
    WinRate,
)
from tunery.spec.graph import with_upstream
from tunery.spec.plugins import load_object
from tunery.spec.references import model_name
from tunery.spec.stage_kinds import KL_UNITS
from tunery.store import Artifact

Table = dict[str, Any]
Trainings = Mapping[str, Training[Any]]
"""Trainings by stage name."""


def filter_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Precision and recall of each selection on injected corruption, next to an equally strict random filter."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        metrics = artifacts[name].facts.get("injected_corruption") if isinstance(stage, Select | Review) else None
        if not metrics:
            continue
        facts = artifacts[name].facts
        caught = f"{metrics['dropped']:,} of {metrics['total']:,}"
        rows.append([name, f"{facts['dropped']:,}", caught, metrics["precision"], metrics["recall"], metrics["auc"]])
        expected = metrics["random_recall"] * metrics["total"]
        rows.append(
            [
                "random filter",
                f"{facts['dropped']:,}",
                f"{expected:,.0f} of {metrics['total']:,}",
                metrics["random_precision"],
                metrics["random_recall"],
                0.5,
            ]
        )
        kinds = ", ".join(f"{kind} {recall:.0%}" for kind, recall in metrics["recall_by_kind"].items())
        notes.append(f"recall of {name} by kind of corruption: {kinds}")
    if not rows:
        return None
    columns = ["filter", "dropped", "corrupted rows caught", "precision", "recall", "AUC"]
    return {"title": "Injected corruption", "columns": columns, "rows": rows, "notes": notes}


def diversity_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Coverage of the candidates by each selection's rows, next to a random subset of the same size."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        stats = artifacts[name].facts.get("diverse") if isinstance(stage, Select) else None
        if not stats:
            continue
        kept = f"{stats['kept']:,} of {stats['candidates']:,}"
        for label, coverage in ((f"{name} ({stats['method']})", stats["coverage"]), ("random subset", stats["random"])):
            rows.append([label, kept, coverage["radius"], coverage["similarity"]])
        if stats["kept"] < stats["requested"]:
            notes.append(f"{name}: fewer than the requested {stats['requested']:,} rows: {_shortfall_reason(stats)}")
    if not rows:
        return None
    notes.append(
        "radius: largest distance from a row to its nearest kept row; similarity: mean cosine to the nearest kept row"
    )
    columns = ["subset", "kept", "radius", "similarity"]
    return {"title": "Diversity", "columns": columns, "rows": rows, "notes": notes}


def _shortfall_reason(stats: Mapping[str, Any]) -> str:
    """Why fewer rows were selected than requested."""
    if stats["method"] == "k_center":
        return "all other rows have the same embedding as a kept row"
    chance = stats["chance_similarity"]
    median = "" if chance is None else f" (median of random pairs: {chance['median']:.2f})"
    return f"all other rows have a similarity above {stats['max_similarity']:g} to a kept row{median}"


def review_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Agreement of each reviewed filter with the reviewer, and the threshold with the highest agreement."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Review):
            continue
        facts = artifacts[name].facts
        agreement = facts["agreement"]
        for threshold in facts["thresholds"]:
            rows.append(
                [
                    f"{stage.data} in {name}",
                    f"{agreement['reviewed']:,}",
                    agreement["share"],
                    agreement["kappa"],
                    threshold["score"],
                    threshold["current_threshold"],
                    threshold["threshold"],
                    threshold["agreement"],
                ]
            )
            if threshold["beyond_reviewed"]:
                notes.append(
                    f"{name}: the best {threshold['score']} threshold is at the edge of the reviewed range; "
                    "one outside it may agree better"
                )
        pending = facts["sampled"] - facts["sampled_decided"]
        notes.append(
            f"{name}: the review restored {facts['restored']:,} dropped rows and removed {facts['removed']:,} kept rows"
            + (f"; {pending:,} rows are not reviewed yet" if pending > 0 else "")
        )
    if not rows:
        return None
    columns = ["filter", "reviewed", "agreement", "kappa", "score", "threshold", "best threshold", "best agreement"]
    notes.append("measured near the threshold only; far from it filter and reviewer agree more often")
    title = "Agreement of filter and reviewer"
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}


def training_tables(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> list[Table]:
    """Return the tables of the trainers that have one (`TrainerSpec.table`) and whose stages give it rows."""
    trainings = {name: stage for name, stage in experiment.stages.items() if isinstance(stage, Training)}
    tables = []
    for reference in dict.fromkeys(spec.table for spec in TRAINERS.values() if spec.table):
        stages = {name: stage for name, stage in trainings.items() if TRAINERS[stage.kind].table == reference}
        tables.append(load_object(reference)(stages, artifacts))
    return [table for table in tables if table is not None]


def classifier_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Training labels and held-out metrics of each classifier."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name in stages:
        facts = artifacts[name].facts
        held_out = sum(facts["eval_labels"].values())
        metrics = [facts.get(key) for key in ("eval_loss", "eval_accuracy", "eval_auc", "temperature")]
        rows.append([name, *(f"{facts['labels'][label]:,}" for label in ("good", "bad")), f"{held_out:,}", *metrics])
        if facts["unlabelled"]:
            notes.append(f"{name}: {facts['unlabelled']:,} of {facts['rows']:,} rows have no label and were skipped")
        if facts["eval_rows_trained_on"]:
            notes.append(f"{name}: {facts['eval_rows_trained_on']:,} of the held-out rows are also training rows")
    if not rows:
        return None
    columns = ["classifier", "good rows", "bad rows", "held-out rows", "loss", "accuracy", "AUC", "temperature"]
    return {"title": "Classifiers", "columns": columns, "rows": rows, "notes": notes}


def reward_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Training pairs, held-out metrics and output scale of each reward model."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name in stages:
        facts = artifacts[name].facts
        metrics = [facts.get(key) for key in ("eval_loss", "eval_accuracy", "eval_margin")]
        scale = [facts["reward_mean"], facts["reward_std"]]
        rows.append([name, f"{facts['pairs']:,}", f"{facts['eval_pairs']:,}", *metrics, *scale])
        if facts["unusable"]:
            reasons = "; ".join(f"{count:,}: {reason}" for reason, count in facts["unusable_because"].items() if count)
            notes.append(f"{name}: {facts['unusable']:,} of {facts['rows']:,} rows were skipped ({reasons})")
        if facts["eval_rows_trained_on"]:
            notes.append(f"{name}: {facts['eval_rows_trained_on']:,} of the held-out pairs are also training pairs")
        if facts["scale_from"] == "data":
            notes.append(f"{name}: mean and std were computed on {facts['reward_norm_responses']:,} training responses")
    if not rows:
        return None
    columns = ["reward model", "pairs", "held-out pairs", "loss", "accuracy", "margin", "mean", "std"]
    notes.append("normalized reward = (output - mean) / std")
    return {"title": "Reward models", "columns": columns, "rows": rows, "notes": notes}


def policy_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> Table | None:
    """Reward of each RL-trained policy before and after training, with its KL divergence from the reference model."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    with_kl: set[str] = set()
    for name, stage in stages.items():
        artifact = artifacts[name]
        facts, runtime_stats = artifact.facts, artifact.runtime_stats
        reward = rewards(facts)
        if reward is None:
            continue
        metrics = [reward.before, reward.after, reward.kl, _eos_rate(facts)]
        rows.append([name, *metrics, *(_with_separators(facts.get(key)) for key in ("num_responses", "steps"))])
        if reward.kl is not None:
            with_kl.add(stage.kind)
        if not reward.held_out:
            notes.append(
                f"{name}: rewards of the first and last training steps; set `eval_data` to measure held-out prompts"
            )
        shared, separate = (runtime_stats.get(key) for key in ("weights_bytes", "weights_bytes_separate"))
        if facts.get("shared_base") and shared and separate:
            notes.append(f"{name}: models share one base: {size(shared)} of weights instead of {size(separate)}")
    if not rows:
        return None
    columns = ["policy", "reward before", "reward after", "KL", "EOS rate", "responses", "steps"]
    if with_kl:
        notes.append(f"KL: divergence from the reference model, in nats {_kl_unit(with_kl)}")
    return {"title": "Rewards", "columns": columns, "rows": rows, "notes": notes}


def _kl_unit(kinds: set[str]) -> str:
    """For example 'per response (ppo), per token (grpo)'."""
    named = {unit: ", ".join(sorted(kind for kind in kinds if TRAINERS[kind].kl_unit == unit)) for unit in KL_UNITS}
    return ", ".join(f"per {unit} ({names})" for unit, names in named.items() if names)


def _eos_rate(facts: Mapping[str, Any]) -> float | None:
    """Share of the responses that end with an EOS token."""
    eos_rate, clipped_ratio = facts.get("eos_rate"), facts.get("clipped_ratio")
    return 1 - clipped_ratio if eos_rate is None and clipped_ratio is not None else eos_rate


def _with_separators(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


FORGETTING = 4
"""Index of the forgetting column in the loss table, which is omitted if no stage has a baseline."""


def loss_table(experiment: Experiment, artifacts: Mapping[str, Artifact], best: Mapping[str, Artifact]) -> Table | None:
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


def win_table(experiment: Experiment, artifacts: Mapping[str, Artifact], best: Mapping[str, Artifact]) -> Table | None:
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


def results(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return metrics by stage, for JSON output: the result rows of an evaluation; for a training its first metric on
    `eval_data` (a loss or a reward), None without `eval_data`."""
    values = {}
    for name, artifact in artifacts.items():
        stage = experiment.stages[name]
        if isinstance(stage, Training):
            values[name] = artifact.facts.get(next(iter(TRAINERS[stage.kind].metrics), ""))
        elif stage.output_type == "metrics":
            values[name] = artifact.facts.get("results")
    return values


MAX_TRIALS = 20
"""Rows of the search table; the report and W&B have all trials."""


def search_table(experiment: Experiment, artifact: Artifact | None) -> Table | None:
    """The trials, best first, with notes on the winner and its statistical ties."""
    if artifact is None or experiment.search is None:
        return None
    facts = artifact.facts
    result = {key: facts.get(key) for key in ("standings", "ties", "pareto_front", "ended_by")}
    # The events that a reused search logs.
    events: list[dict[str, Any]] = [
        {"event": "search_started", **experiment.search.describe()},
        *({"event": "trial_finished", **trial} for trial in facts["trials"]),
        {"event": "search_finished", "best": (facts.get("best") or {}).get("trial"), **result},
    ]
    search = replay(events).search
    assert search is not None, "search_started was replayed"
    board = leaderboard(search, words=True)
    hidden = len(board.rows) - MAX_TRIALS
    notes = [
        *winner_summary(search),
        _trial_counts(search) + (f"; the report has the other {hidden}" if hidden > 0 else ""),
    ]
    return {
        "title": "Search, best first",
        "columns": board.columns,
        "rows": board.rows[:MAX_TRIALS],
        "notes": notes,
        "optional": board.optional,
    }


def _trial_counts(search: SearchState) -> str:
    states = [trial.status for trial in search.originals]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "stopped", "failed") if state in states)
    replicates = len(search.trials) - len(states)
    return f"{len(states)} trials: {counts}" + (f"; {replicates} replicates with other seeds" if replicates else "")
