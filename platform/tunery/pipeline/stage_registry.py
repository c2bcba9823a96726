"""Registry of stage kinds: the function that implements each, and its version.

Functions are referred to by name, so that planning imports neither torch nor Ray. Increase a version when a code change
alters the result for the same inputs: the artifacts of the stage, and those that depend on them, are rebuilt. When rows
are encoded to different tokens, increase `ENCODING_VERSION` (models/encode.py) instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from tunery.store import StageContext, StageResult


@dataclass(frozen=True)
class StageKind:
    function: str
    version: int
    needs_ray: bool

    def load(self) -> Callable[[StageContext], StageResult]:
        module, name = self.function.split(":")
        function: Callable[[StageContext], StageResult] = getattr(importlib.import_module(module), name)
        return function


STAGES = {
    "dataset": StageKind("tunery.ingest.dataset:run_dataset", 4, needs_ray=False),
    "score": StageKind("tunery.scoring.score:run_scoring", 4, needs_ray=True),
    "select": StageKind("tunery.selection.select_stage:run_select", 3, needs_ray=False),
    "review": StageKind("tunery.review.review_stage:run_review", 3, needs_ray=False),
    "augment": StageKind("tunery.augment.augment_stage:run_augment", 2, needs_ray=False),
    "pretrain": StageKind("tunery.training.launch:run_training", 2, needs_ray=True),
    "sft": StageKind("tunery.training.launch:run_training", 2, needs_ray=True),
    "classifier": StageKind("tunery.training.launch:run_training", 3, needs_ray=True),
    "reward": StageKind("tunery.training.launch:run_training", 3, needs_ray=True),
    "dpo": StageKind("tunery.training.launch:run_training", 2, needs_ray=True),
    "kto": StageKind("tunery.training.launch:run_training", 2, needs_ray=True),
    "grpo": StageKind("tunery.training.launch:run_training", 3, needs_ray=True),
    "rloo": StageKind("tunery.training.launch:run_training", 3, needs_ray=True),
    "ppo": StageKind("tunery.training.launch:run_training", 3, needs_ray=True),
    "win_rate": StageKind("tunery.evaluation.win_rate:run_win_rate", 3, needs_ray=True),
    "evaluate": StageKind("tunery.evaluation.loss_eval:run_evaluate", 2, needs_ray=True),
}
