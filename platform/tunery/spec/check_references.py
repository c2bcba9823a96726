"""Validate references between stages: the stage exists, its output type is accepted, and it computes the scores that
the reading stage uses."""

from __future__ import annotations

from collections.abc import Iterable

from tunery.errors import SpecError
from tunery.spec import graph
from tunery.spec.error_messages import error_at, nearest
from tunery.spec.experiment import Experiment
from tunery.spec.references import ROWS
from tunery.spec.stages import RANDOM, Review, Score, Select
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource

MAX_NAME_LENGTH = 64
"""As for the name of an experiment."""
_PRETRAINED_HINT = "none; use {pretrained: <folder or hub name>}"


def check_references(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Yield errors for invalid stage names, invalid references to stages, and cycles."""
    stages = experiment.stages
    for name, stage in stages.items():
        path: KeyPath = ("stages", name)
        if not name.replace("_", "").isalnum() or not name[0].isalpha():
            yield error_at(
                source,
                path,
                f"`{name}` is not a valid stage name",
                remedy="use letters, digits and _, starting with a letter",
            )
        if len(name) > MAX_NAME_LENGTH:
            yield error_at(
                source,
                path,
                f"the stage name `{name[:20]}...` is too long",
                cause=f"it has {len(name)} characters, and files and W&B metrics are named after it",
                remedy=f"use at most {MAX_NAME_LENGTH} characters",
            )
        for item in stage.inputs():
            at = (*path, *item.path)
            field = ".".join(map(str, (name, *item.path)))
            if item.stage not in stages:
                yield error_at(
                    source,
                    at,
                    f"`{field}` refers to the stage `{item.stage}`, which does not exist",
                    remedy=nearest(item.stage, (other for other in stages if other != name)),
                )
            elif stages[item.stage].output_type not in item.accepts:
                candidates = [
                    other for other, stage in stages.items() if stage.output_type in item.accepts and other != name
                ]
                # Models may be pretrained; rows are always the output of a stage.
                alternative = "none; add one" if set(item.accepts) & set(ROWS) else _PRETRAINED_HINT
                yield error_at(
                    source,
                    at,
                    f"`{field}` needs {_type_names(item.accepts)}, but `{item.stage}` is a "
                    f"{stages[item.stage].kind} stage",
                    cause=f"a {stages[item.stage].kind} stage outputs {_type_names((stages[item.stage].output_type,))}",
                    remedy=f"matching stages: {', '.join(candidates) or alternative}",
                )
    if cycle := graph.find_cycle(stages):
        yield error_at(
            source,
            ("stages", cycle[0]),
            f"the stages form a cycle: {' -> '.join(cycle)}",
            cause="each of them depends on the next",
            remedy="let one of them use an earlier stage",
        )


def _type_names(output_types: tuple[str, ...]) -> str:
    names = {
        "rows": "rows",
        "scored": "scored rows",
        "selected": "selected rows",
        "model": "a model",
        "classifier": "a reward model or classifier",
        "metrics": "metrics",
    }
    # Every input that accepts rows accepts selected rows too, so the message omits them.
    distinct = [name for name in output_types if name != "selected" or "rows" not in output_types]
    return " or ".join(names[name] for name in distinct)


def check_scores(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Yield errors for scores and vectors that a select stage uses but its data does not have, and for reviews of a
    select stage without a threshold."""
    for name, stage in experiment.stages.items():
        if isinstance(stage, Review):
            selection = experiment.stages[stage.data]
            if isinstance(selection, Select) and not selection.keep:
                yield error_at(
                    source,
                    ("stages", name, "data"),
                    f"`{name}` reviews rows near a threshold, but `{stage.data}` has none",
                    cause="it selects rows by diversity or quota only",
                    remedy="use a select stage with a rule in `keep`",
                )
        if isinstance(stage, Select):
            yield from _check_scores_of(name, stage, experiment, source)


def _check_scores_of(name: str, stage: Select, experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Check that the data of a select stage has every score and every vector that the stage uses."""
    scored = experiment.stages[stage.data]
    scorers = scored.by if isinstance(scored, Score) else ()
    scores = [scorer.score for scorer in scorers if not scorer.returns_embeddings]
    vectors = [scorer.score for scorer in scorers if scorer.returns_embeddings]
    used: list[tuple[KeyPath, str]] = [(("keep", score), score) for score in stage.keep]
    if stage.quota is not None and stage.quota.sort_by is not None:
        used.append((("quota", "sort_by"), stage.quota.sort_by))
    if stage.diverse is not None and stage.diverse.score is not None:
        used.append((("diverse", "score"), stage.diverse.score))
    for path, score in used:
        at = ("stages", name, *path)
        if score in vectors:
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses `{score}`, which is not a score",
                cause=f"without `reference` an embedding stores vectors, which are used by `{name}.diverse.embedding`",
                remedy=f"set its `reference` in `{stage.data}`, or use another score: {', '.join([*scores, RANDOM])}",
            )
        elif score not in (*scores, RANDOM):
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses the score `{score}`, which `{stage.data}` does not compute",
                cause="" if scores else f"`{stage.data}` is a {scored.kind} stage, which computes no scores",
                remedy=nearest(score, [*scores, RANDOM]),
            )
    if stage.diverse is not None and stage.diverse.embedding not in vectors:
        embedding = stage.diverse.embedding
        cause = (
            f"it is a {scored.kind} stage" if not scorers else "only an embedding without `reference` stores vectors"
        )
        yield error_at(
            source,
            ("stages", name, "diverse", "embedding"),
            f"`{name}.diverse` uses the vectors of `{embedding}`, which `{stage.data}` does not store",
            cause=cause,
            remedy=nearest(embedding, vectors)
            if vectors
            else "add an embedding to a score stage: `by: [{embedding: <model>}]`",
        )
