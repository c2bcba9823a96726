"""The terminal view: the live table, the table at the end, and plain lines without a terminal."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from sample_run import START, Event, events_until, failed_events, rewarded_events, sample_events
from sample_search import searched_events

from tunery.events.event_log import EventReader
from tunery.events.event_reducer import RunState, StageState, replay
from tunery.events.stage_summary import latest, note
from tunery.reporting.terminal import PlainLines, Terminal, final_table, render


def rendered_lines(renderable: RenderableType, width: int) -> list[str]:
    # Wider than requested, so that the console does not wrap a line that is too long.
    console = Console(width=width + 200, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return [line.rstrip() for line in capture.get().splitlines()]


def at(fraction: float) -> tuple[RunState, float]:
    events = events_until(fraction)
    return replay(events), events[-1]["t"] + 1


@pytest.mark.parametrize("width", [60, 80, 109, 110, 200])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3, 0.6, 0.8])
def test_no_line_is_wider_than_the_terminal(width: int, fraction: float) -> None:
    state, now = at(fraction)
    assert max(map(cell_len, rendered_lines(render(state, width, now), width))) <= width


@pytest.mark.parametrize("width", [80, 200])
def test_long_names_and_errors_stay_within_the_terminal(width: int) -> None:
    events = json.loads(json.dumps(failed_events()).replace('"sft"', f'"{"a_long_stage_name_" * 6}"'))
    events[-2]["message"] = "a very long message " * 20
    state = replay(events)
    lines = rendered_lines(render(state, width, 0.0), width)
    assert max(map(cell_len, lines)) <= width
    assert sum(len(line) for line in lines if "a very long message" in line) > 300


def test_each_stage_takes_one_line_at_80_columns() -> None:
    state, now = at(0.3)
    lines = rendered_lines(render(state, 80, now), 80)
    for name in state.stages:
        assert sum(line[3:].startswith(f"{name} ") for line in lines) == 1


@pytest.mark.parametrize("width", [80, 200])
def test_running_stage_shows_amount_speed_and_time_left(width: int) -> None:
    state, now = at(0.3)
    line = next(line for line in rendered_lines(render(state, width, now), width) if line.startswith("●"))
    assert re.search(r"\d+/400 steps +3\.\d steps/s .*\d+s", line)


def test_running_policy_shows_its_reward_and_kl_and_no_loss() -> None:
    events = rewarded_events()
    for name in ("ppo", "grpo"):
        until = [index for index, event in enumerate(events) if event.get("stage") == name][20]
        state = replay(events[:until])
        (line,) = [line for line in rendered_lines(render(state, 200, 0.0), 200) if line.startswith("●")]
        assert re.search(r"reward \d\.\d\d, KL \d", line)
        assert "loss" not in line


@pytest.mark.parametrize("width", [80, 200])
def test_finished_policy_shows_its_reward_before_and_after(width: int) -> None:
    lines = rendered_lines(render(replay(rewarded_events()), width, 0.0), width)
    assert max(map(cell_len, lines)) <= width
    assert any(line.startswith("✓  ppo ") and line.endswith("reward 0.97 → 4.61, KL 11.9") for line in lines)
    assert any(line.startswith("✓  grpo ") and line.endswith("reward 3.75, KL 0.12") for line in lines)


def test_policy_without_eval_data_shows_rewards_of_training_steps() -> None:
    facts = {"first_reward": 1.125, "reward": 4.65, "kl": 13.25, "eval_reward": None}
    assert note(StageState("s", kind="ppo", status="done", facts=facts)) == "reward 1.12 → 4.65, KL 13.2"
    assert note(StageState("s", kind="ppo", status="done", facts={})) == ""


def test_policy_before_its_first_step_has_no_metrics() -> None:
    stage = StageState("s", kind="ppo", status="running", points={0: {"eval_reward": 0.97, "eval_kl": 0.0}})
    assert latest(stage) == ""


def test_search_shows_best_and_running_trials() -> None:
    state, now = at(0.6)
    text = "\n".join(rendered_lines(render(state, 80, now), 80))
    assert "of 12 trials" in text
    assert re.search(r"best +3\.\d+ +t\d\d", text)
    assert text.count("●") == 2


def test_failure_is_shown_with_cause_and_remedy() -> None:
    text = "\n".join(rendered_lines(render(replay(failed_events()), 80, 0.0), 80))
    assert "the GPU has 79.1 GiB" in text
    assert "set compute.micro_batch_size to 32" in text


def test_view_of_many_stages_fits_a_low_terminal_and_keeps_the_running_one() -> None:
    stages = [{"name": f"s{index:02d}", "kind": "dataset", "inputs": []} for index in range(40)]
    start: Event = {"t": 1.0, "event": "run_started", "run": "r", "stages": stages}
    state = replay([start, {"t": 2.0, "event": "stage_started", "stage": "s30", "kind": "dataset"}])
    lines = rendered_lines(render(state, 80, 3.0, height=15), 80)
    assert len(lines) < 15
    assert any("s30" in line for line in lines)
    assert "more stages" in lines[-1]


def test_summary_table_is_aligned_and_has_notes() -> None:
    lines = rendered_lines(final_table(replay(sample_events()), 80), 80)
    rows = [line for line in lines if re.match(r" (base|raw|sft) ", line)]
    assert len(rows) == 3
    assert len({row.index(".") for row in rows}) == 1
    assert any("noise" in line for line in lines)


def test_wide_summary_table_has_all_columns() -> None:
    columns = ["model", *(f"metric_number_{index}" for index in range(12))]
    row: list[Any] = ["sft", *(1000.5 + index for index in range(12))]
    state = replay([{"t": 1.0, "event": "comparison", "columns": columns, "rows": [row], "notes": []}])
    lines = rendered_lines(final_table(state, 60), 60)
    assert max(map(cell_len, lines)) <= 60
    assert all(any(column in line for line in lines) for column in columns)


def follow(folder: Path, events: list[Event], console: Console) -> None:
    """Write `events` while a Terminal follows, with times shifted to now."""
    shift = time.time() - events[0]["t"]
    log = folder / "events" / "driver.jsonl"
    log.parent.mkdir(parents=True)
    with Terminal(console, "quickstart", folder, EventReader(log.parent)):
        lines = [json.dumps({**event, "t": event["t"] + shift}) for event in events]
        log.write_text("\n".join(lines) + "\n")


def test_without_a_terminal_there_are_plain_lines_and_no_escape_codes(tmp_path: Path) -> None:
    out = io.StringIO()
    follow(tmp_path, sample_events(), Console(file=out, width=80))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "docs: done in 3.2s: 4,000 rows, 12 quarantined" in text
    assert "trial t07: failed" in text
    assert text.count("sft: started") == 1


def test_plain_progress_is_limited_to_every_30_seconds() -> None:
    def progress_lines(every: float) -> list[str]:
        start: Event = {"t": 0.0, "event": "stage_started", "stage": "sft", "kind": "sft"}
        steps: list[Event] = [
            {
                "t": step * every,
                "event": "progress",
                "stage": "sft",
                "done": step,
                "total": 100,
                "unit": "steps",
            }
            for step in range(1, 101)
        ]
        state, lines = replay([start, *steps]), PlainLines(since=0.0)
        return [line for step in steps for line in lines.lines(state, step)]

    assert len(progress_lines(every=3.0)) == 10
    assert len(progress_lines(every=0.1)) == 0


@pytest.mark.parametrize("width", [80, 200])
def test_what_a_stage_waits_for_is_shown_until_it_makes_progress(width: int) -> None:
    start: Event = {"t": 0.0, "event": "stage_started", "stage": "sft", "kind": "sft"}
    waiting: Event = {
        "t": 40.0,
        "event": "progress",
        "stage": "sft",
        "done": 0,
        "total": 0,
        "unit": "",
        "detail": "waiting for 2 workers",
    }
    step: Event = {"t": 80.0, "event": "progress", "stage": "sft", "done": 1, "total": 100, "unit": "steps"}
    lines = PlainLines(since=0.0)
    assert lines.lines(replay([start, waiting]), waiting) == ["    0.0s  sft: waiting for 2 workers"]
    assert lines.lines(replay([start, waiting, step]), step) == ["    0.0s  sft: 1/100 steps"]
    for events, is_waiting in (([start, waiting], True), ([start, waiting, step], False)):
        state = replay([{"t": 0.0, "event": "run_started", "run": "x", "stages": []}, *events])
        text = "\n".join(rendered_lines(render(state, width, 90.0), width))
        assert ("waiting for 2 workers" in text) is is_waiting


def test_earlier_invocations_are_not_printed_again(tmp_path: Path) -> None:
    events = failed_events()
    shift = time.time() - 60 - events[-1]["t"]
    log = tmp_path / "events" / "driver.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({**event, "t": event["t"] + shift}) + "\n" for event in events))
    out = io.StringIO()
    with Terminal(Console(file=out, width=80), "quickstart", tmp_path, EventReader(log.parent)) as terminal:
        pass
    assert terminal.state.status == "failed"
    assert out.getvalue() == ""


def test_plain_failure_has_cause_and_remedy(tmp_path: Path) -> None:
    out = io.StringIO()
    follow(tmp_path, failed_events(), Console(file=out, width=80))
    assert "sft: failed: rank 1 ran out of GPU memory" in out.getvalue()
    assert "remedy: set compute.micro_batch_size" in out.getvalue()


def test_ascii_log_file_gets_its_lines(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as out:
        follow(tmp_path, sample_events(), Console(file=out, width=80))
        out.flush()
        assert b"loss 3.060 ? eval 3.190" in raw.getvalue()


def test_final_state_is_rendered_on_a_terminal(tmp_path: Path) -> None:
    out = io.StringIO()
    follow(tmp_path, sample_events(), Console(file=out, width=100, height=40, force_terminal=True))
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "12 of 12 trials" in output
    assert "domain perplexity" in output


def test_narrow_leaderboard_omits_and_names_columns() -> None:
    trial = "trial-60d5fae2"
    result = {
        "columns": ["trial", "mean of seeds", "eval loss", "forgetting", "learning rate", "schedule", "tokens"],
        "rows": [[trial, "6.6192 ± 0.0023", 6.62, 0.0139, 4.41e-3, "constant", 7_258]],
        "notes": ["best: " + "long words " * 12],
        "optional": ["schedule", "tokens"],
    }
    state = replay([{"t": 1.0, "event": "comparison", **result}])
    wide, narrow = (rendered_lines(final_table(state, width), width) for width in (120, 72))
    assert any("constant" in line and "7,258" in line for line in wide)
    row = next(line for line in narrow if trial in line)
    assert "6.6192 ± 0.0023" in row
    assert "4.41e-3" in row, "a header breaks before a cell is cut"
    assert "constant" not in row
    assert any("columns shown only in the report: schedule, tokens" in line for line in narrow)
    assert max(len(line) for line in narrow if trial in line or "mean" in line) <= 72


def test_replicate_names_its_trial() -> None:
    events = searched_events()
    started = next(i for i, entry in enumerate(events) if entry["event"] == "trial_started" and entry["trial"] == "r01")
    state = replay(events[: started + 1])
    assert any("r01  replicate of t01" in line for line in rendered_lines(render(state, 120, START + 501), 120))
    ended = next(entry for entry in events if entry["event"] == "trial_finished" and entry["trial"] == "r01")
    (line,) = PlainLines(since=0.0).lines(replay([*events[: started + 1], ended]), ended)
    assert "(replicate of t01)" in line


@pytest.mark.parametrize("width", [80, 200])
def test_best_of_a_finished_search_shows_its_mean(width: int) -> None:
    lines = rendered_lines(render(replay(searched_events()), width, START + 602), width)
    assert any("best  3.105 ± 0.012  t00" in line for line in lines)
