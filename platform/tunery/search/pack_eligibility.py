"""Which trials train in packs, and why the others do not. No I/O, no Ray."""

from __future__ import annotations

from collections.abc import Iterable

from tunery.spec import STAGE_KINDS, Experiment, Training
from tunery.spec.graph import with_upstream
from tunery.training.packed.pack_server import unpackable_reason

AUTO_PACK_SIZE = {"cpu": 4, "gpu": 8}
"""Maximum number of trials in a pack for `max_packed_trials: auto`; limited further by GPU memory.

Larger packs gain little: on a CPU a step of one trial takes 43 ms alone, 26 ms in a pack of four and 30 ms in a pack of
eight, and every trial needs a driver process."""


def pack_size(experiment: Experiment) -> int:
    compute = experiment.compute
    return (
        AUTO_PACK_SIZE["gpu" if compute.device == "gpu" else "cpu"]
        if compute.max_packed_trials == "auto"
        else compute.max_packed_trials
    )


def search_unpackable_reason(trial: Experiment, searched: Iterable[str]) -> str:
    """Return why a trial (search/space.py) cannot be packed; "" if it can. `searched` are the stages whose fields the
    search changes.

    A packed trial reserves no CPU or GPU. Its other stages run in its driver, so they must be cheap.
    """
    if trial.compute.workers_per_trial != 1:
        return f"a trial has {trial.compute.workers_per_trial} workers"
    own = [name for name in trial.stages if set(searched) & with_upstream(trial.stages, [name]).keys()]
    trainings = [name for name in own if isinstance(trial.stages[name], Training)]
    if not trainings:
        return "the search changes no training"
    for name in trainings:
        stage = trial.stages[name]
        if reason := unpackable_reason(stage, trial.compute):
            return f"{name}: {reason}"
        model = getattr(stage, "model", "")
        if isinstance(model, str) and model in own:
            return f"{name}: the base model `{model}` differs between trials"
    on_cpu = trial.compute.device == "cpu"
    for name in own:
        stage = trial.stages[name]
        needs_worker = STAGE_KINDS[stage.kind].needs_ray and not (on_cpu and stage.output_type == "metrics")
        if name not in trainings and needs_worker:
            return f"{name}: each trial runs its own {stage.kind} stage, which needs a worker"
    return ""
