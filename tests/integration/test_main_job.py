"""The main use case: a complete run from raw rows to evaluation results, report and W&B files."""

from __future__ import annotations

import time

from workspace import Workspace, facts


def test_every_stage_is_made_and_told(made: Workspace) -> None:
    finished = [event["stage"] for event in made.events() if event["event"] == "stage_finished"]
    assert finished == ["texts", "questions", "validation", "base", "scored", "clean", "sft", "eval"]


def test_ray_starts_once_a_run(made: Workspace) -> None:
    assert [event["event"] for event in made.events()].count("ray_started") == 1


def test_rows_in_equal_rows_kept_and_dropped(made: Workspace) -> None:
    scored, clean = facts(made.only("score")), facts(made.only("select"))
    assert scored["rows_in"] == scored["rows_out"] == 120
    assert clean["kept"] + clean["dropped"] == 120
    assert clean["kept"] == 96
    dropped = (made.only("select") / "dropped.jsonl").read_text().splitlines()
    assert len(dropped) == clean["dropped"]


def test_the_filter_is_judged_against_the_planted_rows(made: Workspace) -> None:
    judged = facts(made.only("select"))["planted"]
    assert judged["total"] == 24
    assert judged["dropped"] <= 24
    assert judged["random_precision"] == 0.2


def test_the_last_evaluation_while_training_is_what_evaluate_measures(made: Workspace) -> None:
    results = {result["model"]: result["loss"] for result in facts(made.only("evaluate"))["results"]}
    assert abs(facts(made.only("sft"))["eval_loss"] - results["sft"]) < 1e-5
    assert results["sft"] < results["base"]


def test_the_loss_counts_answers_only(made: Workspace) -> None:
    import pyarrow.parquet as pq

    scores = pq.read_table(made.only("score") / "scores").to_pydict()
    trained = facts(made.only("sft"))
    assert sum(scores["perplexity_tokens"]) < trained["tokens"] * 120 / 96, "questions were counted"


def test_a_second_run_does_nothing_within_ten_seconds_and_says_so(made: Workspace) -> None:
    before = sorted(made.store.glob("artifacts/*"))
    begin = time.time()
    done = made.tunery("run", str(made.file))
    assert time.time() - begin < 10
    assert done.returncode == 0
    assert done.stdout.count("reused") == 8
    assert sorted(made.store.glob("artifacts/*")) == before
    assert [event["event"] for event in made.events()].count("ray_started") == 1


def test_the_plan_names_what_an_edit_touches_and_why(made: Workspace) -> None:
    text = made.file.read_text()
    try:
        made.write(lambda experiment: experiment["stages"]["sft"].update(learning_rate=5e-4))
        plan = made.tunery("plan", str(made.file))
    finally:
        made.file.write_text(text)
    assert plan.stdout.count("reused") == 6, plan.stdout
    assert "learning_rate 0.001 -> 0.0005" in plan.stdout


def test_report_and_wandb_files_are_written(made: Workspace) -> None:
    report = (made.run / "report.html").read_text()
    for name in ("texts", "scored", "clean", "sft", "eval"):
        assert name in report
    runs = {path.name for path in (made.run / "wandb").rglob("*.wandb")}  # a second run uses the same ids again
    assert len(runs) == 9, "one a stage, and the comparison"


def test_first_step_and_the_gaps_between_stages_are_measured(made: Workspace) -> None:
    (told,) = [event for event in made.events() if event["event"] == "overhead"][:1]
    assert 0 < told["ray_start_seconds"] < told["first_step_seconds"]
    assert len(told["between_stages_seconds"]) == 7
    assert sum(told["between_stages_seconds"]) < 5
