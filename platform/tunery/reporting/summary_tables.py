"""The tables that a run ends with, from the facts of its artifacts, and the numbers for other programs. Pure.

Each table is {"title", "columns", "rows", "notes"}, or None where the experiment has nothing of the kind.
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
    ClassifierTraining,
    Evaluate,
    Experiment,
    Grpo,
    Ppo,
    PythonReward,
    Review,
    RewardTraining,
    Rloo,
    Score,
    Select,
    Stage,
    Training,
    WinRate,
)
from tunery.spec.graph import with_upstream
from tunery.spec.references import model_name
from tunery.store import Artifact

Table = dict[str, Any]


def filter_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """How well each selection found the planted bad rows, beside a random filter that drops as many."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        judged = made[name].facts.get("planted") if isinstance(stage, Select | Review) else None
        if not judged:
            continue
        facts = made[name].facts
        caught = f"{judged['dropped']:,} of {judged['total']:,}"
        rows.append([name, f"{facts['dropped']:,}", caught, judged["precision"], judged["recall"], judged["auc"]])
        expected = judged["random_recall"] * judged["total"]
        rows.append(
            [
                "random filter",
                f"{facts['dropped']:,}",
                f"{expected:,.0f} of {judged['total']:,}",
                judged["random_precision"],
                judged["random_recall"],
                0.5,
            ]
        )
        kinds = ", ".join(f"{kind} {recall:.0%}" for kind, recall in judged["recall_by_kind"].items())
        notes.append(f"{name} caught by kind of damage: {kinds}")
    if not rows:
        return None
    columns = ["filter", "dropped", "planted rows caught", "precision", "recall", "AUC"]
    return {"title": "Planted bad rows", "columns": columns, "rows": rows, "notes": notes}


def diversity_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """How near each selection's rows come to all that it chose among, beside as many rows drawn at random."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        told = made[name].facts.get("diverse") if isinstance(stage, Select) else None
        if not told:
            continue
        of = f"{told['kept']:,} of {told['candidates']:,}"
        for label, cover in ((f"{name} ({told['method']})", told["cover"]), ("as many at random", told["random"])):
            rows.append([label, of, cover["radius"], cover["similarity"]])
        if told["kept"] < told["wanted"]:
            notes.append(f"{name}: {told['wanted']:,} rows were asked for, " + _why_fewer(told))
    if not rows:
        return None
    notes.append("radius: from the worst covered row to the nearest kept one; similarity: mean cosine to that")
    columns = ["choice", "kept", "radius", "similarity"]
    return {"title": "Diversity", "columns": columns, "rows": rows, "notes": notes}


def _why_fewer(told: Mapping[str, Any]) -> str:
    if told["method"] == "k_center":
        return "all others have the same embedding as a kept one"
    usual = "" if told["by_chance"] is None else f" (two rows have {told['by_chance']['median']:.2f} by chance)"
    return f"all others are more similar to a kept one than {told['similarity']:g}{usual}"


def review_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """How far each reviewed filter and the reviewer agree, and the threshold that would agree best."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Review):
            continue
        facts = made[name].facts
        agreed = facts["agreement"]
        for found in facts["thresholds"]:
            rows.append(
                [
                    f"{stage.data} in {name}",
                    f"{agreed['reviewed']:,}",
                    agreed["share"],
                    agreed["kappa"],
                    found["score"],
                    found["cut"],
                    found["threshold"],
                    found["agreement"],
                ]
            )
            if found["beyond_reviewed"]:
                notes.append(
                    f"{name}: by {found['score']} the best threshold is at the end of what was reviewed; one further "
                    "away may agree better"
                )
        notes.append(
            f"{name}: {facts['restored']:,} dropped rows came back, {facts['removed']:,} kept ones went"
            + (f"; {facts['asked'] - facts['answered']:,} rows wait" if facts["asked"] > facts["answered"] else "")
        )
    if not rows:
        return None
    columns = ["filter", "reviewed", "agreement", "kappa", "score", "cut", "best threshold", "agreement there"]
    notes.append("near the cut only: far from it a filter is right more often")
    title = "Filter and reviewer near the cut"
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}


