"""Review of a sample: the command, its page in a real browser, and the run that uses the decisions.

The scores are given (tests/support/review_workspace.py), so nothing is trained and Ray is not started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import CHROMIUM, Chromium, Page
from review_workspace import BUILTIN, ReviewWorkspace, questions, review_workspace

from tunery.review.decisions import read_decisions
from tunery.store.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "WANDB_MODE": "disabled", "COLUMNS": "120"}
HOSTILE = [
    {"question": "<script>window.ran = 1; document.title = 'ran'</script>", "answer": "<img src=x onerror='ran = 2'>"},
    {"messages": [{"role": "user", "content": "</div><b>q</b>"}, {"role": "assistant", "content": "a\u202eb\u0000c"}]},
    {"text": "javascript:alert(1) " + "long " * 10_000},
    {"prompt": "p", "chosen": "c", "rejected": "<svg onload='ran = 3'>"},
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")


def tunery(workspace: ReviewWorkspace, *words: str) -> list[str]:
    return [sys.executable, "-m", "tunery", *words, "--store", str(workspace.store.root)]


def run(workspace: ReviewWorkspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        tunery(workspace, *words), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=workspace.folder
    )


@contextmanager
def reviewing(workspace: ReviewWorkspace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `tunery review` in the background; yields the address that it prints, and the process."""
    process = subprocess.Popen(
        tunery(workspace, "review", str(workspace.file), "checked", "--no-browser"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workspace.folder,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not any("http://" in line for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr and process.stderr.read()
        actual = re.search(r"http://\S+", lines[-1])
        assert actual
        yield actual.group(), process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def decide(url: str, id: str, decision: str) -> None:
    body = json.dumps({"id": id, "decision": decision}).encode()
    request = urllib.request.Request(f"{url}decide", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 200


def ids_at(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}state", timeout=10) as response:
        return list(json.load(response)["ids"])


def test_filter_is_reviewed_and_used_end_to_end(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, BUILTIN, lambda index, row: float(10 + index * 37 % 120))
    early = run(workspace, "review", str(workspace.file), "checked")
    assert early.returncode == 2
    assert "`clean` aren't selected yet" in early.stderr

    valid = run(workspace, "validate", str(workspace.file))
    assert valid.returncode == 0
    assert "note: `checked` needs decisions" in valid.stdout

    stopped = run(workspace, "run", str(workspace.file))
    assert stopped.returncode == 1
    command = f"tunery review {workspace.file} checked --store {workspace.store.root}"
    assert command in stopped.stderr.replace("\n", " ")

    with reviewing(workspace) as (url, process):
        ids = ids_at(url)
        for id in ids[:4]:
            decide(url, id, "keep")
        process.kill()  # SIGKILL: the decisions must already be on disk
    assert read_decisions(workspace.decisions) == dict.fromkeys(ids[:4], "keep")

    with reviewing(workspace) as (url, process):
        assert ids_at(url) == ids, "the same sample"
        for id in ids[4:]:
            decide(url, id, "drop")
        process.send_signal(signal.SIGINT)
        rest, wrong = process.communicate(timeout=20)
    assert (process.returncode, wrong) == (0, "")
    assert "12 of 12 rows are decided" in rest
    assert f"to use the decisions: tunery run {workspace.file}" in rest

    done = run(workspace, "run", str(workspace.file))
    assert done.returncode == 0, done.stderr
    assert "Agreement of filter and reviewer" in done.stdout
    (built,) = (workspace.store.root / "artifacts").glob("review-*")
    kept = {row["id"] for row in read_rows(built)}
    assert set(ids[:4]) <= kept
    assert not set(ids[4:]) & kept
    report = (workspace.store.run("small") / "report.html").read_text()
    assert "Review near the threshold" in report


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def workspace(tmp_path: Path) -> ReviewWorkspace:
    built = review_workspace(tmp_path, questions(40))
    built.build("clean")
    return built


def opened(chromium: Chromium, url: str) -> Page:
    page = chromium.open(url)
    page.wait("document.querySelector('#row .message')")
    return page


def decided(page: Page, count: int) -> None:
    """Wait until the page shows `count` decisions and is not busy; a key pressed earlier would have no effect."""
    page.wait(f"document.querySelector('#count').innerText.startsWith('{count} of')")
    page.wait("document.body.ariaBusy === 'false'")


def shown(page: Page) -> str:
    return str(page.run("displayedId"))


@needs_chromium
def test_keys_keep_drop_undo_and_move(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        ids = ids_at(url)
        assert page.text("#count") == "0 of 12 decided · 12 left"
        assert shown(page) == ids[0]
        assert "What is" in page.text("#row")
        assert "perplexity" not in page.text("body"), "the score leads nobody"

        page.press("k")
        decided(page, 1)
        assert read_decisions(workspace.decisions) == {ids[0]: "keep"}
        assert shown(page) == ids[1]
        assert page.text("#outcome").startswith("Last row: you kept it, the filter ")
        assert "perplexity" in page.text("#outcome")
        page.press("d")
        decided(page, 2)
        assert read_decisions(workspace.decisions) == {ids[0]: "keep", ids[1]: "drop"}
        assert page.run("document.querySelector('#bar').getAttribute('aria-valuenow')") == "2"

        page.press("u")
        decided(page, 1)
        assert (shown(page), read_decisions(workspace.decisions)) == (ids[1], {ids[0]: "keep"})

        page.press("ArrowLeft")
        page.wait(f"displayedId === '{ids[0]}' && document.body.ariaBusy === 'false'")
        assert page.run("document.querySelector('#keep').getAttribute('aria-pressed')") == "true"
        page.press("d")  # changes the decision
        page.wait(f"displayedId === '{ids[1]}' && document.body.ariaBusy === 'false'")
        assert read_decisions(workspace.decisions) == {ids[0]: "drop"}
        page.press("ArrowRight")
        page.wait(f"displayedId === '{ids[2]}'")
        assert len(read_decisions(workspace.decisions)) == 1, "moving decides nothing"
        assert page.errors == []
        assert {address.startswith(url) for address in page.requested} == {True}
        page.close()


@needs_chromium
def test_reload_and_new_server_continue_the_review(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        ids = ids_at(url)
        for count, key in enumerate("kdk", 1):
            page.press(key)
            decided(page, count)
        page.reload()
        decided(page, 3)
        assert shown(page) == ids[3]
        page.press("u")
        decided(page, 2)
        assert shown(page) == ids[2], "undo reaches back over the reload"
        page.close()
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        decided(page, 2)
        assert shown(page) == ids[2]
        page.press("u")
        decided(page, 1)
        assert shown(page) == ids[1], "and over a new server"
        page.close()


@needs_chromium
def test_last_row_shows_the_next_command(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        for count in range(1, 13):
            page.press("k" if count % 3 else "d")
            decided(page, count)
        page.wait("!document.querySelector('#finished').hidden")
        text = page.text("#finished")
        assert "All 12 rows are decided." in text
        assert "8 kept, 4 dropped." in text
        assert re.search(r"You and the filter agree on \d+ of 12 \(\d+%\)\.", text)
        assert f"tunery run {workspace.file} --store {workspace.store.root}" in text
        page.press("k")
        page.press("u")
        decided(page, 11)
        assert page.run("document.querySelector('#finished').hidden")
        assert len(read_decisions(workspace.decisions)) == 11
        page.close()


@needs_chromium
def test_two_tabs_share_one_review(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        one, other = opened(chromium, url), opened(chromium, url)
        ids = ids_at(url)
        one.bring_to_front()
        one.press("k")
        decided(one, 1)
        other.bring_to_front()
        other.run("window.dispatchEvent(new Event('focus'))")  # all tabs of a headless browser have the focus
        decided(other, 1)
        other.press("ArrowRight")
        other.wait(f"displayedId === '{ids[1]}' && document.body.ariaBusy === 'false'")
        other.press("d")
        decided(other, 2)
        assert read_decisions(workspace.decisions) == {ids[0]: "keep", ids[1]: "drop"}
        one.close()
        other.close()


@needs_chromium
def test_help_dialog_blocks_decision_keys(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        page.press("?")
        page.wait("document.querySelector('dialog').open")
        page.press("k")
        page.press("Escape")
        page.wait("!document.querySelector('dialog').open")
        assert read_decisions(workspace.decisions) == {}
        page.click("#drop")
        decided(page, 1)
        page.press(" ")  # scrolls; it must not press the button that was clicked before
        time.sleep(0.2)
        assert list(read_decisions(workspace.decisions).values()) == ["drop"]
        page.close()


@needs_chromium
def test_server_that_ended_is_told_and_no_decision_is_shown_as_saved(
    chromium: Chromium, workspace: ReviewWorkspace
) -> None:
    with reviewing(workspace) as (url, process):
        page = opened(chromium, url)
        process.send_signal(signal.SIGINT)
        process.wait(20)
        page.press("k")
        page.wait("!document.querySelector('#problem').hidden")
        assert "server has stopped" in page.text("#problem")
        assert page.text("#count").startswith("0 of 12")
        page.close()


@needs_chromium
def test_hostile_rows_are_text_and_fit_the_page(chromium: Chromium, tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, HOSTILE)
    workspace.build("clean")
    with reviewing(workspace) as (url, _):
        page = opened(chromium, url)
        for width, dark in ((1600, False), (360, True)):
            page.resize(width, 740, dark=dark)
            observed = ""
            for index in range(len(HOSTILE)):
                page.wait(
                    f"position === {index} && displayedId === state.ids[{index}] && document.body.ariaBusy === 'false'"
                )
                assert page.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
                assert page.run("document.querySelectorAll('#row script, #row img, #row svg, #row b').length") == 0
                page.press("e")
                observed += page.text("#row")
                page.press("ArrowRight")
            for text in ("<script>window.ran = 1", "<img src=x onerror", "</div><b>q</b>", "<svg onload", "U+202E"):
                assert text in observed
            assert observed.count("long ") > 9_000
            page.reload()
            page.wait("document.querySelector('#row .message')")
        assert page.run("window.ran") is None
        assert page.errors == []
        page.close()


@needs_chromium
def test_page_without_its_token_has_no_content(chromium: Chromium, workspace: ReviewWorkspace) -> None:
    with reviewing(workspace) as (url, _):
        page = chromium.open(f"{url.rsplit('/', 2)[0]}/guess/")
        assert "has no valid token" in page.text("body")
        assert "What is" not in page.text("body")
        page.close()
