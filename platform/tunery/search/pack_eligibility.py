"""Which trials train in packs, and why the others don't. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tunery.pipeline.stage_registry import STAGES
from tunery.spec import Experiment, Training
from tunery.spec.graph import with_upstream
from tunery.training.packed.pack_server import unpackable_reason

AUTO_SIZE = {"cpu": 4, "gpu": 8}
"""Members of a pack at most, where nobody says; a GPU whose memory has room for fewer takes fewer. More bring little:
on a CPU a member's step takes 43 ms alone, 26 among four and 30 among eight; and each has a driver's process."""


def pack_size(experiment: Experiment) -> int:
    compute = experiment.compute
    return (
        AUTO_SIZE["gpu" if compute.device == "gpu" else "cpu"]
        if compute.max_packed_trials == "auto"
        else compute.max_packed_trials
    )


def search_unpackable_reason(trial: Experiment, searched: Iterable[str]) -> str:
    """Why a trial (search/space.py) takes no seat in a pack; "" when it does. `searched`: the stages whose fields the
    search changes.

    A packed trial has no CPU or GPU of its own: whatever else it has to make must be little, and made by its driver.
    """
    if trial.compute.workers_per_trial != 1:
        return f"a trial has {trial.compute.workers_per_trial} workers"
    own = [name for name in trial.stages if set(searched) & with_upstream(trial.stages, [name]).keys()]
    trainings = [name for name in own if isinstance(trial.stages[name], Training)]
    if not trainings:
        return "trials train nothing"
    for name in trainings:
        stage = trial.stages[name]
        if reason := unpackable_reason(stage, trial.compute):
            return f"{name}: {reason}"
        model = getattr(stage, "model", "")
        if isinstance(model, str) and model in own:
            return f"{name}: each trial has another `{model}`"
    on_cpu = trial.compute.device == "cpu"
    for name in own:
        kind = trial.stages[name].kind
        if name not in trainings and STAGES[kind].needs_ray and not (on_cpu and kind in ("evaluate", "win_rate")):
            return f"{name}: each trial makes its own {kind} stage, which needs a worker"
    return ""
