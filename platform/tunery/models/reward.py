"""What rates answers: a reward model, or a function of the user's. Named as plain data; loaded where it is asked."""

from __future__ import annotations

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import TuneryError
from tunery.models.check import BadModel
from tunery.models.load import load_classifier, load_own_tokenizer, source_of
from tunery.spec import Pretrained, PythonReward
from tunery.store.rows import Row

if TYPE_CHECKING:
    import torch

RewardOrigin = dict[str, Any]
"""models.load.Source, or {"python": path, "function": name}: fits into JSON."""
Reward = Callable[[Sequence[Row], Sequence[str]], list[float]]
"""From rows that hold a prompt (`messages`; and `tools`, where there are some) and an answer to each to a number each.
Raises TuneryError where it has none."""
UNLIMITED = 10**9


def reward_origin(reward: str | Pretrained | PythonReward, artifacts: dict[str, Path], folder: Path) -> RewardOrigin:
    """Where a stage's reward comes from; `artifacts` by stage name, `folder` where relative paths start."""
    if isinstance(reward, PythonReward):
        return {"python": str((folder / reward.python).resolve()), "function": reward.function}
    return source_of(reward, artifacts, folder)


def load_reward(origin: RewardOrigin, dtype: torch.dtype, device: str) -> Reward:
    """Ready to be asked. `dtype` and `device` are those of a model. Under ZeRO-3 it is loaded before the training's
    arguments are made: after that every model comes in pieces.

    Raises TuneryError when it can't be loaded, or is a model that gives more than one number.
    """
    if "python" in origin:
        return FunctionReward(Path(origin["python"]), origin["function"])
    return ModelReward(origin, dtype, device)


class ModelReward:
    """The one output of a sequence-classification model for a whole conversation, as its own tokenizer and chat
    template have it, cut to what it has positions for: so it may know other tokens than the policy. That of a `reward`
    stage is on the scale that the stage measured, (output - mean) / deviation."""

    def __init__(self, source: RewardOrigin, dtype: torch.dtype, device: str) -> None:
        from tunery.models.classify import SequenceClassifier

        model, labels = load_classifier(source, dtype)
        self._name = source.get("pretrained") or Path(source["artifact"]).name
        try:
            labels.check_single(self._name)
        except BadModel as error:
            raise TuneryError(error.message, cause=error.cause, remedy=error.remedy) from None
        scale: Any = getattr(labels, "scale", None)
        self._mean: float
        self._deviation: float
        self._mean, self._deviation = (scale.mean, scale.deviation) if scale is not None else (0.0, 1.0)
        self._ask = SequenceClassifier(model.to(device).eval(), load_own_tokenizer(source), UNLIMITED)

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        whole = [answered(row, answer) for row, answer in zip(rows, answers, strict=True)]
        given = [(float(output) - self._mean) / self._deviation for output in self._ask(whole).logits[:, 0]]
        for row, answer, reward in zip(rows, answers, given, strict=True):
            if not math.isfinite(reward):
                raise TuneryError(
                    f"the reward model `{self._name}` gives {reward} for the answer {_excerpt(answer)}",
                    cause=f"to {_excerpt(prompt_text(row))}",
                    remedy="try it on rows with the scorer `reward`; a model in bf16 may need `precision: fp32`",
                )
        return given


class FunctionReward:
    """A function of the user's, from a file that is run once: `reward(prompts, answers)` gets two lists of texts and
    returns a list of as many numbers."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        spec = importlib.util.spec_from_file_location(f"tunery_reward_{path.stem}", path)
        assert spec is not None, "a .py file, as checked before the run"
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
            self._function = getattr(module, name)
        except Exception as error:
            raise self._bad("can't be loaded", error, "run the file by itself: `python FILE`") from error

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        prompts = [prompt_text(row) for row in rows]
        try:
            given = self._function(prompts, list(answers))
        except Exception as error:
            raise self._bad("raised an error", error, f"it was given {len(prompts)} prompts and answers") from error
        if not hasattr(given, "__len__") or isinstance(given, str | dict) or len(given) != len(answers):
            found = f"{len(given)} values" if isinstance(given, list | tuple) else f"a {type(given).__name__}"
            cause = f"it was given {len(answers)} answers"
            raise self._wrong(f"returned {found}", cause, "return a list with a number for each answer")
        numbers = [_number(value) for value in given]
        for answer, value, number in zip(answers, given, numbers, strict=True):
            if number is None or not math.isfinite(number):
                remedy = "return a finite number for every answer, also for an empty one"
                raise self._wrong(f"returned {value!r}", f"for the answer {_excerpt(answer)}", remedy)
        return [number for number in numbers if number is not None]

    def _bad(self, what: str, error: Exception, remedy: str) -> TuneryError:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self._path)
        ]
        where = f", at line {lines[-1]}" if lines else ""
        return self._wrong(what, f"{type(error).__name__}: {error}{where}", remedy)

    def _wrong(self, what: str, cause: str, remedy: str) -> TuneryError:
        return TuneryError(f"the reward `{self._name}` of {self._path} {what}", cause=cause, remedy=remedy)


def answered(row: Row, answer: str) -> Row:
    """A prompt's row as the conversation that ends with that answer."""
    turn = {"role": "assistant", "content": answer, "tool_calls": None}
    return {**row, "messages": [*row["messages"], turn]}


def prompt_text(row: Row) -> str:
    """What a reward function is told of a prompt: its turns, joined by blank lines."""
    return "\n\n".join(turn["content"] or "" for turn in row["messages"])


def _number(value: object) -> float | None:
    """Of Python, NumPy (a scalar) or PyTorch (a tensor of one); None for what is none."""
    if not isinstance(value, Real) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) else None


def _excerpt(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")
