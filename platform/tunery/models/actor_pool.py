"""Run tasks on a pool of Ray Data actors that hold models; results are returned in order of completion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunery.errors import TuneryError
from tunery.spec import Compute

Task = dict[str, Any]


def map_tasks(
    actor: type,
    arguments: tuple[Any, ...],
    tasks: list[Task],
    compute: Compute,
    in_process: bool,
    on_cpu: bool = False,
) -> Iterator[Task]:
    """Construct `actor(*arguments)` once per worker, call it with a batch {column: [value]} per task, yield results.

    `on_cpu`: for work without a model; uses one actor per free CPU of the cluster, and no GPUs. `in_process`: run
    without Ray, for a trial that holds its CPU or GPU already and would wait forever for actors that need another one.
    A TuneryError raised in an actor is raised here unchanged.
    """
    if in_process:
        local_actor = actor(*arguments)
        for task in tasks:
            yield {key: values[0] for key, values in local_actor({key: [value] for key, value in task.items()}).items()}
        return
    import ray.data
    import ray.exceptions

    assert compute.workers != "auto", "resolved by the runner"
    # By default Ray Data (2.60, planner/plan_udf_map_op.py) raises a UserCodeException from the actor's exception,
    # which is then lost, since pickling drops __cause__.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    # Only free CPUs: other trials hold theirs for their whole training.
    free = int(ray.available_resources().get("CPU", 0)) if on_cpu else 0
    workers = max(free, compute.workers)
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
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
    """Return the torch dtype for scoring and evaluation: bf16 if the GPU supports it, unless `precision` is fp32."""
    import torch

    bf16 = compute.device == "gpu" and compute.precision != "fp32" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32
