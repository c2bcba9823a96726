"""What rates answers: a reward model, or a function of the user's. Named as plain data; loaded where it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunery.models.load import source_of
from tunery.spec import Pretrained, PythonReward

RewardOrigin = dict[str, Any]
"""models.load.Source, or {"python": path, "function": name}: fits into JSON."""


def reward_origin(reward: str | Pretrained | PythonReward, artifacts: dict[str, Path], folder: Path) -> RewardOrigin:
    """Where a stage's reward comes from; `artifacts` by stage name, `folder` where relative paths start."""
    if isinstance(reward, PythonReward):
        return {"python": str((folder / reward.python).resolve()), "function": reward.function}
    return source_of(reward, artifacts, folder)
