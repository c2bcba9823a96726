"""Summary tables at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiment_text import LoadText
from sample_run import GRPO_FACTS, PPO_FACTS

from tunery.reporting.evaluation_tables import loss_table, win_table
from tunery.reporting.filter_tables import diversity_table
from tunery.reporting.summary_tables import results, search_table
from tunery.reporting.training_tables import training_tables
from tunery.search.journal import JournalRecord, TrialStart
from tunery.search.outcome import search_facts
from tunery.store import Artifact

TEXT = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: a.jsonl}
  scored: {kind: score, data: rows, by: [{embedding: {pretrained: org/name}}, {length: words}]}
  long: {kind: select, data: scored, keep: {length: {top_k: 9}}}
  spread: {kind: select, data: scored, diverse: {embedding: embedding, method: k_center, rows: 9}}
"""


def artifacts_with(**diverse: Any) -> dict[str, Artifact]:
    result = {"rows": {}, "scored": {}, "long": {}, "spread": {"diverse": diverse}}
    return {name: Artifact(Path(name), {"facts": facts}, {}) for name, facts in result.items()}


def test_diversity_table_compares_with_a_random_subset(load_text: LoadText) -> None:
    experiment, _ = load_text(TEXT)
    result = {
        "method": "k_center",
        "kept": 9,
        "requested": 9,
        "candidates": 1200,
        "coverage": {"radius": 0.3, "similarity": 0.98},
        "random": {"radius": 0.5, "similarity": 0.97},
    }
    table = diversity_table(experiment, artifacts_with(**result))
    assert table is not None
    assert table["rows"] == [
        ["spread (k_center)", "9 of 1,200", 0.3, 0.98],
        ["random subset", "9 of 1,200", 0.5, 0.97],
    ]
    assert len(table["notes"]) == 1
    score_first = {"method": "score_first", "max_similarity": 0.9, "chance_similarity": {"median": 0.82, "high": 0.94}}
    table = diversity_table(experiment, artifacts_with(**{**result, "requested": 20, **score_first}))
    assert table is not None
    assert table["notes"][0] == (
        "spread: fewer than the requested 20 rows: all other rows have a similarity above 0.9 to a kept row "
        "(median of random pairs: 0.82)"
    )


def test_no_diversity_table_without_a_diverse_selection(load_text: LoadText) -> None:
    experiment, _ = load_text(TEXT.replace("  spread:", "  # spread:"))
    assert diversity_table(experiment, artifacts_with()) is None


