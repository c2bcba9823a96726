"""Run tasks in this process, or, if they need neither a model nor a GPU, on Ray Data actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunery.errors import TuneryError

Task = dict[str, Any]
"""Columns of a task, or of its result."""


def map_in_process(callable_class: type, constructor_args: tuple[Any, ...], tasks: Sequence[Task]) -> Iterator[Task]:
    """Construct `callable_class(*constructor_args)`, call it with a batch {column: [value]} per task, and yield the
    results in order."""
    function = callable_class(*constructor_args)
    for task in tasks:
        results = function({column: [value] for column, value in task.items()})
        yield {column: values[0] for column, values in results.items()}


MAX_ACTOR_RESTARTS = 100
"""How often an actor restarts in all, whatever killed it. The preemption of a node does not count."""


def map_on_cpus(
    callable_class: type,
    constructor_args: tuple[Any, ...],
    tasks: Sequence[Task],
    num_actors: int,
    max_crashes: int,
    num_cpus: int = 1,
) -> Iterator[Task]:
    """The same on at most `num_actors` Ray Data actors that reserve `num_cpus` CPUs each, in order of completion.

    A task whose actor died is repeated up to `max_crashes` times. A TuneryError that an actor raises is raised here
    unchanged.
    """
    import ray.data
    import ray.exceptions

    # By default Ray Data (2.60, planner/plan_udf_map_op.py) raises a UserCodeException from the actor's exception,
    # which is then lost, since pickling drops __cause__.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    dataset = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map_batches(
        callable_class,
        fn_constructor_args=constructor_args,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(tasks))),
        num_cpus=num_cpus,
        # Ray Data (2.60, operators/actor_pool_map_operator.py) repeats a task for ever by default.
        max_restarts=MAX_ACTOR_RESTARTS,
        max_task_retries=max_crashes,
    )
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TuneryError):
            raise error.cause from error
        raise
