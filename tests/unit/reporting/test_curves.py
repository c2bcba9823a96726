"""Training curves of the report: the primary metrics of each kind of training, and the groups of the others."""

from __future__ import annotations

import re

from sample_run import Event, events_until, rewarded_events, sample_events

from tunery.events.event_reducer import replay
from tunery.reporting.charts import Series, line_chart
from tunery.reporting.curves import METRIC_GROUPS, NOT_CURVES, OTHER_METRICS, Details, curve_details, curve_figures


def metrics_events(values: dict[str, float], kind: str = "ppo", step: int = 1, stage: str = "s") -> list[Event]:
    started = {"t": 1.0, "event": "stage_started", "stage": stage, "kind": kind, "fingerprint": "f"}
    return [started, {"t": 2.0, "event": "metrics", "stage": stage, "step": step, "values": values}]


def details_of(events: list[Event]) -> dict[str, Details]:
    return {item.title.split()[0]: item for item in curve_details(replay(events))}


def panels(details: Details) -> dict[str, list[str]]:
    return {name: [panel.title for panel in row] for name, row in details.rows}


def test_reward_is_the_primary_chart_without_a_loss() -> None:
    ppo, grpo = curve_figures(replay(rewarded_events()))
    assert (ppo.title, grpo.title) == ("ppo: reward", "grpo: reward")
    assert "ppo train" in ppo.svg
    assert "ppo eval 4.610" in ppo.svg
    assert [words for _, words in ppo.keys] == ["train", "eval (held out)"]
    assert grpo.keys == []


def test_loss_is_the_primary_chart_and_hides_unlisted_metrics() -> None:
    state = replay(sample_events())
    assert [figure.title for figure in curve_figures(state)] == ["pretrain: loss", "sft: loss"]
    assert curve_details(state) == []


def test_panels_are_grouped_by_topic() -> None:
    ppo = panels(details_of(rewarded_events())["ppo"])
    assert list(ppo) == ["KL divergence", "policy", "value model", "responses", "speed and memory"]
    assert ppo["KL divergence"][:2] == ["KL to the reference, nats", "KL coefficient"]
    assert ppo["responses"] == ["length, tokens", "EOS rate", "reward std"]
    assert len(ppo["speed and memory"]) == 4


def test_every_logged_metric_is_plotted_once() -> None:
    values = {"reward": 1.0, "eval_reward": 1.0, "eval_kl": 2.0, "unknown metric": 3.0, "rows": 32.0}
    all_metrics = {name: 1.0 for row in METRIC_GROUPS.values() for name in row} | values
    state = replay(metrics_events(all_metrics))
    titles = [title for row in panels(curve_details(state)[0]).values() for title in row]
    assert len(titles) == len(set(titles)) == sum(len(row) for row in METRIC_GROUPS.values()) + 1
    assert panels(curve_details(state)[0])[OTHER_METRICS] == ["unknown metric"]
    assert not NOT_CURVES & {name for row in METRIC_GROUPS.values() for name in row}


def test_held_out_only_metric_has_a_panel() -> None:
    (details,) = curve_details(replay(metrics_events({"loss": 1.0, "eval_accuracy": 0.75}, kind="classifier")))
    assert panels(details) == {"classification": ["accuracy"]}
    assert "0.75" in details.rows[0][1][0].svg


def test_trainings_of_one_kind_share_their_panels_and_keep_their_colours() -> None:
    events = [
        *metrics_events({"reward": 1.0, "kl": 1.0}, stage="a"),
        *metrics_events({"reward": 1.0, "kl": 2.0}, stage="b"),
    ]
    (details,) = curve_details(replay(events))
    assert details.keys == [("c0", "a"), ("c1", "b")]
    ((_, (panel,)),) = details.rows
    assert len(re.findall(r'class="curve train c[01]"', panel.svg)) == 2


def test_reward_charts_show_all_values_and_loss_charts_clip_the_start() -> None:
    falling = Series("s train", [(float(step), 1.0 if step else 100.0) for step in range(100)])
    assert "initial values up to" in line_chart([falling], "steps", "loss")
    assert "initial values up to" not in line_chart([falling], "steps", "reward", full_range=True)
    assert "initial values up to" not in line_chart([falling], "steps", "entropy", small=True)


def test_small_chart_with_many_curves_has_tooltips_only() -> None:
    few, many = ([Series(f"s{n}", [(0, 1.0), (1, 2.0)], n) for n in range(count)] for count in (2, 12))
    assert line_chart(few, "steps", "kl", small=True).count('class="end') == 2
    assert line_chart(many, "steps", "kl", small=True).count('class="end') == 0
    assert line_chart(many, "steps", "kl").count('class="end') == 12


def test_partial_training_is_plotted() -> None:
    started = [event for event in rewarded_events() if event.get("stage") == "ppo"][:2]
    assert [figure.title for figure in curve_figures(replay(started))] == ["ppo: reward"]
    assert curve_figures(replay(events_until(0.02))) == []