def classifier_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """What each classifier that was trained here learned from, and how well it tells held-out rows apart."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, ClassifierTraining):
            continue
        facts = made[name].facts
        held_out = sum(facts["eval_labels"].values())
        measures = [facts.get(key) for key in ("eval_loss", "eval_accuracy", "eval_auc", "temperature")]
        rows.append([name, *(f"{facts['labels'][label]:,}" for label in ("good", "bad")), f"{held_out:,}", *measures])
        if facts["unlabelled"]:
            notes.append(f"{name}: {facts['unlabelled']:,} of {facts['rows']:,} rows bear no label and were left out")
        if facts["eval_rows_trained_on"]:
            notes.append(
                f"{name}: {facts['eval_rows_trained_on']:,} of the held-out rows are among those it was trained on"
            )
    if not rows:
        return None
    columns = ["classifier", "good rows", "bad rows", "held-out rows", "loss", "accuracy", "AUC", "temperature"]
    return {"title": "Classifiers", "columns": columns, "rows": rows, "notes": notes}


def reward_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """What each reward model learned from, how well it tells held-out answers apart, and the scale of its outputs."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, RewardTraining):
            continue
        facts = made[name].facts
        measures = [facts.get(key) for key in ("eval_loss", "eval_accuracy", "eval_margin")]
        scale = [facts["reward_mean"], facts["reward_deviation"]]
        rows.append([name, f"{facts['pairs']:,}", f"{facts['eval_pairs']:,}", *measures, *scale])
        if facts["unusable"]:
            because = "; ".join(f"{count:,}: {reason}" for reason, count in facts["unusable_because"].items() if count)
            notes.append(f"{name}: {facts['unusable']:,} of {facts['rows']:,} rows were left out ({because})")
        if facts["eval_rows_trained_on"]:
            notes.append(
                f"{name}: {facts['eval_rows_trained_on']:,} of the held-out pairs are among those it was trained on"
            )
        if facts["scale_from"] == "data":
            notes.append(f"{name}: its scale is that of {facts['scale_answers']:,} answers that it was trained on")
    if not rows:
        return None
    columns = ["reward model", "pairs", "held-out pairs", "loss", "accuracy", "margin", "mean", "deviation"]
    notes.append("a reward is (output - mean) / deviation")
    return {"title": "Reward models", "columns": columns, "rows": rows, "notes": notes}


def policy_table(experiment: Experiment, made: Mapping[str, Artifact]) -> Table | None:
    """What the answers of each policy that learned from rewards are worth, and at what distance from its beginning."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    with_kl: set[str] = set()
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Ppo | Grpo | Rloo):
            continue
        artifact = made[name]
        facts, measured = artifact.facts, artifact.measured
        told = rewards(facts)
        if told is None:
            continue
        measures = [told.before, told.after, told.kl, _ended(facts)]
        rows.append([name, *measures, *(_counted(facts.get(key)) for key in ("answers", "steps"))])
        if told.kl is not None:
            with_kl.add(stage.kind)
        if not told.held_out:
            notes.append(f"{name}: rewards of its own first and last steps; with `eval_data` they would be held out")
        held, separate = (measured.get(key) for key in ("weights_bytes", "weights_bytes_separate"))
        if facts.get("shared_base") and held and separate:
            notes.append(f"{name}: models on one base: {size(held)} of weights instead of {size(separate)}")
    if not rows:
        return None
    columns = ["policy", "reward before", "reward after", "KL", "end rate", "answers", "steps"]
    if with_kl:
        notes.append(f"KL: from the first model, in nats {_unit_of_kl(with_kl)}")
    return {"title": "Rewards", "columns": columns, "rows": rows, "notes": notes}


def _unit_of_kl(kinds: set[str]) -> str:
    """Ours is of whole answers, TRL's of tokens."""
    by_token = ", ".join(sorted(kinds - {"ppo"}))
    return ", ".join(["an answer (ppo)"] * ("ppo" in kinds) + [f"a token ({by_token})"] * bool(by_token))


