"""Synthetic event log of a search: two metrics, a constraint, a conditional field, a cloned trial, replicates."""

from __future__ import annotations

import math
import random
from typing import Any

from sample_run import START, Event

LOSS, FORGETTING = "sft.eval_loss", "eval.sft.general.forgetting"
RATE, SCHEDULE, WARMUP, SHARE = "sft.learning_rate", "sft.schedule", "sft.warmup", "clean.keep.perplexity.quantile"
STAGES = [
    {"name": "docs", "kind": "dataset", "inputs": []},
    {"name": "scored", "kind": "score", "inputs": ["docs"]},
    {"name": "clean", "kind": "select", "inputs": ["scored"]},
    {"name": "sft", "kind": "sft", "inputs": ["clean"]},
]
SPACE = {
    RATE: "loguniform [0.0001, 0.01]",
    SCHEDULE: "choice ['linear', 'constant']",
    WARMUP: "uniform [0.0, 0.3] when sft.schedule is linear",
    SHARE: "choice [0.5, 0.8, 1.0]",
}
REPLICATED = ("t00", "t01")


def event(name: str, at: float, **values: Any) -> Event:
    return {"t": START + at, "event": name, **values}


def searched_events(trials: int = 16, **finished: Any) -> list[Event]:
    """Return the log of a search with `trials` trials, the first two of them replicated once. `finished`: other values
    of search_finished."""
    events = [
        event("run_started", 0, run="searched", file="searched.yaml", text="# Which?", stages=STAGES),
        event("stage_finished", 1, stage="docs", kind="dataset", fingerprint="f-docs", facts={"rows": 1000}),
        event("stage_finished", 2, stage="scored", kind="score", fingerprint="f-scored", facts={"rows_in": 1000}),
        event(
            "search_started",
            3,
            metric=LOSS,
            mode="min",
            metrics=[LOSS, FORGETTING],
            objectives=[{"metric": FORGETTING, "mode": "min", "weight": None}],
            constraints=[{"metric": FORGETTING, "max": 0.1, "min": None}],
            trials=trials,
            scheduler="none",
            space=SPACE,
            max_concurrent=2,
            reason="2 workers",
        ),
    ]
    for number in range(trials):
        events += trial_events(f"t{number:02d}", 10.0 * (number + 1), overrides_of(number), origin_of(number))
    for number, name in enumerate(REPLICATED):
        overrides = {**overrides_of(number), "sft.seed": 1017}
        events += trial_events(f"r{number:02d}", 500.0 + number, overrides, {"origin": "replicate", "of": name})
    standings = [{"trial": name, "mean": 3.1, "ci_half_width": 0.0123, "values": [3.1, 3.11]} for name in REPLICATED]
    end = {"best": "t00", "best_overrides": overrides_of(0), "value": 3.1, "seconds": 500.0, "ended_by": ""}
    end |= {"standings": standings, "ties": ["t01"], "pareto_front": ["t00", "t03"], **finished}
    return [*events, event("search_finished", 600, **end), event("run_finished", 601, state="done", seconds=601.0)]


def overrides_of(number: int) -> dict[str, Any]:
    """Return the overrides of a trial. The first two are near the best learning rate, the others are random."""
    rng = random.Random(number)
    rate = 10 ** (-3 + 0.01 * number) if number < 2 else 10 ** rng.uniform(-4, -2)
    schedule = "linear" if number % 2 == 0 else "constant"
    warmup = {WARMUP: round(rng.uniform(0, 0.3), 3)} if schedule == "linear" else {}
    return {RATE: rate, SCHEDULE: schedule, **warmup, SHARE: [0.8, 0.5, 1.0][number % 3]}


def origin_of(number: int) -> dict[str, str]:
    return {2: {"origin": "initial", "of": ""}, 3: {"origin": "cloned", "of": "t00"}}.get(
        number, {"origin": "sampled", "of": ""}
    )


def trial_events(name: str, at: float, overrides: dict[str, Any], origin: dict[str, str]) -> list[Event]:
    loss = 3.1 + 0.5 * abs(math.log10(overrides[RATE]) + 3) + (0.01 if "sft.seed" in overrides else 0.0)
    values = {LOSS: loss, FORGETTING: 0.02 if overrides[RATE] < 2e-3 else 0.2}
    kept = round(1000 * overrides[SHARE])
    rows = [{"text": f"<b>row</b> of {name}", "score": 9.5, "injected_corruption": "cut"}]
    decile = {"low": 1.0, "high": 20.0, "kept": kept, "dropped": 1000 - kept, "kept_rows": rows, "dropped_rows": rows}
    facts = {"rows_in": 1000, "kept": kept, "samples": {"score": "perplexity", "deciles": [decile]}}
    outcome = {"state": "done", "value": loss, "values": values, "feasible": values[FORGETTING] <= 0.1}
    outcome |= {"steps": 40.0, "tokens": 40_000.0, "rows": 320.0, "seconds": 9.0, "error": ""}
    clean = {"stage": "clean", "kind": "select", "fingerprint": f"f-{overrides[SHARE]}", "reused": False}
    return [
        event("trial_started", at, trial=name, overrides=overrides, **origin),
        event("stage_finished", at + 1, trial=name, seconds=0.1, artifact="", facts=facts, **clean),
        event("trial_finished", at + 9, trial=name, overrides=overrides, **outcome),
    ]
