"""The search: any field of any stage is a dimension, by its path (`sft.learning_rate`)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunery.spec.reference import Spec

Pair = Annotated[tuple[float, float], Field()]


class Dimension(Spec):
    """Exactly one of these. Ranges include their lower end; values outside a field's own bounds are refused."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: Pair | None = None
    loguniform: Pair | None = None
    randint: tuple[int, int] | None = None
    """Whole numbers, the upper end left out."""

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of `choice`, `uniform`, `loguniform`, `randint`")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the range {list(bounds)} is upside down or empty: the lower end comes first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform starts at {self.loguniform[0]:g}, but a logarithm needs more than 0")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """The values to check before the first trial: all choices, or a range's ends."""
        if self.choice is not None:
            return self.choice
        if self.randint is not None:
            return (self.randint[0], self.randint[1] - 1)
        low, high = self.uniform or self.loguniform or (math.nan, math.nan)
        return (low, high)

    def describe(self) -> str:
        for name in type(self).model_fields:
            if (value := getattr(self, name)) is not None:
                return f"{name} {list(value)}"
        raise AssertionError("a dimension has exactly one kind")


class Search(Spec):
    """Trials of the experiment with other values; what they share is made once."""

    metric: str
    """`<training stage>.eval_loss` or another of what its kind measures (`.eval_accuracy`, `.eval_auc`, `.eval_margin`,
    `.eval_reward`, `.eval_kl`); `<evaluate stage>.<model>.<set>.loss` (or `.perplexity`, `.forgetting`); or
    `<win rate stage>.<model>.<data stage>.win_rate` (or `.reward`)."""
    mode: Literal["min", "max"]
    trials: Annotated[int, Field(ge=1)]
    algorithm: Literal["random", "grid"] = "random"
    """grid: every combination once (only `choice` dimensions), at most `trials` of them."""
    scheduler: Literal["none", "asha"] = "none"
    """asha: stops the worse trials early (Li et al. 2018, https://arxiv.org/abs/1810.05934), by rows seen."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
