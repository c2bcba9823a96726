"""What does the bookkeeping of a search cost? Many trials that each take one second, against the ideal: their number
over how many run at once.

    python benchmarks/search_overhead.py [--trials 1000] [--at-once 10]

Tune's own, and ours on top of it: the queue, the suggestions, the journal, the event log, the budget. The trials'
processes start once and are kept; the clock starts when the first trials of all of them have met, because what a
process costs (1 to 2 s of a core) is told beside it and is no bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        search(Path(scratch), options.trials, options.at_once)


def search(folder: Path, trials: int, at_once: int) -> None:
    import ray
    from ray import tune

    from tunery.events.event_log import EventLog
    from tunery.pipeline.ray_session import QUIET_ENV
    from tunery.pipeline.run_context import RunContext
    from tunery.search.budget import BudgetStopper
    from tunery.search.journal import Journal
    from tunery.search.progress import JournalCallback
    from tunery.search.queue import Queue
    from tunery.search.steering import SearchControl
    from tunery.search.suggest import suggester
    from tunery.spec import Search
    from tunery.store import Store

    os.environ.update({**QUIET_ENV, "TUNE_GLOBAL_CHECKPOINT_S": "3600"})
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    space = {"sft.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    told = Search.model_validate_json(
        json.dumps({"metric": "sft.eval_loss", "mode": "min", "trials": trials, "space": space})
    )
    where = RunContext(Store(folder / "store"), folder / "run", folder / "x.yaml")
    where.logs.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    queue = Queue(
        told,
        journal,
        suggester(told, 1, folder, []),
        SearchControl(where.run),
        at_once,
        lambda overrides, seed: overrides,
    )
    began = time.time()
    tuner = tune.Tuner(
        tune.with_resources(
            partial(trial, folder=str(folder), at_once=at_once), tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])
        ),
        param_space={},
        tune_config=tune.TuneConfig(num_samples=-1, search_alg=queue, max_concurrent_trials=at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            stop=BudgetStopper(told, journal, 1),
            callbacks=[JournalCallback(EventLog(folder / "events.jsonl"), journal, told, where)],
        ),
    )
    tuner.fit()
    end = time.time()
    met = (folder / "met").stat().st_mtime
    done = sum(record.outcome is not None and record.outcome["state"] == "done" for record in journal.records.values())
    assert done == trials, f"{done} of {trials}"
    ideal = trials / at_once
    over = (end - met) / ideal - 1
    print(f"{trials} trials of 1 s, {at_once} at once: {end - met:.1f} s, ideal {ideal:.1f}: {over:+.1%}")
    print(f"before, {at_once} processes started in {met - began:.1f} s")


def trial(config: dict[str, Any], folder: str, at_once: int) -> None:
    """The first one of each process waits for those of the others."""
    from ray import tune

    here = Path(folder)
    if not (here / "met").exists():
        (here / f"here-{os.getpid()}").touch()
        while not (here / "met").exists():
            if len(list(here.glob("here-*"))) >= at_once:
                (here / "met").touch()
            time.sleep(0.05)
    time.sleep(1)
    tune.report({"sft.eval_loss": 1.0, "steps": 1.0, "tokens": 1.0, "rows": 1.0, "finished": 1.0})


if __name__ == "__main__":
    main()
