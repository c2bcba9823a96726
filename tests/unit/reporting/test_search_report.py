"""Figures of a search in the report."""

from __future__ import annotations

import re
from typing import Any

import pytest
from html_page import Page
from sample_search import FORGETTING, LOSS, WARMUP, event, searched_events

from tunery.events.event_reducer import replay
from tunery.events.run_state import SearchState
from tunery.reporting import search_report
from tunery.reporting.charts import Axis, Dot
from tunery.reporting.parallel_coordinates import Line, parallel_chart
from tunery.reporting.pareto import pareto_chart
from tunery.reporting.report import report_html


def search_of(events: list[dict[str, Any]]) -> SearchState:
    search = replay(events).search
    assert search is not None
    return search


def lines_of(svg: str, css: str) -> list[str]:
    return re.findall(rf'<path d="([^"]+)" class="{css}"', svg)


def test_every_trial_is_a_line_and_the_best_is_on_top() -> None:
    figure = search_report.parallel(search_of(searched_events()))
    assert figure is not None
    assert len(lines_of(figure.svg, "curve quiet")) == 15
    assert len(lines_of(figure.svg, "curve best c1")) == 1
    assert figure.svg.index("curve best") > figure.svg.rindex("curve quiet")
    assert [
        line
        for line in ("learning_rate (log)", "schedule", "warmup", "keep_fraction", "eval_loss")
        if line in figure.svg
    ]


def test_line_of_a_trial_without_a_field_has_a_gap() -> None:
    figure = search_report.parallel(search_of(searched_events()))
    assert figure is not None
    num_segments = [line.count("M") for line in lines_of(figure.svg, "curve quiet")]
    search = search_of(searched_events())
    without = sum(WARMUP not in trial.overrides for trial in search.originals)
    assert num_segments.count(2) == without == 8
    assert "gaps" in figure.note


def test_value_between_two_gaps_is_a_dot() -> None:
    axes = [Axis(name, categories=["a", "b"]) for name in "xyz"]
    svg = parallel_chart(axes, [Line([None, "b", None], "quiet", ""), Line(["a", "a", "b"], "quiet", "")])
    assert svg.count('class="dot-quiet"') == 1


def test_values_are_at_their_axis_position() -> None:
    axes = [Axis("a", log=True), Axis("b", categories=["x", "y"])]
    lines = [Line([value, "x"], "quiet", "") for value in (1.0, 10.0, 100.0)]
    starts = [float(line.split("L")[0].split()[1]) for line in lines_of(parallel_chart(axes, lines), "curve quiet")]
    assert starts[0] - starts[1] == pytest.approx(starts[1] - starts[2], abs=0.2)
    assert starts[0] > starts[2]


def test_single_field_or_trial_has_no_parallel_coordinates() -> None:
    assert (
        search_report.parallel(search_of([event("search_started", 0, metric="m", space={"a.b": "", "a.c": ""})]))
        is None
    )
    assert parallel_chart([Axis("a")], [Line([1.0], "quiet", "")]) == ""


def test_pareto_front_is_marked_and_joined_by_steps() -> None:
    dots = [Dot(1.0, 3.0, "", "best front"), Dot(2.0, 1.0, "", "done front"), Dot(2.5, 3.5, "", "done")]

    def corner(higher: bool) -> tuple[float, float]:
        (svg,) = lines_of(pareto_chart(dots, ("x", "y"), higher=higher), "front-line")
        first, middle, last = (tuple(map(float, point.split())) for point in svg[1:].split("L"))
        assert first != last
        return (middle[0] - first[0], middle[1] - first[1])

    assert corner(higher=False)[1] == 0, "where less is better: first right, then down"
    assert corner(higher=True)[0] == 0
    assert lines_of(pareto_chart(dots, ("x", "y"), joined=False), "front-line") == []


def test_pareto_chart_shows_front_and_violated_constraints() -> None:
    figure = search_report.pareto(search_of(searched_events()))
    assert figure is not None
    assert figure.svg.count(' front" data-tip') == 2
    assert figure.svg.count('class="trial infeasible"') == sum(
        not trial.feasible for trial in search_of(searched_events()).originals
    )
    assert ("infeasible-dot", "violates forgetting ≤ 0.1") in figure.keys
    events = [
        {**entry, "objectives": []} if entry["event"] == "search_started" else entry for entry in searched_events()
    ]
    assert search_report.pareto(search_of(events)) is None


def test_importance_is_drawn_for_each_metric_or_notes_too_few_trials() -> None:
    figures = search_report.importance(search_of(searched_events()))
    assert [figure.title for figure in figures] == [
        "parameter importance for eval_loss",
        "parameter importance for forgetting",
    ]
    assert "not-significant" in figures[0].svg
    (few,) = search_report.importance(search_of(searched_events(6)))
    assert (few.svg, "at least 8" in few.note) == ("", True)


def test_search_report_is_complete_with_any_part_missing() -> None:
    events = searched_events()
    keys = {key for entry in events for key in entry if key not in ("t", "event", "trial", "stage")}
    for key in sorted(keys):
        for invalid in (None, "word", 3, [1], {"a": [None]}):
            changed = [{**entry, key: invalid} if key in entry else entry for entry in events]
            assert Page(report_html(replay(changed))).open == [], (key, invalid)


def test_user_text_is_escaped_in_all_charts() -> None:
    hostile = "<script>x</script>\"'&"
    events = searched_events()
    for entry in events:
        if "overrides" in entry:
            entry["overrides"] = {
                f"{hostile}.{path}": f"{hostile}{value}" for path, value in entry["overrides"].items()
            }
        if "values" in entry:
            entry["values"] = {f"{name}{hostile}": value for name, value in entry["values"].items()}
        if entry["event"] == "search_started":
            entry.update(metric=LOSS + hostile, metrics=[LOSS + hostile, FORGETTING + hostile], space={})
            entry["objectives"] = [{"metric": FORGETTING + hostile, "mode": "min"}]
            entry["constraints"] = [{"metric": FORGETTING + hostile, "max": 0.1}]
        if entry["event"] == "search_finished":
            entry.update(ended_by=hostile, ties=[hostile], pareto_front=["t00", hostile])
    html = report_html(replay(events))
    assert "<script>x" not in html
    page = Page(html)
    assert (page.scripts, page.open) == (1, [])
    for line in ("curve best c1", 'class="trial best front"', "bar not-significant"):
        assert line in html


def test_field_without_trials_has_no_axis() -> None:
    events = searched_events()
    for entry in events:
        entry.get("overrides", {}).pop(WARMUP, None)
    figure = search_report.parallel(search_of(events))
    assert figure is not None
    assert ">warmup<" not in figure.svg
