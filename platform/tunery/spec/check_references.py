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

_FROM_OUTSIDE = "none; write {pretrained: <folder or hub name>}"


def check_references(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Yield errors for invalid stage names, invalid references to stages, and cycles."""
    stages = experiment.stages
    for name, stage in stages.items():
        path: KeyPath = ("stages", name)
        if not name.replace("_", "").isalnum() or not name[0].isalpha():
            yield error_at(
                source, path, f"`{name}` is no stage's name", remedy="use letters, digits and _, with a letter first"
            )
        for item in stage.inputs():
            at = (*path, *item.path)
            field = ".".join(map(str, (name, *item.path)))
            if item.stage not in stages:
                yield error_at(
                    source,
                    at,
                    f"`{field}` refers to stage `{item.stage}`, which isn't there",
                    remedy=nearest(item.stage, (other for other in stages if other != name)),
                )
            elif stages[item.stage].gives not in item.wants:
                fitting = [other for other, stage in stages.items() if stage.gives in item.wants and other != name]
                # A model may come from outside the experiment, rows come from a stage.
                otherwise = "none; add one" if set(item.wants) & set(ROWS) else _FROM_OUTSIDE
                yield error_at(
                    source,
                    at,
                    f"`{field}` needs {_wanted(item.wants)}, but `{item.stage}` is a {stages[item.stage].kind} stage",
                    cause=f"a {stages[item.stage].kind} stage gives {_wanted((stages[item.stage].gives,))}",
                    remedy=f"stages that fit: {', '.join(fitting) or otherwise}",
                )
    if cycle := graph.find_cycle(stages):
        yield error_at(
            source,
            ("stages", cycle[0]),
            f"the stages form a cycle: {' -> '.join(cycle)}",
            cause="each of them waits for the next",
            remedy="let one of them read an earlier stage",
        )


def _wanted(gives: tuple[str, ...]) -> str:
    words = {
        "rows": "rows",
        "scored": "scored rows",
        "selected": "selected rows",
        "model": "a model",
        "classifier": "a reward model or classifier",
        "metrics": "metrics",
    }
    # Every input that accepts rows accepts selected rows too, so the message omits them.
    return " or ".join(words[give] for give in gives if give != "selected" or "rows" not in gives)


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
                    f"`{name}` asks about rows near a cut, and `{stage.data}` has none",
                    cause="it keeps rows by how alike they are, or so many of each source",
                    remedy="name a select stage with a rule in `keep`",
                )
        if isinstance(stage, Select):
            yield from _check_scores_of(name, stage, experiment, source)


def _check_scores_of(name: str, stage: Select, experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Check that the data of a select stage has every score and every vector that the stage uses."""
    scored = experiment.stages[stage.data]
    scorers = scored.by if isinstance(scored, Score) else ()
    made = [scorer.score for scorer in scorers if not scorer.gives_vectors]
    vectors = [scorer.score for scorer in scorers if scorer.gives_vectors]
    used: list[tuple[KeyPath, str]] = [(("keep", score), score) for score in stage.keep]
    if stage.quota is not None and stage.quota.by is not None:
        used.append((("quota", "by"), stage.quota.by))
    if stage.diverse is not None and stage.diverse.score is not None:
        used.append((("diverse", "score"), stage.diverse.score))
    for path, score in used:
        at = ("stages", name, *path)
        if score in vectors:
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses the score `{score}`, which is none",
                cause=f"without `reference` an embedding gives each row a vector, for `{name}.diverse.by`",
                remedy=f"give it `reference` in `{stage.data}`, or name another: {', '.join([*made, RANDOM])}",
            )
        elif score not in (*made, RANDOM):
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses the score `{score}`, which `{stage.data}` does not make",
                cause="" if made else f"`{stage.data}` is a {scored.kind} stage, which makes no scores",
                remedy=nearest(score, [*made, RANDOM]),
            )
    if stage.diverse is not None and stage.diverse.by not in vectors:
        by = stage.diverse.by
        cause = f"it is a {scored.kind} stage" if not scorers else "only an embedding without `reference` keeps some"
        yield error_at(
            source,
            ("stages", name, "diverse", "by"),
            f"`{name}.diverse` compares rows by `{by}`, of which `{stage.data}` keeps no vectors",
            cause=cause,
            remedy=nearest(by, vectors) if vectors else "let a score stage keep them: `by: [{embedding: <model>}]`",
        )
