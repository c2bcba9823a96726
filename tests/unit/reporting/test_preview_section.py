"""The section of the report with rows as the model reads them, from the preview events of trainings."""

from __future__ import annotations

from typing import Any

from html_page import Page
from sample_run import Event, sample_events

from tunery.events.event_reducer import replay
from tunery.reporting.preview_section import visible
from tunery.reporting.report import report_html

STAGE = "sft"


def record(*segments: list[Any], **values: Any) -> dict[str, Any]:
    sequence = {
        "label": "",
        "num_tokens": 12,
        "num_trained": 4,
        "max_length": 99,
        "blocks": False,
        "truncated": True,
        "cut_tokens": 7,
        "reason": "",
        "notes": ["a note"],
        "segments": list(segments),
    }
    return {"id": "0f", "source": "a.jsonl", "line": 3, "reason": "", "sequences": [{**sequence, **values}]}


def events_with(*records: dict[str, Any]) -> list[Event]:
    events = sample_events()
    started = next(
        index
        for index, event in enumerate(events)
        if event["event"] == "stage_started" and event.get("stage") == STAGE and not event.get("trial")
    )
    result = {"event": "preview", "stage": STAGE, "template": "a response ends with <|end|>", "records": list(records)}
    return [*events[: started + 1], {"t": events[started]["t"] + 0.001, **result}, *events[started + 1 :]]


def section(events: list[Event]) -> str:
    html = report_html(replay(events))
    start = html.find('<section id="previews">')
    return html[start : html.index("</section>", start)] if start >= 0 else ""


def test_report_shows_what_is_trained_masked_special_and_cut_off() -> None:
    html = section(
        events_with(
            record(["masked", "Capital?", 0], ["trained", "Paris.", 0], ["trained", "<|end|>", 1], ["cut", "More", 0])
        )
    )
    for part in (
        '<span class="masked">Capital?</span>',
        '<span class="trained">Paris.</span>',
        '<span class="trained special">&lt;|end|&gt;</span>',
        '<span class="cut">More</span>',
        "a.jsonl:3 12 tokens (max_length 99), 4 trained; truncated by 7 tokens; a note",
        "Chat template: a response ends with &lt;|end|&gt;",
    ):
        assert part in html


def test_report_escapes_user_text_in_previews() -> None:
    html = report_html(replay(events_with(record(["masked", "</span><script>alert(1)</script>\x1b", 0]))))
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert Page(html).open == []


def test_unused_row_has_the_reason() -> None:
    assert "not used: System role not supported" in section(
        events_with(record(num_tokens=0, reason="System role not supported"))
    )


def test_report_without_previews_has_no_preview_section() -> None:
    assert section(sample_events()) == ""


def test_entries_of_unknown_format_are_skipped() -> None:
    assert section(events_with({"sequences": [{"segments": ["unknown", ["trained"], ["unknown", "x", 0]]}]}))
    assert section(events_with({"sequences": "unknown"}))


def test_preview_of_a_reused_stage_is_kept() -> None:
    events = events_with(record(["trained", "Paris.", 0]))
    run_started = next(event for event in events if event["event"] == "run_started")
    later = max(event["t"] for event in events) + 1
    assert "Paris." in section([*events, {**run_started, "t": later}])


def test_preview_of_another_artifact_is_dropped() -> None:
    events = events_with(record(["trained", "Paris.", 0]))
    later = max(event["t"] for event in events) + 1
    started = {"event": "stage_started", "stage": STAGE, "kind": "sft", "fingerprint": "another", "t": later}
    assert section([*events, started]) == ""


def test_control_characters_are_visible() -> None:
    assert visible("a\x1b\r\t\n\x7f\x9b\u202eb👨‍👩") == "a␛␍⇥\t⏎\n␡<U+009B><U+202E>b👨‍👩"
