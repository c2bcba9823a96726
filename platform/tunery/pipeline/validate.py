"""Validate an experiment without running it, beyond its text: files, columns, models, batches, store.

Does not start Ray and writes nothing. torch is imported only if config.json of a model is not sufficient
(models/meta_model.py): for a `target_modules` list, or a `max_length` beyond the positions in the config.
"""

from __future__ import annotations

from pathlib import Path

from tunery.errors import SpecError, SpecErrors
from tunery.pipeline.validate_models import position_notes
from tunery.pipeline.validate_space import validate_space, validate_warm_start
from tunery.pipeline.validate_stage import validate_batches, validate_stage
from tunery.review.decisions import decisions_path, read_decisions
from tunery.spec import Experiment, Review
from tunery.spec.yaml_source import YamlSource
from tunery.store import Store


def validate(experiment: Experiment, source: YamlSource, store: Store, workers: int, trial_workers: int) -> None:
    """Validate an experiment. Raises SpecErrors with file and line, or StoreError."""
    folder = Path(source.file).parent
    errors: list[SpecError] = []
    for name, stage in experiment.stages.items():
        errors += validate_stage(name, stage, experiment, source, folder)
        errors += validate_batches(name, stage, experiment, source, workers)
    if not errors:
        errors += validate_space(experiment, source, folder, trial_workers)
        errors += validate_warm_start(experiment, source, store)
    if errors:
        raise SpecErrors(errors)
    store.check_writable()


def notes(experiment: Experiment, source: YamlSource) -> list[str]:
    """Return notes about a valid experiment."""
    return [*pending_reviews(experiment, source), *position_notes(experiment, Path(source.file).parent)]


def pending_reviews(experiment: Experiment, source: YamlSource) -> list[str]:
    """Return a note for each review without decisions, at which a run will stop."""
    folder = Path(source.file).parent
    return [
        f"`{name}` needs decisions, and there are none in {stage.decisions} yet: `tunery run` builds "
        f"`{stage.data}` and stops there; then run `tunery review {source.file} {name}`"
        for name, stage in experiment.stages.items()
        if isinstance(stage, Review) and not read_decisions(decisions_path(stage, folder))
    ]
