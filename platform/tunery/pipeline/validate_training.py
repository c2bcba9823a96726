"""What can be checked of trainings before a run: that the rows they are given are of a shape that they can learn from,
and that whatever rates answers gives one number."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import SpecError
from tunery.ingest.read import first_shape, source_label
from tunery.ingest.sources import BUILTIN, BadSource, sources_of
from tunery.models.labels import REWARD, Labels, labels_of_folder
from tunery.models.model_folder import BadModel
from tunery.pipeline.cache_keys import model_folder
from tunery.spec import LABELS, ClassifierTraining, Dataset, Experiment, Pretrained, PythonReward, RewardTraining
from tunery.spec.error_messages import error_at
from tunery.spec.graph import lineage
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import YamlSource


@dataclass(frozen=True)
class Need:
    shapes: tuple[str, ...]
    what: str
    cause: str
    remedy: str


_PAIRS = Need(
    ("preference",),
    "preference pairs",
    "it learns from an answer that is preferred to another",
    "give rows with `chosen` and `rejected` (docs/data.md)",
)
_PROMPTS = Need(
    ("prompt", "conversation", "preference", "rated"),
    "prompts",
    "a text holds no question to be answered",
    "use rows with questions; their answers are not looked at",
)
NEEDS = {
    "sft": Need(
        ("conversation", "preference", "rated"),
        "conversations with answers",
        "sft counts the loss of answers only",
        "use rows with question and answer, or train on texts with `kind: pretrain`",
    ),
    "reward": _PAIRS,
    "dpo": _PAIRS,
    "kto": Need(
        ("rated", "preference"),
        "rated answers",
        "it learns from answers that are known to be wanted or unwanted",
        "give rows with a `label`, or preference pairs (docs/data.md)",
    ),
    "grpo": _PROMPTS,
    "rloo": _PROMPTS,
    "ppo": _PROMPTS,
    "win_rate": _PROMPTS,
}
"""By stage kind; one that is not here takes rows of any shape."""


def check_shapes(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """By the first row at the root of the stage's data."""
    need = NEEDS.get(stage.kind)
    for field in ("data", "eval_data"):
        data = getattr(stage, field, None)
        if need is None or not isinstance(data, str | dict):
            continue
        for path, rows in data_refs(data).items():
            root = root_of(experiment, rows)
            try:
                shape = first_shape(root, folder)
            except BadSource:  # told at the dataset
                continue
            if shape not in need.shapes:
                what = f"subset `{root.subset}`" if BUILTIN in sources_of(root) else f"`{source_label(root)}`"
                yield error_at(
                    source,
                    ("stages", name, field, *path),
                    f"`{'.'.join((name, field, *path))}` needs {need.what}, but {what} holds {_PLURALS[shape]}",
                    cause=need.cause,
                    remedy=need.remedy,
                )


_PLURALS = {
    "text": "texts",
    "prompt": "prompts",
    "conversation": "conversations",
    "preference": "preference pairs",
    "rated": "rated answers",
}


def root_of(experiment: Experiment, name: str) -> Dataset:
    """The dataset that a stage's rows come from."""
    stage = experiment.stages[lineage(experiment.stages, name)[-1]]
    assert isinstance(stage, Dataset), "checked by spec.load: only these give rows"
    return stage


def validate_rewards(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """`reward` of a training, `judge` of a comparison."""
    for field in ("reward", "judge"):
        reward = getattr(stage, field, None)
        try:
            if isinstance(reward, PythonReward):
                _check_function(reward, folder)
            elif reward is not None and (labels := known_labels(reward, experiment, folder)) is not None:
                labels.check_single(reward if isinstance(reward, str) else reward.pretrained)
        except BadModel as error:
            at = ("stages", name, field)
            yield error_at(source, at, f"`{name}.{field}`: {error.message}", cause=error.cause, remedy=error.remedy)


def known_labels(model: str | Pretrained, experiment: Experiment, folder: Path) -> Labels | None:
    """What a stage's or a folder's classifier tells apart; None of one on the hub, which is looked at when it is
    loaded. Raises BadModel for a folder without a classification head."""
    if isinstance(model, Pretrained):
        return labels_of_folder(model_folder(model, folder)) if model.is_folder else None
    stage = experiment.stages[model]
    if isinstance(stage, ClassifierTraining):
        return Labels(LABELS, False, None if stage.eval_data is None else 1.0)
    return Labels(REWARD, True) if isinstance(stage, RewardTraining) else None


def _check_function(reward: PythonReward, folder: Path) -> None:
    """Raises BadModel where the file has no such function. It is read, not run."""
    path = folder / reward.python
    signature = f"def {reward.function}(prompts: list[str], answers: list[str]) -> list[float]"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadModel(
            f"`{reward.python}` can't be read", str(error), "paths start at the experiment's folder"
        ) from None
    except SyntaxError as error:
        raise BadModel(f"`{reward.python}` is no Python: line {error.lineno}", str(error.msg), "correct it") from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if reward.function not in names:
        raise BadModel(
            f"`{reward.python}` has no function `{reward.function}`",
            f"it has: {', '.join(names) or 'none'}",
            f"write `{signature}`, or name another as `function`",
        )