def _ended(facts: Mapping[str, Any]) -> float | None:
    """Share of the answers that ended by themselves."""
    ended, cut_off = facts.get("eos_rate"), facts.get("cut_off")
    return 1 - cut_off if ended is None and cut_off is not None else ended


def _counted(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


FORGETTING = 4
"""Of the columns of losses: left out where no stage has a baseline."""


def loss_table(experiment: Experiment, made: Mapping[str, Artifact], best: Mapping[str, Artifact]) -> Table | None:
    """Loss of each model on each set, best first; the best trial's beside those of the file's own values."""
    rows: list[list[Any]] = []
    searched = {path.split(".")[0] for path in experiment.search.space} if experiment.search else set()
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Evaluate):
            continue
        for result in made[name].facts["results"]:
            rows.append(_loss_row(result, result["model"], experiment, made))
        for result in best[name].facts["results"] if name in best else []:
            if _depends(experiment, result["model"], searched):
                rows.append(_loss_row(result, f"{result['model']} (best trial)", experiment, best))
    if not rows:
        return None
    rows.sort(key=lambda row: (row[1], row[2]))
    columns = ["model", "held-out set", "loss", "perplexity", "forgetting", "trained on rows", "steps"]
    if all(row[FORGETTING] is None for row in rows):
        del columns[FORGETTING]
        rows = [row[:FORGETTING] + row[FORGETTING + 1 :] for row in rows]
    notes = filter_verdicts(experiment, made)
    return {"title": "Held-out loss (nats per answer token)", "columns": columns, "rows": rows, "notes": notes}


SMALL = 0.02
"""Nats per token: the standard deviation over seeds at the size of the quickstart (benchmarks/filtering_helps.py)."""


def filter_verdicts(experiment: Experiment, made: Mapping[str, Artifact]) -> list[str]:
    """Did filtering help? For every model trained on selected rows that has a twin: same steps, all rows."""
    stages = experiment.stages
    losses = {
        (result["model"], result["set"]): result["loss"]
        for name, stage in stages.items()
        if isinstance(stage, Evaluate)
        for result in made[name].facts["results"]
    }
    notes = []
    for (filtered, data), loss in losses.items():
        for (other, other_data), other_loss in losses.items():
            if data == other_data and _is_twin(stages.get(filtered), stages.get(other), stages):
                same = made[filtered].facts["steps"] == made[other].facts["steps"]
                if not same:
                    continue
                winner_summary = (
                    "helped"
                    if loss < other_loss - SMALL
                    else "hurt"
                    if loss > other_loss + SMALL
                    else "made no difference that one seed can show"
                )
                notes.append(
                    f"filtering {winner_summary} on {data}: {filtered} {loss:.3f}, {other} {other_loss:.3f} "
                    f"({loss - other_loss:+.3f}) after the same number of steps"
                )
    return notes


def _is_twin(filtered: Stage | None, other: Stage | None, stages: Mapping[str, Stage]) -> bool:
    """`other` is trained as `filtered` is, but on the rows before the selection."""
    if not isinstance(filtered, Training) or not isinstance(other, Training):
        return False
    own = {"data", "epochs"}  # fewer rows for more epochs: the caller compares the steps
    if filtered.model_dump(exclude=own) != other.model_dump(exclude=own):
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


def _loss_row(result: Mapping[str, Any], label: str, experiment: Experiment, made: Mapping[str, Artifact]) -> list[Any]:
    facts = made[result["model"]].facts if result["model"] in experiment.stages else {}
    forgotten = f"{result['forgetting']:+.1%}" if "forgetting" in result else None
    trained = [facts.get("rows", ""), facts.get("steps", "")]
    return [label, result["set"], result["loss"], result["perplexity"], forgotten, *trained]


