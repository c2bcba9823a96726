"""Responses before and after a training, and of several models, in the report."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sample_run import PPO_FACTS, Event, rewarded_events

from tunery.events.event_reducer import replay
from tunery.events.run_state import StageState
from tunery.reporting.report import report_html
from tunery.reporting.responses import prompt_responses, responses, responses_table

HOSTILE = "</p></details><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def section(events: list[Event]) -> str:
    html = report_html(replay(events))
    return html[html.index('<section id="responses">') : html.index('<section id="time">')]


def test_prompt_and_both_responses_are_shown_with_rewards() -> None:
    html = section(rewarded_events())
    first = html[: html.index("</details>")]
    order = ["What is `str`?", "reward 0.50 → 4.00", "<b>before<", "str str (", "<b>after<", "str is a class."]
    positions = [first.index(line) for line in order]
    assert positions == sorted(positions)


def test_first_prompts_are_expanded_and_others_collapsed() -> None:
    html = section(rewarded_events())
    ppo = html[: html.index("<h3>wins</h3>")]
    assert re.findall(r"<details( open)?>", ppo) == [" open", " open", " open", ""]


def test_responses_are_labelled_by_model_and_the_best_is_marked() -> None:
    html = section(rewarded_events())
    wins = html[html.index("<h3>wins</h3>") :]
    assert "base 0.25, ppo 4.00, grpo 3.50" in wins
    assert re.findall(r'best"><b>(\w+)</b>', wins) == ["ppo"]
    assert "&lt;b&gt;string&lt;/b&gt;" in wins


def test_hostile_responses_prompts_and_model_names_are_escaped() -> None:
    training_responses = {
        "prompt": HOSTILE,
        "before": HOSTILE,
        "after": HOSTILE,
        "reward_before": HOSTILE,
        "reward_after": 1.0,
    }
    model_responses = {"prompt": HOSTILE, "responses": {HOSTILE: {"response": HOSTILE, "reward": HOSTILE}}}
    clean = report_html(replay(rewarded_events()))
    events = rewarded_events()
    for event in events:
        if event["event"] == "stage_finished" and "responses" in event["facts"]:
            event["facts"]["responses"] = [training_responses, model_responses]
    html = report_html(replay(events))
    assert "<img" not in html
    assert html.count("<script") == clean.count("<script") == 1
    assert html.count("&lt;script&gt;alert(1)") >= 10


def test_responses_of_the_best_trial_have_its_name() -> None:
    stage = StageState("ppo", kind="ppo", trial="t03", facts=PPO_FACTS)
    assert [name for name, _ in responses([stage])] == ["ppo, trial t03"]


def test_table_has_columns_for_responses_and_rewards() -> None:
    columns, rows = responses_table(PPO_FACTS)
    assert columns == ["prompt", "before", "after", "reward before", "reward after"]
    assert len(rows) == 4
    assert rows[0] == ["What is `str`?", "str str (", "str is a class.\nIt has methods.", 0.5, 4.0]


def test_missing_response_leaves_its_cells_empty() -> None:
    result = [
        {"prompt": "p", "responses": {"a": {"response": "x", "reward": 1.0}}},
        {"prompt": "q", "responses": {"b": {"response": "y", "reward": None}}},
    ]
    assert responses_table({"responses": result}) == (
        ["prompt", "a", "b", "reward a", "reward b"],
        [["p", "x", None, 1.0, None], ["q", None, "y", None, None]],
    )


@pytest.mark.parametrize(
    "value",
    [None, "text", [3], [{}], [{"prompt": "p"}], [{"prompt": "p", "responses": {"a": 1, "b": {"reward": 1.0}}}]],
)
def test_fact_of_unknown_format_is_skipped(value: Any) -> None:
    assert prompt_responses({"responses": value}) == []
    assert responses_table({"responses": value})[1] == []


def test_tied_responses_are_not_marked_as_best() -> None:
    same = {"response": "x", "reward": 1.0}
    (item,) = prompt_responses({"responses": [{"prompt": "p", "responses": {"a": same, "b": same}}]})
    assert not any(response.best for response in item.responses)
