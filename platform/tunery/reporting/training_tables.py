"""Summary tables of trainings: classifiers, reward models, policies. `TrainerSpec.table` refers to them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import size
from tunery.events.stage_summary import rewards
from tunery.reporting.tables import SummaryTable
from tunery.spec import TRAINERS, Experiment, Training
from tunery.spec.plugins import load_object
from tunery.spec.stage_kinds import KL_UNITS
from tunery.store import Artifact

Trainings = Mapping[str, Training[Any]]
"""Trainings by stage name."""


def training_tables(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> list[SummaryTable]:
    """Return the tables of the trainers that have one (`TrainerSpec.table`) and whose stages give it rows."""
    trainings = {name: stage for name, stage in experiment.stages.items() if isinstance(stage, Training)}
    tables = []
    for reference in dict.fromkeys(spec.table for spec in TRAINERS.values() if spec.table):
        stages = {name: stage for name, stage in trainings.items() if TRAINERS[stage.kind].table == reference}
        tables.append(load_object(reference)(stages, artifacts))
    return [table for table in tables if table is not None]


def classifier_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
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


def reward_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
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


def policy_table(stages: Trainings, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
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
