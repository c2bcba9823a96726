"""The review stage on real artifacts: its rows, its facts, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from openpyxl import load_workbook
from review_bench import BUILTIN, TEXT, ReviewBench, questions, review_bench

from tunery.errors import RequestError, SpecErrors, StageError, StoreError
from tunery.events.event_log import read_events
from tunery.events.event_reducer import replay
from tunery.events.stage_summary import outcome
from tunery.pipeline.plan import make_plan
from tunery.pipeline.review_command import find_review, write_review
from tunery.pipeline.validate import validate, waiting
from tunery.reporting.report import report_html
from tunery.reporting.review_section import reviews
from tunery.reporting.summary_tables import filter_table, review_table
from tunery.review.filter_results import REVIEWED_COLUMNS, read_filter_results
from tunery.spec import load
from tunery.store import StageContext
from tunery.store.rows import Row, read_rows


@pytest.fixture
def bench(tmp_path: Path) -> ReviewBench:
    """40 rows with the scores 1 to 40, of which the filter keeps 20."""
    return review_bench(tmp_path, questions(40))


def ids_of(bench: ReviewBench) -> list[str]:
    """In the order of the scores."""
    return [row["id"] for row in read_rows(bench.make("scored")["scored"].path, ["id"])]


def drawn(bench: ReviewBench) -> list[str]:
    bench.make("clean")
    experiment, source = bench.load()
    return [item.id for item in find_review(experiment, source, bench.store, "checked").rows]


# Rows.


def test_decision_of_a_person_beats_the_filter_and_all_other_rows_stay_as_they_were(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    bench.decide({ids[19]: "drop", ids[20]: "keep", ids[0]: "keep", ids[39]: "drop"})
    made = bench.make("checked")["checked"]
    assert [row["id"] for row in read_rows(made.path)] == [*ids[:19], ids[20]], "in the order they came in"
    dropped = [json.loads(line) for line in (made.path / "dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["rule"]) for line in dropped] == [
        (id, "review" if id in (ids[19], ids[39]) else "perplexity keep_fraction 0.5") for id in [ids[19], *ids[21:]]
    ]
    facts = made.facts
    assert (facts["rows_in"], facts["rows"], facts["kept"], facts["dropped"]) == (40, 20, 20, 20)
    assert (facts["restored"], facts["removed"]) == (1, 1)
    assert facts["agreement"]["reviewed"] == 4
    assert facts["agreement"]["share"] == 0.5


def test_decision_counts_for_all_copies_of_a_row(tmp_path: Path) -> None:
    bench = review_bench(tmp_path, [*questions(4), *questions(4)])
    ids = ids_of(bench)
    assert ids[:4] == ids[4:]
    bench.decide({ids[0]: "drop", ids[1]: "keep"})
    made = bench.make("checked")["checked"]
    assert [row["id"] for row in read_rows(made.path)] == [ids[1], ids[2], ids[3], ids[1]]
    assert made.facts["agreement"]["reviewed"] == 2


def test_workbook_and_lines_give_the_same_rows(bench: ReviewBench) -> None:
    ids = drawn(bench)
    experiment, source = bench.load()
    pending = find_review(experiment, source, bench.store, "checked")
    said: list[str] = []
    write_review(pending, bench.folder / "w.xlsx", show_filter=False, say=said.append)
    assert "write `decisions: w.xlsx` in the stage `checked`" in said[1]
    book = load_workbook(bench.folder / "w.xlsx")
    column = [cell.value for cell in book["review"][1]].index("decision") + 1
    wanted = {id: "keep" if place % 3 else "drop" for place, id in enumerate(ids)}
    for place in range(len(ids)):
        book["review"].cell(place + 2, column).value = wanted[book["review"].cell(place + 2, 1).value]
    book.save(bench.folder / "w.xlsx")
    bench.decide(wanted)
    by_lines = bench.make("checked")["checked"]
    bench.file.write_text(bench.file.read_text().replace("decisions/checked.jsonl", "w.xlsx"))
    by_workbook = bench.make("checked")["checked"]
    assert by_workbook.path != by_lines.path
    assert by_workbook.manifest["facts"] == by_lines.manifest["facts"]
    assert list(read_rows(by_workbook.path)) == list(read_rows(by_lines.path))


def test_workbook_that_is_there_is_not_overwritten(bench: ReviewBench) -> None:
    bench.make("clean")
    experiment, source = bench.load()
    pending = find_review(experiment, source, bench.store, "checked")
    (bench.folder / "w.xlsx").write_text("precious")
    with pytest.raises(RequestError, match="is there already"):
        write_review(pending, bench.folder / "w.xlsx", show_filter=False, say=print)
    with pytest.raises(RequestError, match="no name for a workbook"):
        write_review(pending, bench.folder / "w.csv", show_filter=False, say=print)


# Facts.


def test_threshold_that_agrees_best_is_where_the_person_cuts(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    asked = drawn(bench)
    bench.decide({id: "keep" if ids.index(id) < 24 else "drop" for id in asked})  # scores up to 24
    facts = bench.make("checked")["checked"].facts
    (found,) = facts["thresholds"]
    assert (found["score"], found["cut"]) == ("perplexity", 20.0)
    below = max(ids.index(id) + 1 for id in asked if ids.index(id) < 24)
    above = min(ids.index(id) + 1 for id in asked if ids.index(id) >= 24)
    assert below <= found["threshold"] < above
    assert found["agreement"] == 1.0
    wrong = sum(20 <= ids.index(id) < 24 for id in asked)
    assert found["agreement_at_cut"] == facts["agreement"]["share"] == pytest.approx(1 - wrong / len(asked))
    assert (facts["asked"], facts["answered"]) == (12, 12)


def test_strata_tell_where_the_filter_errs(bench: ReviewBench) -> None:
    bench.decide(dict.fromkeys(drawn(bench), "keep"))
    strata = bench.make("checked")["checked"].facts["strata"]
    assert [stratum["name"] for stratum in strata] == [
        f"{side}, {band}" for side in ("kept", "dropped") for band in ("nearest", "near", "farther")
    ]
    assert [stratum["agreement"] for stratum in strata] == [1.0] * 3 + [0.0] * 3
    assert all(stratum["answered"] == stratum["asked"] == 2 for stratum in strata)


def test_decided_rows_outside_the_sample_and_decisions_about_other_rows_are_counted(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    outside = next(id for id in ids if id not in drawn(bench))
    bench.decide({outside: "keep", "0" * 16: "drop"})
    facts = bench.make("checked")["checked"].facts
    assert (facts["agreement"]["reviewed"], facts["answered"], facts["decisions_about_other_rows"]) == (1, 0, 1)


def test_rows_without_a_score_can_be_reviewed(tmp_path: Path) -> None:
    bench = review_bench(tmp_path, questions(8), lambda index, row: math.nan if index > 5 else float(index))
    ids = ids_of(bench)
    assert set(drawn(bench)) == set(ids)
    bench.decide(dict.fromkeys(ids, "keep"))
    facts = bench.make("checked")["checked"].facts
    assert facts["kept"] == 8
    assert facts["thresholds"][0]["agreement"] == 6 / 8
    assert json.dumps(facts, allow_nan=False)


def test_planted_damage_is_judged_afterwards_and_never_shown(tmp_path: Path) -> None:
    bench = review_bench(tmp_path, BUILTIN, lambda index, row: float(index * 37 % 120))
    bench.make("clean")
    experiment, source = bench.load()
    pending = find_review(experiment, source, bench.store, "checked")
    for item in pending.rows:
        assert item.row.keys() == set(REVIEWED_COLUMNS) == {"id", "text", "messages", "rejected"}
    damaged = {row["id"] for row in read_rows(bench.make("scored")["scored"].path) if row["planted"]}
    bench.decide({item.id: "drop" if item.id in damaged else "keep" for item in pending.rows})
    made = bench.make("clean", "checked")
    before, after = made["clean"].facts["planted"], made["checked"].facts["planted"]
    assert after["total"] == before["total"] == len(damaged)
    assert after["dropped"] == before["dropped"] + sum(
        item.id in damaged and item.outcome.keep for item in pending.rows
    )
    assert [row[0] for row in filter_table(experiment, made)["rows"]][::2] == ["clean", "checked"]  # type: ignore[index]


# What stops it.


def test_without_decisions_the_run_stops_there_and_says_which_command_to_give(bench: ReviewBench) -> None:
    with pytest.raises(StageError, match="nobody has decided") as caught:
        bench.make("checked")
    assert f"tunery review {bench.file} checked --store {bench.store.root}" in caught.value.remedy
    assert "no decisions in decisions/checked.jsonl yet" in caught.value.cause
    assert bench.store.find("select", bench.make("clean")["clean"].fingerprint)


def test_decisions_about_other_rows_alone_are_no_review(bench: ReviewBench) -> None:
    bench.decide({"0" * 16: "keep"})
    with pytest.raises(StageError, match="nobody has decided") as caught:
        bench.make("checked")
    assert "about other rows" in caught.value.cause


def test_review_that_drops_every_row_is_told(tmp_path: Path) -> None:
    bench = review_bench(tmp_path, questions(4))
    bench.decide(dict.fromkeys(ids_of(bench), "drop"))
    with pytest.raises(StageError, match="no row of 4 is left"):
        bench.make("checked")


def test_decisions_that_change_while_a_run_goes_on_are_not_used_under_the_old_fingerprint(
    bench: ReviewBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(bench)
    bench.decide({ids[0]: "keep"})
    from tunery.review import review_stage as module

    whole = module.run_review

    def later(context: StageContext) -> object:
        bench.decide({ids[1]: "keep"})
        return whole(context)

    monkeypatch.setattr(module, "run_review", later)
    with pytest.raises(StageError, match="has changed since this run began"):
        bench.make("checked")


def test_more_decisions_make_the_review_anew_and_nothing_before_it(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    bench.decide({ids[0]: "keep"})
    one = bench.make("checked")
    bench.decide({ids[1]: "drop"})
    other = bench.make("checked")
    assert {name for name in one if one[name].path != other[name].path} == {"checked"}
    bench.decide({ids[1]: None})
    assert bench.make("checked")["checked"].path == one["checked"].path


def test_scored_rows_that_were_removed_are_told(bench: ReviewBench) -> None:
    made = bench.make("clean")
    made["scored"].path.rename(bench.folder / "gone")
    with pytest.raises(StoreError, match="no longer exists"):
        read_filter_results(made["clean"])


def test_selection_that_its_rules_do_not_give_is_told(bench: ReviewBench) -> None:
    made = bench.make("clean")
    manifest = json.loads((made["clean"].path / "manifest.json").read_text())
    manifest["identity"]["keep"] = {"perplexity": {"keep_fraction": 0.25}}
    made["clean"].manifest.update(manifest)
    with pytest.raises(StoreError, match="doesn't hold the rows"):
        read_filter_results(made["clean"])


# The command, before anything is served.


def test_review_of_rows_that_are_not_selected_yet_says_what_to_run(bench: ReviewBench) -> None:
    experiment, source = bench.load()
    with pytest.raises(RequestError, match="`clean` aren't selected yet") as caught:
        find_review(experiment, source, bench.store, "checked")
    assert f"tunery run {bench.file}" in caught.value.remedy


@pytest.mark.parametrize(("name", "words"), [("chekced", "did you mean `checked`"), ("clean", "it is a select stage")])
def test_review_of_another_stage_is_refused(name: str, words: str, bench: ReviewBench) -> None:
    experiment, source = bench.load()
    with pytest.raises(RequestError, match=f"`{name}` is no review stage") as caught:
        find_review(experiment, source, bench.store, name)
    assert words in str(caught.value)


def test_sample_can_be_drawn_while_the_file_of_decisions_is_broken_elsewhere(bench: ReviewBench) -> None:
    # Only what the selection needs is looked at: not this stage's decisions, nor another's.
    bench.make("clean")
    experiment, source = bench.load()
    bench.decisions.parent.mkdir()
    bench.decisions.write_text("nonsense\n")
    assert len(find_review(experiment, source, bench.store, "checked").rows) == 12


# Checks and plans.


def test_missing_decisions_are_no_mistake_but_are_said(bench: ReviewBench) -> None:
    experiment, source = bench.load()
    validate(experiment, source, bench.store, 1, 1)
    (note,) = waiting(experiment, source)
    assert "`checked` waits for decisions, there are none in decisions/checked.jsonl yet" in note
    assert f"tunery review {bench.file} checked" in note
    assert make_plan(experiment, source, bench.store).notes == [note]
    bench.decide({"a": "keep"})
    assert waiting(experiment, source) == []


def test_bad_decisions_are_told_with_the_line_of_the_experiment(bench: ReviewBench) -> None:
    bench.decisions.parent.mkdir()
    bench.decisions.write_text('{"id": "a", "decision": "perhaps"}\n')
    experiment, source = bench.load()
    with pytest.raises(SpecErrors) as caught:
        validate(experiment, source, bench.store, 1, 1)
    assert f"{bench.file}:9: checked: {bench.decisions}:1: " in str(caught.value)


def test_ending_and_kind_of_data_are_checked_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "x.yaml"
    path.write_text((TEXT % "rows.jsonl").replace("checked.jsonl", "checked.csv"))
    with pytest.raises(SpecErrors, match=r"x.yaml:9: `stages.checked.decisions` can't be .*csv") as caught:
        load(path)
    assert "it must end in .jsonl or .xlsx" in str(caught.value)
    path.write_text((TEXT % "rows.jsonl").replace("data: clean", "data: scored"))
    with pytest.raises(SpecErrors, match=r"`checked\.data` needs selected rows, but `scored` is") as caught:
        load(path)
    assert "matching stages: clean" in str(caught.value)


def test_plan_counts_a_reviews_rows_and_says_that_decisions_changed(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    bench.decide({ids[0]: "keep"})
    bench.make("checked")
    bench.decide({ids[1]: "drop"})
    experiment, source = bench.load()
    planned = {stage.name: stage for stage in make_plan(experiment, source, bench.store).stages}
    assert planned["clean"].reused
    assert not planned["checked"].reused
    assert planned["checked"].why.startswith("content ")
    assert planned["checked"].rows == 20


# What is told of it.


def test_report_terminal_and_comparison_tell_agreement_and_threshold(bench: ReviewBench) -> None:
    ids = ids_of(bench)
    bench.decide({id: "keep" if ids.index(id) < 24 else "drop" for id in drawn(bench)[:10]})
    made = bench.make("clean", "checked")
    experiment, _ = bench.load()
    agreed = made["checked"].facts["agreement"]["share"]
    found = review_table(experiment, made)
    assert found is not None
    assert found["rows"][0][:3] == ["clean in checked", "10", agreed]
    assert len(found["columns"]) == len(found["rows"][0])
    assert any("2 rows are not reviewed yet" in note for note in found["notes"])
    state = replay(read_events(bench.where.events))
    assert outcome(state.stages["checked"]).startswith(f"agrees on {agreed:.0%} of 10 reviewed")
    ((name, (tables, strata)),) = reviews(state)
    assert name == "checked"
    assert tables[0].rows[0][0].text == "filter kept"
    assert "kappa" in tables[0].notes[0]
    assert tables[1].rows[0][0].text == "perplexity"
    assert len(strata[0].rows) == 6
    page = report_html(state)
    assert "Review near the threshold" in page
    assert "best threshold" in page


def test_what_is_shown_of_a_row_is_its_turns_with_what_is_judged_marked(tmp_path: Path) -> None:
    lines = [{"text": "t"}, {"question": "q", "answer": "a"}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
    bench = review_bench(tmp_path, lines)
    bench.make("clean")
    experiment, source = bench.load()
    rows: dict[str, Row] = {}
    for item in find_review(experiment, source, bench.store, "checked").rows:
        rows[item.messages[0]["content"]] = {turn["role"]: turn["judged"] for turn in item.messages}
    assert rows == {
        "t": {"text": True},
        "q": {"user": False, "assistant": True},
        "p": {"user": False, "assistant": True, "rejected assistant": True},
    }


@pytest.mark.parametrize(
    "rules",
    [
        "keep: {perplexity: {range: [20, 90]}}",
        "keep: {perplexity: {top_k: 30}, random: {keep_fraction: 0.5}}",
        "keep: {perplexity: {top_k: 30}, random: {keep_fraction: 0.5}}, combine: any",
        "keep: {perplexity: {match_count_of: few}}",
        "keep: {perplexity: {threshold: 60, prefer: high}}, quota: {group_by: source, rows: 11, by: random}",
    ],
)
def test_every_kind_of_rule_can_be_reviewed(rules: str, tmp_path: Path) -> None:
    text = TEXT.replace("keep: {perplexity: {keep_fraction: 0.5}}", rules)
    text += "  few: {kind: select, data: scored, keep: {random: {top_k: 17}}}\n"
    bench = review_bench(tmp_path, questions(120), text=text)
    filtered = read_filter_results(bench.make("clean")["clean"])
    kept = [id for id, keep in zip(filtered.ids, filtered.kept, strict=True) if keep]
    assert kept == [row["id"] for row in read_rows(bench.make("clean")["clean"].path)]
    assert 0 < len(kept) < 120
    assert ((filtered.distance < 0) == filtered.kept).all()
    asked = drawn(bench)
    bench.decide(dict.fromkeys(asked, "keep"))
    facts = bench.make("checked")["checked"].facts
    assert facts["kept"] == len({*kept, *asked})
