"""Trials of earlier searches, as their event logs tell them, for algorithms that learn from them."""

from __future__ import annotations

from typing import Any

from tunery.events.event_log import read_events
from tunery.spec import Search
from tunery.store import Store


def earlier_trials(search: Search, store: Store) -> list[dict[str, Any]]:
    """Ended trials of the runs that `warm_start` names which were measured by the same metrics, each once."""
    found: dict[str, dict[str, Any]] = {}
    for name in search.warm_start:
        for event in read_events(store.run(name) / "events"):
            if event["event"] == "trial_finished" and search.metric in (event.get("values") or {}):
                found[event["trial"]] = event
    return [found[trial] for trial in sorted(found)]
