"""The base class of the stages: what the rest of the code asks of a stage, whatever its kind.

A subclass is the config of one kind. What all stages of a kind share, such as its version, is in its entry of
`STAGE_KINDS` (spec/stage_kinds.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Self

from tunery.spec.references import Config, ModelRef, OutputType, Pretrained, StageRef


class StageConfig(Config):
    """A stage of an experiment."""

    output_type: ClassVar[OutputType]
    """Output of the stage."""
    kind: str

    def inputs(self) -> Iterator[StageRef]:
        """Yield the references to other stages."""
        raise NotImplementedError

    def model_refs(self) -> Iterator[ModelRef]:
        """Yield the references to models and Python functions."""
        return iter(())

    def eval_refs(self) -> Iterator[StageRef]:
        """Yield the references to rows that metrics are computed on."""
        return iter(())

    @property
    def evaluated_models(self) -> tuple[str | Pretrained, ...]:
        """The models that the stage evaluates on each of its `eval_refs`."""
        return ()

    @property
    def uses_seed(self) -> bool:
        """Whether the result depends on a seed."""
        return False

    @property
    def result_names(self) -> list[str]:
        """Names of models and stages that are part of the results, and so of the cache key."""
        return []

    def metric_paths(self, metrics: Iterable[str]) -> Iterator[str]:
        """Yield the paths within the stage under which it logs the `metrics` of its kind."""
        return iter(())

    def reduced_to(self, metrics: Sequence[Sequence[str]]) -> Self:
        """Return the stage without what is not needed for these metrics, given by the parts of their paths."""
        return self

    def estimate_rows(self, rows: int) -> int:
        """Estimate the number of rows that are output for this number of rows in `data`."""
        return rows
