"""The report: a single, complete HTML file that escapes user text, for runs in any state."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from html_page import Page
from sample_run import Event, events_until, failed_events, sample_events, write_run

from tunery.events.event_reducer import replay
from tunery.reporting import report_sections
from tunery.reporting.axes import log_ticks, nice_ticks, spread
from tunery.reporting.charts import Series, ThresholdLine, downsample, histogram_chart, line_chart
from tunery.reporting.report import report_html, write_report
from tunery.reporting.report_sections import opening_comment

SECTIONS = ["result", "leaderboard", "rows", "scores", "curves", "search", "time", "stages", "experiment"]


def page_of(events: list[Event]) -> str:
    return report_html(replay(events))


def test_report_has_every_section_in_order() -> None:
    page = Page(page_of(sample_events()))
    assert page.sections == SECTIONS
    assert page.open == []


def test_report_needs_no_network() -> None:
    html = page_of(sample_events())
    assert Page(html).references == []
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html


def test_report_is_the_only_file_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "quickstart", sample_events())
    assert write_report(folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["events", "report.html"]
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_user_text_is_escaped_everywhere() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    events = sample_events()
    clean_scripts = Page(page_of(events)).scripts
    for event in events:
        if event["event"] == "run_started":
            event.update(
                text=f"# {hostile}\nname: {hostile}",
                run=hostile,
                file=hostile,
                command=hostile,
                versions={hostile: hostile},
            )
        if event["event"] in ("trial_started", "trial_finished"):
            event["overrides"] = {hostile: hostile, "sft.epochs": 1}
            event["error"] = hostile
        if event["event"] == "search_started":
            event.update(metric=hostile, space={hostile: hostile}, reason=hostile)
        if event["event"] == "comparison":
            event.update(columns=[hostile, "b"], rows=[[hostile, 1.0]], notes=[hostile])
        if event["event"] == "stage_finished" and "rules" in event["facts"]:
            event["facts"]["rules"][0]["rule"] = hostile
        if event["event"] == "stage_finished":
            event["facts"]["source"] = event["facts"][hostile] = hostile
    html = page_of(events)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert Page(html).scripts == clean_scripts == 1


def test_threshold_of_a_select_is_in_its_score_histogram() -> None:
    html = page_of(sample_events())
    assert 'class="threshold"' in html
    assert "clean: keep_fraction 0.8, threshold 105.0" in html
    without = [e for e in sample_events() if not (e.get("stage") == "clean" and not e.get("trial"))]
    assert "threshold 105.0<" not in page_of(without)


def test_threshold_line_is_at_its_value() -> None:
    def x_of(value: float) -> float:
        svg = histogram_chart(
            [1.0, 10.0, 100.0, 1000.0], [1, 2, 3], [0, 0, 0], [ThresholdLine(value, "cut")], "perplexity"
        )
        actual = re.search(r'<line x1="([\d.]+)"[^>]*class="threshold"', svg)
        assert actual
        return float(actual[1])

    assert x_of(10.0) < x_of(100.0)
    assert x_of(100.0) - x_of(10.0) == pytest.approx(x_of(1000.0) - x_of(100.0), abs=0.2)


def test_corrupted_rows_are_highlighted_only_if_known() -> None:
    with_corruption = histogram_chart([1.0, 2.0, 3.0], [5, 5], [0, 2], [], "x")
    without_corruption = histogram_chart([1.0, 2.0, 3.0], [5, 5], [0, 0], [], "x")
    assert "bar bad" in with_corruption
    assert "bar bad" not in without_corruption


def test_best_of_each_column_is_marked_in_the_leaderboard() -> None:
    html = page_of(sample_events())
    board = html[html.index('id="leaderboard"') : html.index('id="rows"')]
    assert re.findall(r'best">([\d.]+)', board) == ["3.191", "24.31", "3.987", "53.89"]


def test_funnel_counts_quarantined_and_dropped_rows() -> None:
    html = page_of(sample_events())
    rows = html[html.index('id="rows"') : html.index('id="scores"')]
    assert all(line in rows for line in ("4,012", "−12 quarantined", "3,200", "−800 (20%)"))


def test_best_trial_is_first_and_failed_trials_have_errors() -> None:
    html = page_of(sample_events())
    search = html[html.index('id="search"') : html.index('id="time"')]
    highlighted = re.search(r'<tr class="highlighted"><td class="">(t\d\d)', search)
    assert highlighted
    assert highlighted[1] == replay(sample_events()).search.best.name  # type: ignore[union-attr]
    assert "loss is NaN at step 60" in search


def test_failed_run_shows_cause_and_remedy_first() -> None:
    html = page_of(failed_events())
    first_section = html.index("<section")
    for line in ("ran out of GPU memory", "the GPU has 79.1 GiB", "set compute.micro_batch_size to 32"):
        assert html.index(line) < first_section
    assert "result" not in Page(html).sections


@pytest.mark.parametrize("kind", sorted({event["event"] for event in sample_events()}))
def test_report_is_written_without_events_of_a_kind(kind: str) -> None:
    html = page_of([event for event in sample_events() if event["event"] != kind])
    assert Page(html).open == []


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_report_is_written_at_any_point_of_a_run(fraction: float) -> None:
    assert Page(page_of(events_until(fraction))).open == []


def test_facts_of_any_structure_are_shown() -> None:
    nested = {
        "nested": {"a": [1, {"b": None}]},
        "rows": [{"x": 1}, {"y": [2]}],
        "none": None,
        "text": "words",
        "nan": float("nan"),
    }
    invalid = {
        "rows": "many",
        "injected_corruption": 3,
        "scores": {"perplexity": {"histogram": None}},
        "results": [{"model": "m"}],
    }
    reviewed = {"agreement": {"share": "most"}, "strata": [{}], "thresholds": [{"score": 1}, 2], "sampled": "x"}
    for facts in (nested, invalid, reviewed, {"rules": [3], "rows_in": 1, "kept": None}, {}):
        for kind in ("ppo", "dataset", "score", "select", "review", "sft", "evaluate"):
            finished: Event = {
                "t": 1.0,
                "event": "stage_finished",
                "stage": "s",
                "kind": kind,
                "facts": facts,
            }
            assert Page(page_of([finished])).open == []


def test_curve_is_plotted_up_to_its_first_nan() -> None:
    points: list[Event] = [
        {"t": float(s), "event": "metrics", "stage": "sft", "step": s, "values": {"loss": loss}}
        for s, loss in enumerate([3.0, 2.0, float("nan")])
    ]
    html = page_of(points)
    assert "nan" not in html.lower().replace("tip.hidden", "")
    assert "sft train 2.000" in html


def test_labels_of_curves_that_end_together_do_not_overlap() -> None:
    series = [Series(f"s{index}", [(0, 2.0), (10, 1.0 + index / 1e4)], index, "eval") for index in range(5)]
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*class="end', line_chart(series, "steps", "loss")))
    assert min(b - a for a, b in pairwise(heights)) >= 13


def test_ticks_are_round_and_within_the_axis() -> None:
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(3.02, 3.41, 4) == [3.1, 3.2, 3.3, 3.4]
    assert log_ticks(1e-4, 3e-3, 4) == pytest.approx([1e-4, 2e-4, 5e-4, 1e-3, 2e-3])
    assert nice_ticks(5, 5) == [5]


def test_spread_keeps_order_and_gap() -> None:
    positions = spread([50, 10, 51, 52], 15, 0, 100)
    assert positions[1] < positions[0] < positions[2] < positions[3]
    assert min(b - a for a, b in pairwise(sorted(positions))) >= 14.5


def test_long_curves_are_downsampled_and_keep_their_end() -> None:
    points = [(float(index), float(index)) for index in range(10_000)]
    assert len(downsample(points)) <= 260
    assert downsample(points)[-1] == points[-1]


def test_leaderboard_distinguishes_the_best_trial_from_the_file() -> None:
    def evaluated(stage: str, loss: float) -> dict:
        result = {"model": "sft", "set": "heldout", "loss": loss, "perplexity": 9.0, "rows": 3, "tokens": 30}
        return {"t": 1.0, "event": "stage_finished", "stage": stage, "kind": "evaluate", "fingerprint": stage,
                "reused": False, "seconds": 1.0, "artifact": "", "facts": {"results": [result]}}  # fmt: skip

    table = report_sections.leaderboard(replay([evaluated("eval", 2.5), evaluated("eval (best trial)", 2.25)]))
    assert table is not None
    assert [row[0].text for row in table.rows] == ["sft", "sft, eval (best trial)"]


def test_leaderboard_has_win_rates_in_the_row_of_the_models_losses() -> None:
    def evaluation_event(kind: str, *results: dict[str, object]) -> dict[str, object]:
        return {"t": 1.0, "event": "stage_finished", "stage": kind, "kind": kind, "fingerprint": kind,
                "reused": False, "seconds": 1.0, "artifact": "", "facts": {"results": results}}  # fmt: skip

    def win_result(model: str, rate: float) -> dict[str, object]:
        return {"model": model, "set": "heldout", "win_rate": rate, "interval": [0.1, 0.9], "reward": 1.5, "rows": 3,
                "outcomes": {"wins": 2, "ties": 0, "losses": 1}, "baseline": {"model": "base", "reward": 0.5},
                "left_out": {"too_long": 1, "unusable": 0}}  # fmt: skip

    losses = [{"model": model, "set": "heldout", "loss": 2.5, "rows": 4} for model in ("base", "sft", "ppo")]
    state = replay(
        [
            evaluation_event("evaluate", *losses),
            evaluation_event("win_rate", win_result("sft", 0.6), win_result("ppo", 0.75)),
        ]
    )
    table = report_sections.leaderboard(state)
    assert table is not None
    assert table.columns == ["model", "heldout loss", "heldout win rate", "heldout reward"]
    assert [[cell.text for cell in row][:3] for row in table.rows] == [
        ["base", "2.5", ""], ["sft", "2.5", "0.60"], ["ppo", "2.5", "0.75"]]  # fmt: skip
    assert [row[2].best for row in table.rows] == [False, False, True]


def test_opening_comment_is_shown_in_paragraphs_without_its_line_breaks() -> None:
    text = "# Which rate?\n#\n# Eight rates, each\n# for 150 steps.\nname: x\n# not part of it\n"
    assert opening_comment(text) == ["Which rate?", "Eight rates, each for 150 steps."]
    assert opening_comment("name: x\n") == []
