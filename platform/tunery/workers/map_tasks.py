"""Run tasks in this process, or on Ray Data actors that need no model and no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunery.errors import TuneryError

Task = dict[str, Any]


def map_in_process(actor: type, arguments: tuple[Any, ...], tasks: Sequence[Task]) -> Iterator[Task]:
    """Construct `actor(*arguments)`, call it with a batch {column: [value]} per task, and yield the results."""
    local_actor = actor(*arguments)
    for task in tasks:
        results = local_actor({key: [value] for key, value in task.items()})
        yield {key: values[0] for key, values in results.items()}


def map_on_cpus(
    actor: type, arguments: tuple[Any, ...], tasks: Sequence[Task], num_actors: int, num_cpus: int = 1
) -> Iterator[Task]:
    """Like map_in_process, on actors of Ray Data that reserve `num_cpus` each, in order of completion.

    A TuneryError raised in an actor is raised here unchanged.
    """
    import ray.data
    import ray.exceptions

    # By default Ray Data (2.60, planner/plan_udf_map_op.py) raises a UserCodeException from the actor's exception,
    # which is then lost, since pickling drops __cause__.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    dataset = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(tasks))),
        num_cpus=num_cpus,
    )
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TuneryError):
            raise error.cause from error
        raise
