"""Reward functions: a reward model or a user's Python function, described by plain data and loaded in the workers."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import TuneryError
from tunery.models.load import load_classifier, load_original_tokenizer, source_of
from tunery.models.model_folder import BadModel
from tunery.spec import Pretrained, PythonReward
from tunery.store.rows import Row

if TYPE_CHECKING:
    import torch

RewardOrigin = dict[str, Any]
"""Where a reward is loaded from: models.load.Source of a reward model, or {"python": path, "function": name};
JSON-serializable."""
RewardFn = Callable[[Sequence[Row], Sequence[str]], list[float]]
"""Function of prompts (rows that end with a user message) and one response to each; returns the rewards."""
NO_LIMIT = 1 << 20
"""`max_length` of a reward model that gets the complete conversation, up to its maximum position."""


def reward_origin(reward: str | Pretrained | PythonReward, artifacts: dict[str, Path], folder: Path) -> RewardOrigin:
    """Return the origin of a stage's reward. `artifacts`: by stage name; `folder`: base of relative paths."""
    if isinstance(reward, PythonReward):
        return {"python": str((folder / reward.python).resolve()), "function": reward.function}
    return source_of(reward, artifacts, folder)


def load_reward(origin: RewardOrigin, dtype: torch.dtype, device: torch.device, max_length: int) -> RewardFn:
    """Load a reward function. Raises TuneryError if it can't be loaded, or if the model has more than one output. The
    function raises TuneryError for invalid rewards.

    dtype, device, max_length: of a reward model.
    """
    if "python" in origin:
        return _PythonReward(Path(origin["python"]), origin["function"])
    from tunery.models.classify import SequenceClassifier

    name = str(origin.get("pretrained", origin.get("artifact")))
    model, labels = load_classifier(origin, dtype)
    try:
        labels.check_single(name)
    except BadModel as error:
        raise TuneryError(error.message, cause=error.cause, remedy=error.remedy) from None
    classifier = SequenceClassifier(model.to(device).eval(), load_original_tokenizer(origin), max_length)

    def reward_fn(prompts: Sequence[Row], responses: Sequence[str]) -> list[float]:
        rows = [
            {**prompt, "messages": [*prompt["messages"], {"role": "assistant", "content": response}]}
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        outputs = classifier(rows).logits[:, 0]
        rewards: list[float] = (labels.reward_norm(outputs) if labels.reward_norm else outputs).tolist()
        for response, reward in zip(responses, rewards, strict=True):
            if not math.isfinite(reward):
                raise TuneryError(
                    f"the reward model `{name}` gave {reward} for the response {response[:60]!r}",
                    cause="a reward is a finite number",
                    remedy="try it on rows with the scorer `reward`; a model in bf16 may need `precision: fp32`",
                )
        return rewards

    return reward_fn


class _PythonReward:
    """A user's function, called with texts: the last message of each prompt, and the response."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        spec = importlib.util.spec_from_file_location(f"tunery_reward_{path.stem}", path)
        assert spec is not None, "it ends in .py, which was checked"
        assert spec.loader is not None, "it is a file"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses in the module need it
        try:
            spec.loader.exec_module(module)
            self._function = getattr(module, name)
        except Exception as error:  # anything that the user's file raises
            raise self._failed("can't be loaded", error) from error

    def __call__(self, prompts: Sequence[Row], responses: Sequence[str]) -> list[float]:
        prompt_texts = [prompt["messages"][-1]["content"] or "" for prompt in prompts]
        try:
            result = self._function(prompt_texts, list(responses))
        except Exception as error:
            raise self._failed("failed", error) from error
        if isinstance(result, str | dict) or not hasattr(result, "__len__"):
            raise self._error(
                f"gave a {type(result).__name__}", "it must return a list with a number for each response"
            )
        rewards = list(result)
        if len(rewards) != len(responses):
            raise self._error(
                f"gave {len(rewards)} rewards for {len(responses)} responses",
                "it must return a number for each, in order",
            )
        for response, value in zip(responses, rewards, strict=True):
            try:
                number = math.nan if value is None or isinstance(value, str) else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise self._error(f"gave {value!r} for the response {response[:60]!r}", "a reward is a finite number")
        return [float(value) for value in rewards]

    def _failed(self, problem: str, error: Exception) -> TuneryError:
        """Return the error for an exception of the user's code, with its line."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self._path)]
        return self._error(problem, f"{type(error).__name__}: {error}" + (f", at line {lines[-1]}" if lines else ""))

    def _error(self, problem: str, cause: str) -> TuneryError:
        message = f"the reward `{self._name}` of {self._path.name} {problem}"
        return TuneryError(message, cause=cause, remedy="correct it")