def win_table(experiment: Experiment, made: Mapping[str, Artifact], best: Mapping[str, Artifact]) -> Table | None:
    """How often each model's answers beat the baseline's, best first; the best trial's beside those of the file's own
    values."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    searched = {path.split(".")[0] for path in experiment.search.space} if experiment.search else set()
    for name, stage in experiment.stages.items():
        if not isinstance(stage, WinRate):
            continue
        judge = stage.judge.python if isinstance(stage.judge, PythonReward) else model_name(stage.judge)
        sides = [reference for reference in (stage.baseline, stage.judge) if isinstance(reference, str)]
        for result in made[name].facts["results"]:
            rows.append(_win_row(result, result["model"], judge))
        for result in best[name].facts["results"] if name in best else []:
            if any(_depends(experiment, stage_name, searched) for stage_name in (result["model"], *sides)):
                rows.append(_win_row(result, f"{result['model']} (best trial)", judge))
        for result in made[name].facts["results"]:
            if any(result["left_out"].values()):
                left_out = result["left_out"]
                notes.append(
                    f"{name}: {result['model']} and {result['baseline']['model']} are compared on {result['rows']:,} "
                    f"prompts of {result['set']}; {left_out['too_long']:,} are too long for one of them, "
                    f"{left_out['unusable']:,} rows ask nothing"
                )
    if not rows:
        return None
    rows.sort(key=lambda row: (row[2], row[3], -row[4]))
    columns = ["model", "baseline", "prompts", "judge", "win rate", "95% interval", "reward", "reward against"]
    columns += ["tokens an answer"]
    return {"title": "Win rates", "columns": columns, "rows": rows, "notes": notes}


def _win_row(result: Mapping[str, Any], label: str, judge: str) -> list[Any]:
    low, high = result["interval"]
    against = result["baseline"]
    compared = [label, against["model"], result["set"], judge, result["win_rate"], f"{low:.3f}–{high:.3f}"]
    return [*compared, result["reward"], against["reward"], result["response_length"]]


def _depends(experiment: Experiment, name: str, searched: set[str]) -> bool:
    """Whether a searched field changes what that is, where it is a stage."""
    return name in experiment.stages and bool(searched & with_upstream(experiment.stages, [name]).keys())


def results(experiment: Experiment, made: Mapping[str, Artifact]) -> dict[str, Any]:
    """By stage, for other programs: the rows of an evaluation; of a training the first that is measured on its
    `eval_data` (a loss or a reward), None without."""
    found = {}
    for name, artifact in made.items():
        stage = experiment.stages[name]
        if isinstance(stage, Training):
            found[name] = artifact.facts.get(stage.metrics[0])
        elif stage.gives == "metrics":
            found[name] = artifact.facts.get("results")
    return found


MOST_TRIALS = 20
"""The table that a run ends with is to be read; the report and W&B have all trials."""


def search_table(experiment: Experiment, found: Artifact | None) -> Table | None:
    """The trials, best first; who won, and how sure that is."""
    if found is None or experiment.search is None:
        return None
    facts = found.facts
    told = {key: facts.get(key) for key in ("standings", "ties", "front", "ended_by")}
    # What the log says of a search that is found done, and is told again.
    events: list[dict[str, Any]] = [
        {"event": "search_started", **experiment.search.describe()},
        *({"event": "trial_finished", **trial} for trial in facts["trials"]),
        {"event": "search_finished", "best": (facts.get("best") or {}).get("trial"), **told},
    ]
    search = replay(events).search
    assert search is not None, "it was started"
    board = leaderboard(search, words=True)
    more = len(board.rows) - MOST_TRIALS
    notes = [
        *winner_summary(search),
        _counted_trials(search) + (f"; the report has the other {more}" if more > 0 else ""),
    ]
    return {
        "title": "Search, best first",
        "columns": board.columns,
        "rows": board.rows[:MOST_TRIALS],
        "notes": notes,
        "optional": board.optional,
    }


def _counted_trials(search: SearchState) -> str:
    states = [trial.status for trial in search.own]
    counted = ", ".join(f"{states.count(state)} {state}" for state in ("done", "stopped", "failed") if state in states)
    again = len(search.trials) - len(states)
    return f"{len(states)} trials: {counted}" + (f"; {again} more with other seeds" if again else "")
