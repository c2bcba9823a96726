"""Graph of the stages of an experiment: topological order, dependencies and cycles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tunery.spec.references import Pretrained, Scratch
from tunery.spec.stage_kinds import Stage
from tunery.spec.stages import Dataset

Root = Pretrained | Scratch


def inputs_of(stage: Stage) -> tuple[str, ...]:
    """Return the names of the stages that `stage` reads, in the order of its fields, without duplicates."""
    return tuple(dict.fromkeys(item.stage for item in stage.inputs()))


def order(stages: Mapping[str, Stage]) -> tuple[str, ...]:
    """Return the stages in topological order, otherwise in file order. The graph has no cycle (`find_cycle`)."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for dependency in inputs_of(stages[name]):
                visit(dependency)
            done[name] = None

    for name in stages:
        visit(name)
    return tuple(done)


def with_upstream(stages: Mapping[str, Stage], names: Iterable[str]) -> dict[str, Stage]:
    """Return the named stages and all stages that they depend on, in file order."""
    needed: set[str] = set()
    queue = list(names)
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            queue.extend(inputs_of(stages[name]))
    return {name: stage for name, stage in stages.items() if name in needed}


def lineage(stages: Mapping[str, Stage], name: str) -> tuple[str, ...]:
    """Return the stages that the rows of a stage come from: itself, its `data` stage, and so on to a dataset."""
    names = [name]
    while isinstance(data := getattr(stages[names[-1]], "data", None), str):
        names.append(data)
    return tuple(names)


def root_dataset(stages: Mapping[str, Stage], name: str) -> Dataset:
    """Return the dataset that the rows of a stage come from."""
    stage = stages[lineage(stages, name)[-1]]
    assert isinstance(stage, Dataset), "checked by spec.load: only these give rows"
    return stage


def model_chain(stages: Mapping[str, Stage], model: str | Root) -> Iterator[str | Root]:
    """Yield a model, the model that its training starts from, and so on to one that no stage trains."""
    while isinstance(model, str):
        yield model
        model = stages[model].model  # type: ignore[attr-defined]  # spec.load validates that the stage outputs a model
    yield model


def root_model(stages: Mapping[str, Stage], model: str | Root) -> Root:
    """Return the last model of the chain, which no stage trains."""
    *_, root = model_chain(stages, model)
    assert not isinstance(root, str)
    return root


def find_cycle(stages: Mapping[str, Stage]) -> tuple[str, ...] | None:
    """Return the names along a cycle (first == last), or None. References to unknown stages are ignored."""
    finished: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in trail:
            return (*trail[trail.index(name) :], name)
        if name in finished:
            return None
        for dependency in inputs_of(stages[name]):
            if dependency in stages and (cycle := walk(dependency, (*trail, name))):
                return cycle
        finished.add(name)
        return None

    for name in stages:
        if cycle := walk(name, ()):
            return cycle
    return None
