"""The queue between a run and its workers, called without Ray: jobs, tasks, restarts and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tunery.workers.job_queue import MAX_IDLE_FAILURES, MAX_NODE_DEATHS, JobQueue, Work


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(call, 20))


async def join_all(queue: JobQueue, workers: int = 2) -> list[int]:
    return [await queue.join(rank) for rank in range(workers)]


async def is_waiting(call: Coroutine[Any, Any, Any]) -> bool:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.01)
    is_pending = not task.done()
    task.cancel()
    return is_pending


def test_job_goes_to_each_worker_once_and_is_done_when_all_have_finished() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        await queue.submit_job(b"train", 0)
        for rank, session in enumerate(sessions):
            assert await queue.next(rank, session, 0) == Work("job", 1, b"train")
        report = asyncio.ensure_future(queue.report(0, sessions[0], {"loss": 1.0}))
        await asyncio.sleep(0.01)
        assert not report.done(), "it waits until the run has processed the report"
        await queue.finish_job(0, sessions[0], stopped=False)
        update = await queue.job_update(1, 0)
        assert (update.state, update.reports) == ("open", [{"loss": 1.0}])
        assert await is_waiting(queue.next(0, sessions[0], 1))
        await queue.finish_job(1, sessions[1], stopped=False)
        update = await queue.job_update(1, 1)
        assert not await report
        assert (update.state, update.reports) == ("done", [])

    run(scenario())


def test_job_waits_until_all_workers_have_started() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        session = await queue.join(0)
        await queue.submit_job(b"train", 0)
        pending = asyncio.ensure_future(queue.next(0, session, 0))
        await asyncio.sleep(0.01)
        assert not pending.done()
        await queue.join(1)
        assert (await pending).call == b"train"

    run(scenario())


def test_report_returns_whether_the_job_was_cancelled() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        await queue.submit_job(b"train", 0)
        report = asyncio.ensure_future(queue.report(0, sessions[0], {"loss": 1.0}))
        await queue.job_update(1, 0)
        await queue.cancel_job()
        assert await report
        assert await queue.report(0, sessions[0], {"loss": 2.0}), "also later reports"
        await queue.submit_job(b"train", 0)
        report = asyncio.ensure_future(queue.report(0, sessions[0], {"loss": 3.0}))
        await queue.job_update(1, 0)
        await queue.job_update(-1, 1)
        assert not await report, "the next job is not cancelled"

    run(scenario())


def test_stopped_job_is_reported_as_stopped() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        await queue.submit_job(b"train", 0)
        for rank, session in enumerate(sessions):
            await queue.finish_job(rank, session, stopped=True)
        assert (await queue.job_update(1, 0)).state == "stopped"

    run(scenario())


@pytest.mark.parametrize("max_failures", [0, 2])
def test_job_is_repeated_on_restarted_workers_up_to_max_failures(max_failures: int) -> None:
    async def scenario() -> None:
        queue = JobQueue(2, backoff_seconds=0.01)
        await queue.submit_job(b"train", max_failures)
        for attempt in range(1, max_failures + 2):
            assert (await queue.job_update(attempt - 1, 0)).state == "open"
            for rank, session in enumerate(await join_all(queue)):
                assert (await queue.next(rank, session, 0)).call == b"train"
            await queue.fail([1], b"errors")
        update = await queue.job_update(0, 0)
        assert (update.state, update.attempts, update.errors) == ("failed", max_failures + 1, b"errors")

    run(scenario())


def test_time_before_an_attempt_doubles_with_each_failure() -> None:
    async def scenario() -> list[float]:
        queue = JobQueue(1, backoff_seconds=0.2)
        await queue.submit_job(b"train", 3)
        times = []
        for _ in range(3):
            (session,) = await join_all(queue, 1)
            started = asyncio.get_running_loop().time()
            await queue.next(0, session, 0)
            times.append(asyncio.get_running_loop().time() - started)
            await queue.fail([0], b"errors")
        return times

    first, second, third = run(scenario())
    assert first < 0.2 <= second
    assert third >= 0.4


def test_deaths_of_nodes_count_only_beyond_their_own_limit() -> None:
    async def scenario() -> None:
        queue = JobQueue(1, backoff_seconds=0)
        await queue.submit_job(b"train", 0)
        for _ in range(MAX_NODE_DEATHS):
            await join_all(queue, 1)
            await queue.fail([0], b"errors", node_died=[0])
        assert (await queue.job_update(0, 0)).state == "open"
        await queue.fail([0], b"errors", node_died=[0])
        assert (await queue.job_update(0, 0)).state == "failed"

        await queue.submit_tasks(b"scorer", [{"shard": 0}], 0)
        for _ in range(MAX_NODE_DEATHS + 1):
            (session,) = await join_all(queue, 1)
            work = await queue.next(0, session, 1)
            assert (work.values, work.crashes) == ({"shard": 0}, 0), "no row is to blame"
            await queue.fail([0], b"errors", node_died=[0])
        (result,) = await queue.task_results()
        assert result.error == b"errors"

    run(scenario())


def test_error_that_would_be_raised_again_is_not_retried() -> None:
    async def scenario() -> None:
        queue = JobQueue(1)
        await queue.submit_job(b"train", 3)
        await join_all(queue, 1)
        await queue.fail([0], b"errors", is_final=True)
        assert (await queue.job_update(1, 0)).state == "failed"

    run(scenario())


def test_messages_of_earlier_sessions_are_ignored() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        old = await join_all(queue)
        await queue.submit_job(b"train", 1)
        await queue.fail([0], b"errors")
        assert await queue.next(1, old[1], 0) is None, "a process that is about to be killed gets no work"
        new = await join_all(queue)
        await queue.finish_job(1, old[1], stopped=False)
        await queue.report(0, old[0], {"loss": 2.0})
        await queue.finish_job(0, new[0], stopped=False)
        update = await queue.job_update(1, 0)
        assert (update.state, update.reports) == ("open", [])

    run(scenario())


def test_tasks_go_to_free_workers_and_results_have_their_index() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        await queue.submit_tasks(b"scorer", [{"shard": n} for n in range(3)], 0)
        work = [await queue.next(rank, session, 0) for rank, session in enumerate(sessions)]
        assert [item.values["shard"] for item in work] == [0, 1]
        await queue.finish_task(1, sessions[1], b"one", b"")
        assert (await queue.next(1, sessions[1], 0)).values == {"shard": 2}
        await queue.finish_task(1, sessions[1], b"", b"error")
        await queue.finish_task(0, sessions[0], b"zero", b"")
        results = await queue.task_results()
        assert {item.index: (item.result, item.error) for item in results} == {
            0: (b"zero", b""),
            1: (b"one", b""),
            2: (b"", b"error"),
        }

    run(scenario())


def test_crash_counts_only_for_the_task_of_the_dead_worker() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        await queue.submit_tasks(b"scorer", [{"shard": 0}, {"shard": 1}], 1)
        for rank, session in enumerate(sessions):
            await queue.next(rank, session, 0)
        await queue.fail([0], b"died")
        repeated = [await queue.next(rank, session, 0) for rank, session in enumerate(await join_all(queue))]
        assert {work.values["shard"]: work.crashes for work in repeated} == {0: 1, 1: 0}

    run(scenario())


def test_task_fails_after_more_than_max_crashes_and_the_others_continue() -> None:
    async def scenario() -> None:
        queue = JobQueue(1)
        await queue.submit_tasks(b"scorer", [{"shard": 0}, {"shard": 1}], 1)
        for _ in range(2):
            (session,) = await join_all(queue, 1)
            assert (await queue.next(0, session, 0)).values == {"shard": 0}
            await queue.fail([0], b"died")
        (result,) = await queue.task_results()
        assert (result.index, result.error) == (0, b"died")
        (session,) = await join_all(queue, 1)
        assert (await queue.next(0, session, 0)).values == {"shard": 1}

    run(scenario())


def test_tasks_fail_if_workers_repeatedly_die_before_they_run_one() -> None:
    async def scenario() -> None:
        queue = JobQueue(1)
        await queue.submit_tasks(b"scorer", [{"shard": 0}, {"shard": 1}], 1)
        for failure in range(MAX_IDLE_FAILURES + 1):
            assert not queue._results, failure
            await join_all(queue, 1)
            await queue.fail([0], b"died")
        assert [(item.index, item.error) for item in await queue.task_results()] == [(0, b"died"), (1, b"died")]

    run(scenario())


def test_number_of_the_callable_class_changes_only_with_the_class() -> None:
    async def scenario() -> None:
        queue = JobQueue(1)
        (session,) = await join_all(queue, 1)
        numbers = []
        for callable_class in (b"a", b"a", b"b"):
            await queue.submit_tasks(callable_class, [{"shard": 0}], 0)
            numbers.append((await queue.next(0, session, 0)).number)
            await queue.finish_task(0, session, b"done", b"")
        assert numbers[0] == numbers[1] != numbers[2]

    run(scenario())


def test_results_of_replaced_tasks_are_dropped() -> None:
    async def scenario() -> None:
        queue = JobQueue(1)
        (session,) = await join_all(queue, 1)
        await queue.submit_tasks(b"a", [{"shard": 0}, {"shard": 1}], 0)
        await queue.next(0, session, 0)
        await queue.submit_tasks(b"a", [{"shard": 2}], 0)
        await queue.finish_task(0, session, b"of shard 0", b"")
        assert (await queue.next(0, session, 0)).values == {"shard": 2}
        await queue.finish_task(0, session, b"of shard 2", b"")
        assert [item.result for item in await queue.task_results()] == [b"of shard 2"]

    run(scenario())


def test_close_makes_idle_workers_exit() -> None:
    async def scenario() -> None:
        queue = JobQueue(2)
        sessions = await join_all(queue)
        pending = [asyncio.ensure_future(queue.next(rank, session, 0)) for rank, session in enumerate(sessions)]
        await asyncio.sleep(0.01)
        await queue.close()
        assert await asyncio.gather(*pending) == [None, None]

    run(scenario())
