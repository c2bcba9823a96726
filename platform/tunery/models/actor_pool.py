"""A pool of actors that hold models, on Ray Data: units of work in, results out, in whatever order they are ready."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunery.errors import TuneryError
from tunery.spec import Compute

Task = dict[str, Any]


def map_tasks(
    actor: type,
    arguments: tuple[Any, ...],
    units: list[Task],
    compute: Compute,
    in_process: bool,
    on_cpu: bool = False,
) -> Iterator[Task]:
    """`actor(*arguments)` is made once a worker, then called with batches {column: [value]} of one unit each. Work
    that needs no model is done `on_cpu`: by one actor a CPU that is free in the cluster, and no GPU is asked for.

    `in_process` does the same without Ray, for a trial: it has its CPU or GPU already, and would wait for ever for
    actors that need another one.

    A TuneryError of an actor's call is raised here as it was there.
    """
    if in_process:
        mine = actor(*arguments)
        for unit in units:
            yield {key: values[0] for key, values in mine({key: [value] for key, value in unit.items()}).items()}
        return
    import ray.data
    import ray.exceptions

    assert compute.workers != "auto", "resolved by the runner"
    # Else Ray Data (2.60, planner/plan_udf_map_op.py) raises a UserCodeException from what the actor raised, and the
    # latter gets lost on the way: pickling an exception leaves out its __cause__.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    # Not more than are free: other trials hold theirs for as long as they train.
    free = int(ray.available_resources().get("CPU", 0)) if on_cpu else 0
    workers = max(free, compute.workers)
    dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
        num_cpus=1 if on_cpu else compute.cpus_per_worker,
        num_gpus=1 if compute.device == "gpu" and not on_cpu else 0,
    )
    try:
        yield from dataset.iter_rows()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TuneryError):
            raise error.cause from error
        raise


def score_dtype(compute: Compute) -> Any:
    """torch's dtype for scoring and evaluating: as in training, bf16 where the GPU has it, unless fp32 is asked for."""
    import torch

    bf16 = compute.device == "gpu" and compute.precision != "fp32" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32