POLICIES = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: a.jsonl}
  base: {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  ppo: {kind: ppo, data: rows, model: base, reward: {python: r.py}, epochs: 1, learning_rate: 1e-3, eval_data: rows}
  grpo: {kind: grpo, data: rows, model: base, reward: {python: r.py}, epochs: 1, learning_rate: 1e-3}
  eval: {kind: evaluate, models: [base, ppo], data: {heldout: rows}}
"""


def policies(**more: dict[str, Any]) -> dict[str, Artifact]:
    result = {"rows": {}, "base": {"eval_loss": 2.5}, "ppo": PPO_FACTS, "grpo": GRPO_FACTS, "eval": {"results": [1]}}
    runtime_stats = ("weights_bytes", "weights_bytes_separate")
    return {
        name: Artifact(
            Path(name),
            {"facts": {key: value for key, value in facts.items() if key not in runtime_stats}, "kind": name},
            {key: value for key, value in facts.items() if key in runtime_stats},
        )
        for name, facts in {**result, **more}.items()
    }


def test_policy_table_has_rewards_and_shared_weights(load_text: LoadText) -> None:
    experiment, _ = load_text(POLICIES)
    (table,) = training_tables(experiment, policies())
    assert table["title"] == "Rewards"
    assert table["columns"] == ["policy", "reward before", "reward after", "KL", "EOS rate", "responses", "steps"]
    assert table["rows"] == [
        ["ppo", 0.96875, 4.609375, 11.92, 0.8125, "1,024", "32"],
        ["grpo", None, 3.75, 0.125, 0.75, None, "20"],
    ]
    assert table["notes"] == [
        "ppo: models share one base: 14.3 MiB of weights instead of 48.8 MiB",
        "grpo: rewards of the first and last training steps; set `eval_data` to measure held-out prompts",
        "KL: divergence from the reference model, in nats per response (ppo), per token (grpo)",
    ]


def test_policy_without_shared_weights_has_no_note(load_text: LoadText) -> None:
    experiment, _ = load_text(POLICIES)
    (table,) = training_tables(experiment, policies(ppo={**PPO_FACTS, "shared_base": False}))
    assert not any("one base" in note for note in table["notes"])


def test_no_policy_table_without_policies(load_text: LoadText) -> None:
    experiment, _ = load_text(TEXT)
    assert training_tables(experiment, artifacts_with()) == []


def test_json_results_have_the_first_metric_of_a_training(load_text: LoadText) -> None:
    experiment, _ = load_text(POLICIES)
    assert results(experiment, policies()) == {"base": 2.5, "ppo": 4.609375, "grpo": None, "eval": [1]}


MEASURED = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: a.jsonl}
  base: {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 2, learning_rate: 2e-3}
  sft: {kind: sft, data: rows, model: base, epochs: 1, learning_rate: 1e-5}
  eval: {kind: evaluate, models: [base, sft], data: {held: rows}, baseline: base}
  wins: {kind: win_rate, models: [sft], baseline: base, judge: {python: reward.py}, data: rows}
"""
SEARCHED = """\
search: {metric: wins.sft.rows.win_rate, mode: max, trials: 2, space: {sft.epochs: {choice: [1, 2]}}}
"""


def win_artifact(rate: float, too_long: int = 0) -> Artifact:
    result = {
        "model": "sft",
        "set": "rows",
        "win_rate": rate,
        "interval": [rate - 0.1, rate + 0.1],
        "reward": 1.5,
        "response_length": 20.5,
        "eos_rate": 1.0,
        "baseline": {"model": "base", "reward": 0.5, "response_length": 10.0, "eos_rate": 1.0},
        "rows": 90,
        "left_out": {"too_long": too_long, "unusable": 0},
    }
    return Artifact(Path("wins"), {"facts": {"results": [result]}}, {})


def loss_artifacts(*losses: tuple[str, float, float | None]) -> dict[str, Artifact]:
    results = [
        {"model": model, "set": "held", "loss": loss, "perplexity": 9.0}
        | ({} if forgetting is None else {"forgetting": forgetting})
        for model, loss, forgetting in losses
    ]
    trained = {name: Artifact(Path(name), {"facts": {"rows": 9, "steps": 3}}, {}) for name in ("base", "sft")}
    return {"eval": Artifact(Path("eval"), {"facts": {"results": results}}, {}), **trained}


def test_win_table_has_intervals_rewards_lengths_and_skipped_rows(load_text: LoadText) -> None:
    experiment, _ = load_text(MEASURED)
    table = win_table(experiment, {"wins": win_artifact(0.6, too_long=10)}, {})
    assert table is not None
    assert dict(zip(table["columns"], table["rows"][0], strict=True)) == {
        "model": "sft",
        "baseline": "base",
        "prompts": "rows",
        "judge": "reward.py",
        "win rate": 0.6,
        "95% interval": "0.500–0.700",
        "reward": 1.5,
        "baseline reward": 0.5,
        "tokens per response": 20.5,
    }
    assert table["notes"] == [
        "wins: sft and base are compared on 90 prompts of rows; skipped: 10 prompts too long "
        "for one of the models, 0 rows without a prompt"
    ]


def test_win_table_has_the_best_trial_next_to_the_file(load_text: LoadText) -> None:
    experiment, _ = load_text(MEASURED + SEARCHED)
    table = win_table(experiment, {"wins": win_artifact(0.6)}, {"wins": win_artifact(0.7)})
    assert table is not None
    assert [(row[0], row[4]) for row in table["rows"]] == [("sft (best trial)", 0.7), ("sft", 0.6)]
    assert table["notes"] == []


def test_forgetting_has_a_column_if_computed(load_text: LoadText) -> None:
    experiment, _ = load_text(MEASURED)
    table = loss_table(experiment, loss_artifacts(("base", 2.0, 0.0), ("sft", 2.25, 0.125)), {})
    assert table is not None
    assert [row[table["columns"].index("forgetting")] for row in table["rows"]] == ["+0.0%", "+12.5%"]
    table = loss_table(experiment, loss_artifacts(("base", 2.0, None), ("sft", 2.25, None)), {})
    assert table is not None
    assert table["columns"] == ["model", "held-out set", "loss", "perplexity", "training rows", "steps"]
    assert table["rows"][0] == ["base", "held", 2.0, 9.0, 9, 3]


SEARCH = """
name: searched
seed: 1
stages:
  rows: {kind: dataset, source: rows.jsonl}
  held: {kind: dataset, source: held.jsonl}
  sft:  {kind: sft, data: rows, model: {pretrained: ./base}, epochs: 1, learning_rate: 1e-3, eval_data: held}
search:
  metric: sft.eval_loss
  mode: min
  constraints: [{metric: sft.eval_loss, min: 1.0}]
  trials: 30
  num_seeds: 3
  space:
    sft.learning_rate: {loguniform: [1e-4, 1e-2]}
    sft.schedule: {choice: [linear, constant]}
    sft.warmup: {uniform: [0, 0.2], when: {sft.schedule: linear}}
"""


def record(name: str, value: float, of: str = "", **more: Any) -> JournalRecord:
    overrides = {"sft.learning_rate": value / 1000, "sft.schedule": "constant"}
    result = {"state": "done", "values": {"sft.eval_loss": value}, "tokens": 900.0, "seconds": 1.0, "error": ""}
    return JournalRecord(TrialStart(name, 0, overrides, "replicate" if of else "sampled", of), [], {**result, **more})


def test_search_table_has_means_violations_and_ties(load_text: LoadText) -> None:
    experiment, _ = load_text(SEARCH)
    assert experiment.search is not None
    records = [record("a", 2.0), record("b", 2.1), record("broken", 0.5), record("c", 3.0, state="stopped")]
    records += [record("a2", 2.3, "a"), record("a3", 2.2, "a"), record("b2", 2.0, "b"), record("b3", 2.1, "b")]
    facts = search_facts(experiment.search, records, "the budget of 1 hours is spent")
    table = search_table(experiment, Artifact(Path("search"), {"facts": facts}, {}))
    assert table is not None
    columns = [
        "trial",
        "state",
        "eval loss",
        "mean of seeds",
        "seeds",
        "violations",
        "learning rate",
        "schedule",
        "tokens",
    ]
    assert table["columns"] == columns
    assert [row[0] for row in table["rows"]] == ["b", "a", "broken", "c"]
    assert table["rows"][0][3:5] == ["2.07 ± 0.19", 3]
    assert table["rows"][2][5] == "eval loss < 1"
    assert table["notes"] == [
        "best: b, eval loss 2.07 ± 0.19 over 3 seeds, with learning_rate=2.1e-3, schedule=constant",
        "tied with a: not significantly different over 3 seeds",
        "the search ended early: the budget of 1 hours is spent",
        "4 trials: 3 done, 1 stopped; 4 replicates with other seeds",
    ]


def test_table_of_a_long_search_has_the_best_trials_and_refers_to_the_report(load_text: LoadText) -> None:
    experiment, _ = load_text(SEARCH)
    assert experiment.search is not None
    facts = search_facts(experiment.search, [record(f"t{number}", 2.0 + number) for number in range(30)], "")
    table = search_table(experiment, Artifact(Path("search"), {"facts": facts}, {}))
    assert table is not None
    assert [row[0] for row in table["rows"]] == [f"t{number}" for number in range(20)]
    assert table["notes"][-1] == "30 trials: 30 done; the report has the other 10"
    assert "by one seed" in table["notes"][0]
