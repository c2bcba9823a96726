"""The loop of a worker: import the modules that jobs need, then run jobs and tasks until the queue closes."""

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
    queue: Any
    """Handle of the JobQueue."""
    device: str
    threads: int
    preload: Sequence[str]
    """Modules to import before the first job arrives."""


def serve(train_loop_config: dict[str, WorkerConfig]) -> None:
    """Train function of Ray Train, called once in each worker process. An error of a job is raised, which makes Ray
    Train restart all workers; an error of a task is returned to the run."""
    import ray
    import ray.train

    config = train_loop_config["worker"]
    prepare_process(config.device, config.threads)
    for module in config.preload:
        importlib.import_module(module)
    queue, rank = config.queue, ray.train.get_context().get_world_rank()
    state = ProcessState.capture()
    session = ray.get(queue.join.remote(rank))
    last_job, actor_number, actor = 0, 0, None

    def report(metrics: dict[str, float]) -> None:
        if rank == 0:
            ray.get(queue.report.remote(rank, session, metrics))

    while True:
        work: Work | None = ray.get(queue.next.remote(rank, session, last_job))
        if work is None:
            return
        if work.kind == "job":
            actor, actor_number, last_job = None, 0, work.number
            free_memory()
            stopped = _run_job(work.call, report)
            state.restore()
            ray.get(queue.finish_job.remote(rank, session, stopped))
            continue
        if work.number != actor_number:
            actor = None
            free_memory()
        result, error = b"", b""
        try:
            if actor is None:
                actor_class, arguments = loads(work.call)
                actor, actor_number = actor_class(*arguments), work.number
            batch = {key: [value] for key, value in {**work.values, "crashes": work.crashes}.items()}
            result = dumps({key: values[0] for key, values in actor(batch).items()})
        except Exception as raised:
            error = dump_error(raised)
        ray.get(queue.finish_task.remote(rank, session, result, error))


def _run_job(call: Pickled, report: Any) -> bool:
    """Run a job; return whether it was stopped. A function of its own, so that its variables are freed with it."""
    function, argument = loads(call)
    try:
        function(argument, report)
    except Stopped:
        return True
    except Exception as error:
        error.add_note(traceback.format_exc())  # pickling loses the traceback
        raise
    return False
