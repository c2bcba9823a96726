"""The order of stages, and which of them a stage needs. Pure functions over a checked experiment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tunery.spec.references import Pretrained, Scratch
from tunery.spec.stages import Stage

Root = Pretrained | Scratch


def inputs_of(stage: Stage) -> tuple[str, ...]:
    """Names of the stages that `stage` reads, each once, in the order of its fields."""
    return tuple(dict.fromkeys(item.stage for item in stage.inputs()))


def order(stages: Mapping[str, Stage]) -> tuple[str, ...]:
    """Inputs before users, otherwise the order of the file. The graph has no cycle (see `find_cycle`)."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for needed in inputs_of(stages[name]):
                visit(needed)
            done[name] = None

    for name in stages:
        visit(name)
    return tuple(done)


def with_upstream(stages: Mapping[str, Stage], wanted: Iterable[str]) -> dict[str, Stage]:
    """`wanted` and everything that they need, in the order of the file."""
    needed: set[str] = set()
    queue = list(wanted)
    while queue:
        name = queue.pop()
        if name not in needed:
            needed.add(name)
            queue.extend(inputs_of(stages[name]))
    return {name: stage for name, stage in stages.items() if name in needed}


def lineage(stages: Mapping[str, Stage], name: str) -> tuple[str, ...]:
    """Where a stage's rows come from: its own name, that of the stage it reads as `data`, and so on to a dataset."""
    found = [name]
    while isinstance(data := getattr(stages[found[-1]], "data", None), str):
        found.append(data)
    return tuple(found)


def model_chain(stages: Mapping[str, Stage], model: str | Root) -> Iterator[str | Root]:
    """A model, the one that its training begins with, and so on to one that no stage trains."""
    while isinstance(model, str):
        yield model
        model = stages[model].model  # type: ignore[union-attr]  # spec.load checked that the stage gives a model
    yield model


def root_model(stages: Mapping[str, Stage], model: str | Root) -> Root:
    """The end of the chain."""
    *_, root = model_chain(stages, model)
    assert not isinstance(root, str)
    return root


def find_cycle(stages: Mapping[str, Stage]) -> tuple[str, ...] | None:
    """A cycle as the names along it (first == last), or None. References to unknown stages are left to others."""
    finished: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in trail:
            return (*trail[trail.index(name) :], name)
        if name in finished:
            return None
        for needed in inputs_of(stages[name]):
            if needed in stages and (cycle := walk(needed, (*trail, name))):
                return cycle
        finished.add(name)
        return None

    for name in stages:
        if cycle := walk(name, ()):
            return cycle
    return None
