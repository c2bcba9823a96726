"""Trials of earlier searches, read from their event logs, for the warm start of a sampler."""

from __future__ import annotations

from typing import Any

from tunery.events.event_log import read_events
from tunery.spec import Search
from tunery.store import Store


def earlier_trials(search: Search, store: Store) -> list[dict[str, Any]]:
    """Return the ended trials, each once, of the runs in `warm_start` that have the same metric."""
    trials: dict[str, dict[str, Any]] = {}
    for name in search.warm_start:
        for event in read_events(store.run(name) / "events"):
            if event["event"] == "trial_finished" and search.metric in (event.get("values") or {}):
                trials[event["trial"]] = event
    return [trials[trial] for trial in sorted(trials)]
