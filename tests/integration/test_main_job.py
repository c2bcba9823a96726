"""The main use case: a complete run from raw rows to evaluation results, report and W&B files."""

from __future__ import annotations

from workspace import Workspace, facts


def test_every_stage_is_built_and_reported(complete_run: Workspace) -> None:
    finished = [event["stage"] for event in complete_run.events() if event["event"] == "stage_finished"]
    assert finished == ["texts", "questions", "validation", "base", "scored", "clean", "sft", "eval"]


def test_ray_starts_once_a_run(complete_run: Workspace) -> None:
    assert [event["event"] for event in complete_run.events()].count("ray_started") == 1


def test_rows_in_equal_rows_kept_and_dropped(complete_run: Workspace) -> None:
    scored, clean = facts(complete_run.only("score")), facts(complete_run.only("select"))
    assert scored["rows_in"] == scored["rows_out"] == 120
    assert clean["kept"] + clean["dropped"] == 120
    assert clean["kept"] == 96
    dropped = (complete_run.only("select") / "dropped.jsonl").read_text().splitlines()
    assert len(dropped) == clean["dropped"]


def test_filter_is_evaluated_on_injected_corruption(complete_run: Workspace) -> None:
    judged = facts(complete_run.only("select"))["injected_corruption"]
    assert judged["total"] == 24
    assert judged["dropped"] <= 24
    assert judged["random_precision"] == 0.2


def test_last_training_evaluation_equals_the_evaluate_stage(complete_run: Workspace) -> None:
    results = {result["model"]: result["loss"] for result in facts(complete_run.only("evaluate"))["results"]}
    assert abs(facts(complete_run.only("sft"))["eval_loss"] - results["sft"]) < 1e-5
    assert results["sft"] < results["base"]


def test_loss_counts_response_tokens_only(complete_run: Workspace) -> None:
    import pyarrow.parquet as pq

    scores = pq.read_table(complete_run.only("score") / "scores").to_pydict()
    trained = facts(complete_run.only("sft"))
    assert sum(scores["perplexity_tokens"]) < trained["tokens"] * 120 / 96, "questions were counted"


def test_second_run_reuses_everything_and_does_not_start_ray(complete_run: Workspace) -> None:
    before = sorted(complete_run.store.glob("artifacts/*"))
    done = complete_run.tunery("run", str(complete_run.file))
    assert done.returncode == 0
    assert done.stdout.count("reused") == 8
    assert sorted(complete_run.store.glob("artifacts/*")) == before
    assert [event["event"] for event in complete_run.events()].count("ray_started") == 1


def test_plan_names_stages_affected_by_an_edit_and_the_reasons(complete_run: Workspace) -> None:
    text = complete_run.file.read_text()
    try:
        complete_run.write(lambda experiment: experiment["stages"]["sft"].update(learning_rate=5e-4))
        plan = complete_run.tunery("plan", str(complete_run.file))
    finally:
        complete_run.file.write_text(text)
    assert plan.stdout.count("reused") == 6, plan.stdout
    assert "learning_rate 0.001 -> 0.0005" in plan.stdout


def test_report_and_wandb_files_are_written(complete_run: Workspace) -> None:
    report = (complete_run.run / "report.html").read_text()
    for name in ("texts", "scored", "clean", "sft", "eval"):
        assert name in report
    runs = {path.name for path in (complete_run.run / "wandb").rglob("*.wandb")}  # a second run uses the same ids again
    assert len(runs) == 9, "one a stage, and the comparison"


def test_first_step_and_the_gaps_between_stages_are_measured(complete_run: Workspace) -> None:
    (result,) = [event for event in complete_run.events() if event["event"] == "overhead"][:1]
    assert 0 < result["ray_start_seconds"] < result["first_step_seconds"]
    assert len(result["between_stages_seconds"]) == 7
    assert all(seconds >= 0 for seconds in result["between_stages_seconds"])
