"""The labels of a sequence-classification model, read from its config without torch, as validation requires.

`id2label` and `problem_type` are those of transformers' PretrainedConfig
(https://huggingface.co/docs/transformers/main_classes/configuration).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.models.model_folder import BadModel

HEAD = "ForSequenceClassification"
"""End of the names of architectures with a classification head."""
MAX_LISTED = 12
"""Maximum number of labels that a message lists."""


@dataclass(frozen=True)
class RewardNorm:
    """Mean and standard deviation of a reward model's outputs, to normalize its rewards."""

    mean: float
    std: float

    def __call__(self, outputs: Any) -> Any:
        """Return (outputs - mean) / std, for a number, an array or a tensor."""
        return (outputs - self.mean) / self.std


@dataclass(frozen=True)
class Labels:
    """The labels of a classification model, and how its logits become probabilities or rewards."""

    names: tuple[str, ...]
    """In the order of the logits."""
    independent: bool
    """Whether each label has its own probability (multi-label: sigmoid), instead of one distribution over all labels
    (softmax)."""
    temperature: float | None = None
    """Temperature fitted on held-out rows (calibration); None if not fitted."""
    reward_norm: RewardNorm | None = None
    """Normalization of a reward model trained by tunery; None for any other model."""

    def listed(self) -> str:
        """Return the first names, for a message."""
        more = f" and {len(self.names) - MAX_LISTED} more" if len(self.names) > MAX_LISTED else ""
        return ", ".join(f"`{name}`" for name in self.names[:MAX_LISTED]) + more

    def index(self, label: str | int, model: str) -> int:
        """Return the index of a label that is given by name or number. Raises BadModel, which suggests the closest
        name, if there is no such label. `model`: its name, for the message."""
        if isinstance(label, int):
            if label < len(self.names):
                return label
            numbers = f"its {len(self.names)} labels have the numbers 0 to {len(self.names) - 1}"
            raise BadModel(f"`{model}` has no label {label}", numbers, f"labels: {self.listed()}")
        if label in self.names:
            return self.names.index(label)
        lower = {name.lower(): name for name in self.names}
        matches = difflib.get_close_matches(label.lower(), lower, n=1)
        remedy = f"did you mean `{lower[matches[0]]}`?" if matches else "use one of them, by name or number"
        raise BadModel(f"`{model}` has no label `{label}`", f"its labels: {self.listed()}", remedy)

    def fitted_temperature(self, model: str) -> float:
        """Return the fitted temperature. Raises BadModel if there is none."""
        if self.temperature is None:
            raise BadModel(
                f"`{model}` has no fitted temperature",
                "a `classifier` stage fits it on its `eval_data`",
                "use such a stage, or set a number",
            )
        return self.temperature

    def check_single(self, model: str) -> None:
        """Raise BadModel unless there is exactly one label, as in a reward model."""
        if len(self.names) != 1:
            raise BadModel(
                f"`{model}` is not a reward model: it has {len(self.names)} labels",
                f"a reward model has a single output; its labels: {self.listed()}",
                f"score by one of them, as {{classifier: ..., label: {self.names[-1]}}}",
            )


def labels_of(config: Mapping[str, Any], model: str) -> Labels:
    """Read the labels from the content of config.json. Raises BadModel for a model without a classification head."""
    architectures = [str(name) for name in config.get("architectures") or ()]
    if architectures and not any(name.endswith(HEAD) for name in architectures):
        raise BadModel(
            f"`{model}` has no classification head",
            f"the architecture in its config.json is {architectures[0]}",
            f"use a model whose architecture ends in {HEAD}; a language model scores by `perplexity` or `ifd`",
        )
    id2label = config.get("id2label")
    # transformers omits two unnamed labels from the file, since they are its default.
    default = {index: f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2))}
    by_index = {int(index): str(name) for index, name in (id2label or default).items()}
    names = tuple(name for _, name in sorted(by_index.items()))
    return Labels(names, config.get("problem_type") == "multi_label_classification" or len(names) == 1)


def labels_of_folder(folder: Path) -> Labels:
    """Read the labels of a model folder. Raises BadModel if config.json is unreadable or has no classification head."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise BadModel(f"the config.json of `{folder}` can't be read", cause, "save the model again") from None
    return labels_of(config, str(folder))
