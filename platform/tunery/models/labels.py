"""What a sequence-classification model tells apart, from its config alone: known before anything runs, without torch.

The names and the meaning of `problem_type` are those of transformers' PretrainedConfig
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
MOST_SHOWN = 12
REWARD = ("reward",)
"""What a reward model that was trained here gives, by number."""


@dataclass(frozen=True)
class RewardNorm:
    """Of a reward model's outputs for answers: where they lie, and how far apart."""

    mean: float
    deviation: float

    def __call__(self, outputs: Any) -> Any:
        """(outputs - mean) / deviation: of a number, an array or a tensor."""
        return (outputs - self.mean) / self.deviation


@dataclass(frozen=True)
class Labels:
    names: tuple[str, ...]
    """In the order of the logits."""
    independent: bool
    """A row may have several of them or none: each has a probability of its own, where else all share one."""
    temperature: float | None = None
    """By which probabilities fit best on rows that it wasn't trained on; None where nobody looked."""
    scale: RewardNorm | None = None
    """Of a reward model that was trained here; None of any other."""

    def shown(self) -> str:
        more = f" and {len(self.names) - MOST_SHOWN} more" if len(self.names) > MOST_SHOWN else ""
        return ", ".join(f"`{name}`" for name in self.names[:MOST_SHOWN]) + more

    def index(self, label: str | int, model: str) -> int:
        """Of a label by its name or its number. Raises BadModel, which names the nearest."""
        if isinstance(label, int):
            if label < len(self.names):
                return label
            numbers = f"its {len(self.names)} labels have the numbers 0 to {len(self.names) - 1}"
            raise BadModel(f"`{model}` has no label {label}", numbers, f"labels: {self.shown()}")
        if label in self.names:
            return self.names.index(label)
        lower = {name.lower(): name for name in self.names}
        near = difflib.get_close_matches(label.lower(), lower, n=1)
        remedy = f"did you mean `{lower[near[0]]}`?" if near else "take one of them, by its name or its number"
        raise BadModel(f"`{model}` has no label `{label}`", f"its labels: {self.shown()}", remedy)

    def fitted_temperature(self, model: str) -> float:
        """Raises BadModel where nobody looked for one."""
        if self.temperature is None:
            raise BadModel(
                f"`{model}` has no temperature of its own",
                "it is found on the `eval_data` of a `classifier` stage",
                "name such a stage, or give a number",
            )
        return self.temperature

    def check_single(self, model: str) -> None:
        """Raises BadModel where there is more than the one score that a reward model gives."""
        if len(self.names) != 1:
            raise BadModel(
                f"`{model}` is no reward model: it has {len(self.names)} labels",
                f"a reward model gives one number a row; these are its labels: {self.shown()}",
                f"score by one of them, as {{classifier: ..., label: {self.names[-1]}}}",
            )


def labels_of(config: Mapping[str, Any], model: str) -> Labels:
    """From the content of config.json. Raises BadModel where that is of a model without a classification head."""
    architectures = [str(name) for name in config.get("architectures") or ()]
    if architectures and not any(name.endswith(HEAD) for name in architectures):
        raise BadModel(
            f"`{model}` has no classification head",
            f"its config.json says it is a {architectures[0]}",
            f"take a model whose architecture ends in {HEAD}; a language model scores by `perplexity` or `ifd`",
        )
    given = config.get("id2label")
    # transformers leaves two labels out of the file when they have no names: that is its default.
    numbered = {n: f"LABEL_{n}" for n in range(int(config.get("num_labels") or 2))}
    by_number = {int(key): str(name) for key, name in (given or numbered).items()}
    names = tuple(name for _, name in sorted(by_number.items()))
    return Labels(names, config.get("problem_type") == "multi_label_classification" or len(names) == 1)


def labels_of_folder(folder: Path) -> Labels:
    """Of a model folder. Raises BadModel when its config.json can't be read or knows no classification head."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise BadModel(f"the config.json of `{folder}` can't be read", cause, "save the model again") from None
    return labels_of(config, str(folder))
