"""The loop of a worker: import the modules that jobs need, then run jobs and tasks until the queue is closed."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunery.errors import Stopped
from tunery.workers.job_queue import Pickled, Work
from tunery.workers.pickling import dump_error, dumps, loads
from tunery.workers.process_state import ProcessState, free_memory, prepare_process


@dataclass(frozen=True)
class WorkerConfig:
    """Arguments of a worker."""

    queue: Any
    """Handle of the JobQueue."""
    device: str
    """"cpu" or "gpu"."""
    threads: int
    """Number of torch's threads."""
    preload: Sequence[str]
    """Modules to import before the first job."""


def serve(train_loop_config: dict[str, WorkerConfig]) -> None:
    """Run jobs and tasks: the `train_loop_per_worker` of Ray Train, called once in each worker process.

    An error of a job is raised, which makes Ray Train restart all workers. An error of a task is passed to the run.
    """
    import ray
    import ray.train

    config = train_loop_config["worker"]
    prepare_process(config.device, config.threads)
    for module in config.preload:
        importlib.import_module(module)
    queue, rank = config.queue, ray.train.get_context().get_world_rank()
    state = ProcessState.capture()
    session = ray.get(queue.join.remote(rank, ray.get_runtime_context().get_node_id()))
    last_job = 0
    callable_class_number, function = 0, None  # the instance that runs tasks, and the number of its class

    def report(metrics: dict[str, float]) -> bool:
        return rank == 0 and bool(ray.get(queue.report.remote(rank, session, metrics)))

    while True:
        work: Work | None = ray.get(queue.next.remote(rank, session, last_job))
        if work is None:
            return
        if work.kind == "job":
            function, callable_class_number, last_job = None, 0, work.number
            free_memory()
            stopped = _run_job(work.call, report)
            state.restore()
            ray.get(queue.finish_job.remote(rank, session, stopped))
            continue
        if work.number != callable_class_number:
            function = None
            free_memory()
        result, error = b"", b""
        try:
            if function is None:
                callable_class, constructor_args = loads(work.call)
                function, callable_class_number = callable_class(*constructor_args), work.number
            batch = {column: [value] for column, value in {**work.values, "crashes": work.crashes}.items()}
            result = dumps({column: values[0] for column, values in function(batch).items()})
        except Exception as task_error:
            error = dump_error(task_error)
        ray.get(queue.finish_task.remote(rank, session, result, error))


def _run_job(call: Pickled, report: Any) -> bool:
    """Run a job; return whether it was stopped. It is a function of its own, so that its variables are freed."""
    function, argument = loads(call)
    try:
        function(argument, report)
    except Stopped:
        return True
    except Exception as error:
        error.add_note(traceback.format_exc())  # pickling drops the traceback
        raise
    return False
