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

EVIL = "</p></details><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def section(events: list[Event]) -> str:
    html = report_html(replay(events))
    return html[html.index('<section id="responses">') : html.index('<section id="time">')]


def test_prompt_and_both_answers_stand_side_by_side_with_their_rewards() -> None:
    html = section(rewarded_events())
    first = html[: html.index("</details>")]
    order = ["What is `str`?", "reward 0.50 → 4.00", "<b>before<", "str str (", "<b>after<", "str is a class."]
    places = [first.index(said) for said in order]
    assert places == sorted(places)


def test_first_prompts_of_a_stage_are_open_and_the_others_one_click_away() -> None:
    html = section(rewarded_events())
    ppo = html[: html.index("<h3>wins</h3>")]
    assert re.findall(r"<details( open)?>", ppo) == [" open", " open", " open", ""]


def test_answers_of_several_models_are_told_by_model_and_the_best_is_marked() -> None:
    html = section(rewarded_events())
    wins = html[html.index("<h3>wins</h3>") :]
    assert "base 0.25, ppo 4.00, grpo 3.50" in wins
    assert re.findall(r'best"><b>(\w+)</b>', wins) == ["ppo"]
    assert "&lt;b&gt;string&lt;/b&gt;" in wins


def test_hostile_answers_prompts_and_names_of_models_do_not_run() -> None:
    of_training = {"prompt": EVIL, "before": EVIL, "after": EVIL, "reward_before": EVIL, "reward_after": 1.0}
    of_models = {"prompt": EVIL, "answers": {EVIL: {"answer": EVIL, "reward": EVIL}}}
    clean = report_html(replay(rewarded_events()))
    events = rewarded_events()
    for event in events:
        if event["event"] == "stage_finished" and "responses" in event["facts"]:
            event["facts"]["responses"] = [of_training, of_models]
    html = report_html(replay(events))
    assert "<img" not in html
    assert html.count("<script") == clean.count("<script") == 1
    assert html.count("&lt;script&gt;alert(1)") >= 10


def test_answers_of_the_best_trial_are_shown_with_its_name() -> None:
    stage = StageState("ppo", kind="ppo", trial="t03", facts=PPO_FACTS)
    assert [name for name, _ in responses([stage])] == ["ppo, trial t03"]


def test_table_has_a_column_an_answer_and_one_a_reward() -> None:
    columns, rows = responses_table(PPO_FACTS)
    assert columns == ["prompt", "before", "after", "reward before", "reward after"]
    assert len(rows) == 4
    assert rows[0] == ["What is `str`?", "str str (", "str is a class.\nIt has methods.", 0.5, 4.0]


def test_prompt_that_a_model_did_not_answer_leaves_its_cells_empty() -> None:
    told = [
        {"prompt": "p", "answers": {"a": {"answer": "x", "reward": 1.0}}},
        {"prompt": "q", "answers": {"b": {"answer": "y", "reward": None}}},
    ]
    assert responses_table({"responses": told}) == (
        ["prompt", "a", "b", "reward a", "reward b"],
        [["p", "x", None, 1.0, None], ["q", None, "y", None, None]],
    )


@pytest.mark.parametrize(
    "odd",
    [None, "text", [3], [{}], [{"prompt": "p"}], [{"prompt": "p", "answers": {"a": 1, "b": {"reward": 1.0}}}]],
)
def test_fact_of_another_form_tells_nothing(odd: Any) -> None:
    assert prompt_responses({"responses": odd}) == []
    assert responses_table({"responses": odd})[1] == []


def test_of_two_answers_that_are_as_good_neither_is_the_best() -> None:
    same = {"answer": "x", "reward": 1.0}
    (one,) = prompt_responses({"responses": [{"prompt": "p", "answers": {"a": same, "b": same}}]})
    assert not any(response.best for response in one.responses)
