"""The review stage on real artifacts: its rows, its facts, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from openpyxl import load_workbook
from review_workspace import BUILTIN, TEXT, ReviewWorkspace, questions, review_workspace

from tunery.errors import RequestError, SpecErrors, StageError, StoreError
from tunery.events.event_log import read_events
from tunery.events.event_reducer import replay
from tunery.events.stage_summary import outcome
from tunery.pipeline.plan import make_plan
from tunery.pipeline.review_command import find_review, write_review
from tunery.pipeline.validate import pending_reviews, validate
from tunery.reporting.filter_tables import filter_table, review_table
from tunery.reporting.report import report_html
from tunery.reporting.review_section import reviews
from tunery.review.filter_results import REVIEWED_COLUMNS, read_filter_results
from tunery.spec import load
from tunery.store import StageContext
from tunery.store.rows import Row, read_rows


@pytest.fixture
def workspace(tmp_path: Path) -> ReviewWorkspace:
    """40 rows with scores 1 to 40, of which the filter keeps 20."""
    return review_workspace(tmp_path, questions(40))


def ids_of(workspace: ReviewWorkspace) -> list[str]:
    """Return the row ids in the order of the scores."""
    return [row["id"] for row in read_rows(workspace.build("scored")["scored"].path, ["id"])]


def sampled_ids(workspace: ReviewWorkspace) -> list[str]:
    workspace.build("clean")
    experiment, source = workspace.load()
    return [item.id for item in find_review(experiment, source, workspace.store, "checked").rows]


# Rows.


def test_decisions_override_the_filter_and_other_rows_are_unchanged(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    workspace.decide({ids[19]: "drop", ids[20]: "keep", ids[0]: "keep", ids[39]: "drop"})
    artifact = workspace.build("checked")["checked"]
    assert [row["id"] for row in read_rows(artifact.path)] == [*ids[:19], ids[20]], "in input order"
    dropped = [json.loads(line) for line in (artifact.path / "dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["rule"]) for line in dropped] == [
        (id, "review" if id in (ids[19], ids[39]) else "perplexity keep_fraction 0.5") for id in [ids[19], *ids[21:]]
    ]
    facts = artifact.facts
    assert (facts["rows_in"], facts["rows"], facts["kept"], facts["dropped"]) == (40, 20, 20, 20)
    assert (facts["restored"], facts["removed"]) == (1, 1)
    assert facts["agreement"]["reviewed"] == 4
    assert facts["agreement"]["share"] == 0.5


def test_decision_applies_to_all_copies_of_a_row(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, [*questions(4), *questions(4)])
    ids = ids_of(workspace)
    assert ids[:4] == ids[4:]
    workspace.decide({ids[0]: "drop", ids[1]: "keep"})
    artifact = workspace.build("checked")["checked"]
    assert [row["id"] for row in read_rows(artifact.path)] == [ids[1], ids[2], ids[3], ids[1]]
    assert artifact.facts["agreement"]["reviewed"] == 2


def test_workbook_and_lines_give_the_same_rows(workspace: ReviewWorkspace) -> None:
    ids = sampled_ids(workspace)
    experiment, source = workspace.load()
    pending = find_review(experiment, source, workspace.store, "checked")
    lines: list[str] = []
    write_review(pending, workspace.folder / "w.xlsx", show_filter=False, print_line=lines.append)
    assert "write `decisions: w.xlsx` in the stage `checked`" in lines[1]
    book = load_workbook(workspace.folder / "w.xlsx")
    column = [cell.value for cell in book["review"][1]].index("decision") + 1
    decisions = {id: "keep" if index % 3 else "drop" for index, id in enumerate(ids)}
    for index in range(len(ids)):
        book["review"].cell(index + 2, column).value = decisions[book["review"].cell(index + 2, 1).value]
    book.save(workspace.folder / "w.xlsx")
    workspace.decide(decisions)
    by_lines = workspace.build("checked")["checked"]
    workspace.file.write_text(workspace.file.read_text().replace("decisions/checked.jsonl", "w.xlsx"))
    by_workbook = workspace.build("checked")["checked"]
    assert by_workbook.path != by_lines.path
    assert by_workbook.manifest["facts"] == by_lines.manifest["facts"]
    assert list(read_rows(by_workbook.path)) == list(read_rows(by_lines.path))


def test_existing_workbook_is_not_overwritten(workspace: ReviewWorkspace) -> None:
    workspace.build("clean")
    experiment, source = workspace.load()
    pending = find_review(experiment, source, workspace.store, "checked")
    (workspace.folder / "w.xlsx").write_text("existing")
    with pytest.raises(RequestError, match="exists"):
        write_review(pending, workspace.folder / "w.xlsx", show_filter=False, print_line=print)
    with pytest.raises(RequestError, match="is not a workbook's file name"):
        write_review(pending, workspace.folder / "w.csv", show_filter=False, print_line=print)


# Facts.


def test_best_threshold_separates_the_decisions(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    sampled = sampled_ids(workspace)
    workspace.decide({id: "keep" if ids.index(id) < 24 else "drop" for id in sampled})  # scores up to 24
    facts = workspace.build("checked")["checked"].facts
    (actual,) = facts["thresholds"]
    assert (actual["score"], actual["current_threshold"]) == ("perplexity", 20.0)
    below = max(ids.index(id) + 1 for id in sampled if ids.index(id) < 24)
    above = min(ids.index(id) + 1 for id in sampled if ids.index(id) >= 24)
    assert below <= actual["threshold"] < above
    assert actual["agreement"] == 1.0
    disagreements = sum(20 <= ids.index(id) < 24 for id in sampled)
    assert actual["current_agreement"] == facts["agreement"]["share"] == pytest.approx(1 - disagreements / len(sampled))
    assert (facts["sampled"], facts["sampled_decided"]) == (12, 12)


def test_strata_have_the_agreement_of_each_side_and_band(workspace: ReviewWorkspace) -> None:
    workspace.decide(dict.fromkeys(sampled_ids(workspace), "keep"))
    strata = workspace.build("checked")["checked"].facts["strata"]
    assert [stratum["name"] for stratum in strata] == [
        f"{side}, {band}" for side in ("kept", "dropped") for band in ("nearest", "near", "farther")
    ]
    assert [stratum["agreement"] for stratum in strata] == [1.0] * 3 + [0.0] * 3
    assert all(stratum["decided"] == stratum["sampled"] == 2 for stratum in strata)


def test_decisions_on_unsampled_and_unknown_rows_are_counted(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    outside = next(id for id in ids if id not in sampled_ids(workspace))
    workspace.decide({outside: "keep", "0" * 16: "drop"})
    facts = workspace.build("checked")["checked"].facts
    assert (facts["agreement"]["reviewed"], facts["sampled_decided"], facts["decisions_about_other_rows"]) == (1, 0, 1)


def test_rows_without_a_score_can_be_reviewed(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, questions(8), lambda index, row: math.nan if index > 5 else float(index))
    ids = ids_of(workspace)
    assert set(sampled_ids(workspace)) == set(ids)
    workspace.decide(dict.fromkeys(ids, "keep"))
    facts = workspace.build("checked")["checked"].facts
    assert facts["kept"] == 8
    assert facts["thresholds"][0]["agreement"] == 6 / 8
    assert json.dumps(facts, allow_nan=False)


def test_injected_corruption_is_evaluated_but_not_shown_to_the_reviewer(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, BUILTIN, lambda index, row: float(index * 37 % 120))
    workspace.build("clean")
    experiment, source = workspace.load()
    pending = find_review(experiment, source, workspace.store, "checked")
    for item in pending.rows:
        assert item.row.keys() == set(REVIEWED_COLUMNS) == {"id", "text", "messages", "rejected"}
    corrupted = {row["id"] for row in read_rows(workspace.build("scored")["scored"].path) if row["injected_corruption"]}
    workspace.decide({item.id: "drop" if item.id in corrupted else "keep" for item in pending.rows})
    artifacts = workspace.build("clean", "checked")
    before, after = artifacts["clean"].facts["injected_corruption"], artifacts["checked"].facts["injected_corruption"]
    assert after["total"] == before["total"] == len(corrupted)
    assert after["dropped"] == before["dropped"] + sum(
        item.id in corrupted and item.outcome.keep for item in pending.rows
    )
    assert [row[0] for row in filter_table(experiment, artifacts)["rows"]][::2] == ["clean", "checked"]  # type: ignore[index]


# Errors.


def test_run_without_decisions_stops_with_the_review_command(workspace: ReviewWorkspace) -> None:
    with pytest.raises(StageError, match="none of its 12 sampled rows has a decision") as caught:
        workspace.build("checked")
    assert f"tunery review {workspace.file} checked --store {workspace.store.root}" in caught.value.remedy
    assert "no decisions in decisions/checked.jsonl yet" in caught.value.cause
    assert workspace.store.find("select", workspace.build("clean")["clean"].fingerprint)


def test_decisions_on_unknown_rows_only_are_an_error(workspace: ReviewWorkspace) -> None:
    workspace.decide({"0" * 16: "keep"})
    with pytest.raises(StageError, match="none of its 12 sampled rows has a decision") as caught:
        workspace.build("checked")
    assert "for rows that are not in" in caught.value.cause


def test_review_that_drops_every_row_is_an_error(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, questions(4))
    workspace.decide(dict.fromkeys(ids_of(workspace), "drop"))
    with pytest.raises(StageError, match="no row of 4 is left"):
        workspace.build("checked")


def test_decisions_changed_during_a_run_are_not_used_with_the_old_fingerprint(
    workspace: ReviewWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(workspace)
    workspace.decide({ids[0]: "keep"})
    from tunery.review import review_stage as module

    run_review = module.run_review

    def decide_and_run(context: StageContext) -> object:
        workspace.decide({ids[1]: "keep"})
        return run_review(context)

    monkeypatch.setattr(module, "run_review", decide_and_run)
    with pytest.raises(StageError, match="has changed since this run began"):
        workspace.build("checked")


def test_new_decisions_rebuild_only_the_review(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    workspace.decide({ids[0]: "keep"})
    before = workspace.build("checked")
    workspace.decide({ids[1]: "drop"})
    after = workspace.build("checked")
    assert {name for name in before if before[name].path != after[name].path} == {"checked"}
    workspace.decide({ids[1]: None})
    assert workspace.build("checked")["checked"].path == before["checked"].path


def test_removed_scored_rows_are_reported(workspace: ReviewWorkspace) -> None:
    artifacts = workspace.build("clean")
    artifacts["scored"].path.rename(workspace.folder / "removed")
    with pytest.raises(StoreError, match="no longer exists"):
        read_filter_results(artifacts["clean"])


def test_selection_inconsistent_with_its_rules_is_reported(workspace: ReviewWorkspace) -> None:
    artifacts = workspace.build("clean")
    manifest = json.loads((artifacts["clean"].path / "manifest.json").read_text())
    manifest["identity"]["keep"] = {"perplexity": {"keep_fraction": 0.25}}
    artifacts["clean"].manifest.update(manifest)
    with pytest.raises(StoreError, match="does not have the rows"):
        read_filter_results(artifacts["clean"])


# The command, before the server starts.


def test_review_of_unselected_rows_names_the_command_to_run(workspace: ReviewWorkspace) -> None:
    experiment, source = workspace.load()
    with pytest.raises(RequestError, match="`clean` aren't selected yet") as caught:
        find_review(experiment, source, workspace.store, "checked")
    assert f"tunery run {workspace.file}" in caught.value.remedy


@pytest.mark.parametrize(("name", "words"), [("chekced", "did you mean `checked`"), ("clean", "it is a select stage")])
def test_review_of_another_stage_kind_is_rejected(name: str, words: str, workspace: ReviewWorkspace) -> None:
    experiment, source = workspace.load()
    with pytest.raises(RequestError, match=f"`{name}` is not a review stage") as caught:
        find_review(experiment, source, workspace.store, name)
    assert words in str(caught.value)


def test_sample_does_not_read_invalid_decision_files_of_other_stages(workspace: ReviewWorkspace) -> None:
    # Only files that the selection needs are read: no decisions of this or another stage.
    workspace.build("clean")
    experiment, source = workspace.load()
    workspace.decisions.parent.mkdir()
    workspace.decisions.write_text("invalid\n")
    assert len(find_review(experiment, source, workspace.store, "checked").rows) == 12


# Validation and plans.


def test_missing_decisions_are_noted_but_valid(workspace: ReviewWorkspace) -> None:
    experiment, source = workspace.load()
    validate(experiment, source, workspace.store, 1, 1)
    (note,) = pending_reviews(experiment, source)
    assert "`checked` needs decisions, and there are none in decisions/checked.jsonl yet" in note
    assert f"tunery review {workspace.file} checked" in note
    assert make_plan(experiment, source, workspace.store).notes == [note]
    workspace.decide({"a": "keep"})
    assert pending_reviews(experiment, source) == []


def test_invalid_decisions_are_reported_with_the_line_of_the_experiment(workspace: ReviewWorkspace) -> None:
    workspace.decisions.parent.mkdir()
    workspace.decisions.write_text('{"id": "a", "decision": "perhaps"}\n')
    experiment, source = workspace.load()
    with pytest.raises(SpecErrors) as caught:
        validate(experiment, source, workspace.store, 1, 1)
    assert f"{workspace.file}:9: checked: {workspace.decisions}:1: " in str(caught.value)


def test_file_ending_and_kind_of_data_are_validated_when_the_file_is_loaded(tmp_path: Path) -> None:
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


def test_plan_has_the_rows_of_a_review_and_reports_changed_decisions(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    workspace.decide({ids[0]: "keep"})
    workspace.build("checked")
    workspace.decide({ids[1]: "drop"})
    experiment, source = workspace.load()
    planned = {stage.name: stage for stage in make_plan(experiment, source, workspace.store).stages}
    assert planned["clean"].reused
    assert not planned["checked"].reused
    assert planned["checked"].rebuild_reason.startswith("content ")
    assert planned["checked"].rows == 20


# Reporting.


def test_report_terminal_and_comparison_have_agreement_and_threshold(workspace: ReviewWorkspace) -> None:
    ids = ids_of(workspace)
    workspace.decide({id: "keep" if ids.index(id) < 24 else "drop" for id in sampled_ids(workspace)[:10]})
    artifacts = workspace.build("clean", "checked")
    experiment, _ = workspace.load()
    agreement = artifacts["checked"].facts["agreement"]["share"]
    actual = review_table(experiment, artifacts)
    assert actual is not None
    assert actual["rows"][0][:3] == ["clean in checked", "10", agreement]
    assert len(actual["columns"]) == len(actual["rows"][0])
    assert any("2 rows are not reviewed yet" in note for note in actual["notes"])
    state = replay(read_events(workspace.context.events))
    assert outcome(state.stages["checked"]).startswith(f"agrees on {agreement:.0%} of 10 reviewed")
    ((name, (tables, strata)),) = reviews(state)
    assert name == "checked"
    assert tables[0].rows[0][0].text == "filter kept"
    assert "kappa" in tables[0].notes[0]
    assert tables[1].rows[0][0].text == "perplexity"
    assert len(strata[0].rows) == 6
    page = report_html(state)
    assert "Review near the threshold" in page
    assert "best threshold" in page


def test_item_has_the_messages_and_marks_the_judged_one(tmp_path: Path) -> None:
    lines = [{"text": "t"}, {"question": "q", "answer": "a"}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
    workspace = review_workspace(tmp_path, lines)
    workspace.build("clean")
    experiment, source = workspace.load()
    rows: dict[str, Row] = {}
    for item in find_review(experiment, source, workspace.store, "checked").rows:
        rows[item.messages[0]["content"]] = {message["role"]: message["judged"] for message in item.messages}
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
        "keep: {perplexity: {threshold: 60, prefer: high}}, quota: {group_by: source, rows: 11, sort_by: random}",
    ],
)
def test_every_kind_of_rule_can_be_reviewed(rules: str, tmp_path: Path) -> None:
    text = TEXT.replace("keep: {perplexity: {keep_fraction: 0.5}}", rules)
    text += "  few: {kind: select, data: scored, keep: {random: {top_k: 17}}}\n"
    workspace = review_workspace(tmp_path, questions(120), text=text)
    filtered = read_filter_results(workspace.build("clean")["clean"])
    kept = [id for id, keep in zip(filtered.ids, filtered.kept, strict=True) if keep]
    assert kept == [row["id"] for row in read_rows(workspace.build("clean")["clean"].path)]
    assert 0 < len(kept) < 120
    assert ((filtered.distance < 0) == filtered.kept).all()
    sampled = sampled_ids(workspace)
    workspace.decide(dict.fromkeys(sampled, "keep"))
    facts = workspace.build("checked")["checked"].facts
    assert facts["kept"] == len({*kept, *sampled})
