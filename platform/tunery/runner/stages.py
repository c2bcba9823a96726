"""The table of stage kinds: what makes each, and the version of how.

Functions are named, not imported, so that planning loads neither torch nor Ray. Raise a version when a change makes
a stage give another result from the same inputs: its artifacts, and those of whatever reads them, are made anew. Where
rows become other tokens, raise `ENCODING_VERSION` (models/encode.py).
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
    "dataset": StageKind("tunery.data.dataset:make_dataset", 3, needs_ray=False),
    "score": StageKind("tunery.data.score:make_scores", 3, needs_ray=True),
    "select": StageKind("tunery.data.select.stage:make_selection", 2, needs_ray=False),
    "review": StageKind("tunery.data.review.stage:make_review", 2, needs_ray=False),
    "augment": StageKind("tunery.data.augment.stage:make_augmented", 1, needs_ray=False),
    "pretrain": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "sft": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "classifier": StageKind("tunery.train.launch:make_model", 3, needs_ray=True),
    "reward": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "dpo": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "kto": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "grpo": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "rloo": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "ppo": StageKind("tunery.train.launch:make_model", 2, needs_ray=True),
    "win_rate": StageKind("tunery.evaluate.win_rate:make_win_rates", 2, needs_ray=True),
    "evaluate": StageKind("tunery.evaluate.heldout:make_metrics", 2, needs_ray=True),
}
