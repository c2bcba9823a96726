"""Win rates against values computed by hand: independent of shards, all rows are counted, and a failing judge is an
error."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from in_process import dataset, parsed, stage_context
from small_classifiers import WORDS, write_language_model, write_reward_model

from tunery.errors import StageError, TuneryError
from tunery.evaluation import generate_responses as generate_responses_module
from tunery.evaluation.win_counts import WinCounts, compare, wilson_interval
from tunery.evaluation.win_rate import MAX_SAMPLE_CHARS, NUM_SAMPLES, run_win_rate
from tunery.spec import WinRate
from tunery.store import StageResult
from tunery.store.rows import Row, row_id, write_rows

LENGTH = "def reward(prompts, responses):\n    return [len(response) for response in responses]\n"
NUM_PROMPTS = 21


# Win rates and intervals.


def test_a_tie_counts_half() -> None:
    actual = compare([(2.0, 1.0, False), (0.5, 0.1, False), (1.0, 1.0, False), (0.0, 3.0, False)])
    assert actual == WinCounts(wins=2, ties=1, losses=1)
    assert actual.rate == 0.625


def test_equal_responses_are_a_tie_whatever_their_rewards() -> None:
    assert compare([(1.0000001, 1.0, True), (1.0, 1.0000001, True)]) == WinCounts(0, 2, 0)


@pytest.mark.parametrize(
    ("rate", "rows", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.5, 1000, 0.4691, 0.5309)],
)
def test_wilson_interval(rate: float, rows: int, low: float, high: float) -> None:
    assert wilson_interval(rate, rows) == pytest.approx((low, high), abs=1e-4)


def test_interval_covers_the_true_rate_at_its_nominal_level() -> None:
    rng = random.Random(3)
    covered = 0
    for _ in range(2000):
        outcomes = [rng.choices([1.0, 0.5, 0.0], [0.5, 0.2, 0.3])[0] for _ in range(40)]
        low, high = wilson_interval(sum(outcomes) / 40, 40)
        covered += low <= 0.6 <= high
    assert 0.94 <= covered / 2000 <= 1.0


# The stage, in one process.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("twin", 0), ("sft", 1)):
        write_language_model(folder / name, seed)
    write_reward_model(folder / "judge", pad=0)
    write_reward_model(folder / "two", labels=2)
    return folder


def prompt_row(prompt: str, line: int, response: str | None = "yes") -> Row:
    messages = [{"role": "user", "content": prompt, "tool_calls": None}]
    messages += [{"role": "assistant", "content": response, "tool_calls": None}] if response else []
    row: Row = {"messages": messages, "line": line}
    return {**row, "id": row_id(row)}


def prompt_rows() -> list[Row]:
    return [prompt_row(f"{WORDS[n % 7]} {WORDS[n]} {n}", n, "yes" if n % 2 else None) for n in range(NUM_PROMPTS)]


def run_stage(
    folder: Path,
    models_dir: Path,
    rows: Sequence[Row],
    judge: str | dict[str, str] = LENGTH,
    staging_dir: Path | None = None,
    **fields: Any,
) -> tuple[StageResult, list[dict[str, Any]]]:
    """Return the result and the lines of responses.jsonl. `models_dir` contains the models."""
    data, out = folder / "data", folder / "out"
    folder.mkdir(exist_ok=True)
    out.mkdir()
    write_rows(rows, data)
    if isinstance(judge, str):
        (models_dir / "reward.py").write_text(judge)
        judge = {"python": "reward.py"}
    spec = {
        "kind": "win_rate",
        "models": [{"pretrained": "./sft"}],
        "baseline": {"pretrained": "./base"},
        "judge": judge,
        "data": "data",
        "sampling": {"max_new_tokens": 12},
        "max_length": 64,
        **fields,
    }
    context = stage_context(
        parsed(WinRate, spec), {"data": dataset(data)}, models_dir, out=out, staging_dir=staging_dir or folder / "work"
    )
    result = run_win_rate(context)
    return result, [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def test_win_rate_matches_the_written_responses(tmp_path: Path, models: Path) -> None:
    result, lines = run_stage(tmp_path, models, prompt_rows())
    (output,) = result.facts["results"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == [output]
    assert [line["id"] for line in lines] == [row["id"] for row in prompt_rows()]
    assert all(line["prompt"][-1]["role"] == "user" for line in lines)
    sides = [(line["responses"]["sft"], line["responses"]["base"]) for line in lines]
    assert all(side["reward"] == len(side["response"]) for both in sides for side in both)
    wins = sum(1.0 if model["reward"] > baseline["reward"] else 0.5 * (model["reward"] == baseline["reward"])
               for model, baseline in sides)  # fmt: skip
    assert output["win_rate"] == wins / NUM_PROMPTS
    assert output["interval"] == list(wilson_interval(wins / NUM_PROMPTS, NUM_PROMPTS))
    assert 0 < output["outcomes"]["wins"] < NUM_PROMPTS
    assert (output["model"], output["set"], output["baseline"]["model"]) == ("sft", "data", "base")
    for means, index in ((output, 0), (output["baseline"], 1)):
        assert means["reward"] == pytest.approx(sum(both[index]["reward"] for both in sides) / NUM_PROMPTS)
        assert means["response_length"] == pytest.approx(sum(both[index]["tokens"] for both in sides) / NUM_PROMPTS)
        assert means["eos_rate"] == pytest.approx(sum(both[index]["ended"] for both in sides) / NUM_PROMPTS)


def test_samples_are_the_prompts_with_the_smallest_ids(tmp_path: Path, models: Path) -> None:
    rows = [*prompt_rows(), prompt_row("why " * 300, 99)]
    result, lines = run_stage(tmp_path, models, rows, max_length=400, sampling={"max_new_tokens": 4})
    smallest = sorted(lines, key=lambda line: line["id"])[:NUM_SAMPLES]
    samples = result.facts["responses"]
    assert [sample["prompt"] for sample in samples] == [
        line["prompt"][-1]["content"][:MAX_SAMPLE_CHARS] for line in smallest
    ]
    assert list(samples[0]["responses"]) == ["base", "sft"]
    assert samples[0]["responses"]["sft"]["reward"] == smallest[0]["responses"]["sft"]["reward"]


def test_results_do_not_depend_on_shards_order_and_other_models(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"pretrained": "./judge"}
    one_shard, _ = run_stage(tmp_path / "one_shard", models, prompt_rows(), judge)
    monkeypatch.setattr(generate_responses_module, "BATCH_ROWS", 4)
    two_models = [{"pretrained": "./twin"}, {"pretrained": "./sft"}]
    many_batches, _ = run_stage(tmp_path / "many_batches", models, prompt_rows()[::-1], judge, models=two_models)
    (expected,), (_, actual) = one_shard.facts["results"], many_batches.facts["results"]
    assert actual["outcomes"] == expected["outcomes"]
    assert actual["reward"] == pytest.approx(expected["reward"], abs=1e-5)
    assert actual["response_length"] == expected["response_length"]
    assert [sample["prompt"] for sample in many_batches.facts["responses"]] == [
        sample["prompt"] for sample in one_shard.facts["responses"]
    ]


def test_equal_models_give_equal_responses_and_tie(tmp_path: Path, models: Path) -> None:
    result, lines = run_stage(
        tmp_path, models, prompt_rows(), {"pretrained": "./judge"}, models=[{"pretrained": "./twin"}]
    )
    (output,) = result.facts["results"]
    assert output["outcomes"] == {"wins": 0, "ties": NUM_PROMPTS, "losses": 0}
    assert len({line["responses"]["twin"]["response"] for line in lines}) > NUM_PROMPTS / 2, "the responses are sampled"


def test_skipped_prompts_are_counted(tmp_path: Path, models: Path) -> None:
    text_row: Row = {"text": "a text without a prompt", "line": 90}
    rows = [
        *prompt_rows(),
        {**text_row, "id": row_id(text_row)},
        prompt_row("why " * 100, 91),
        prompt_row("how " * 100, 92),
    ]
    result, lines = run_stage(tmp_path, models, rows)
    (output,) = result.facts["results"]
    assert output["left_out"] == {"too_long": 2, "unusable": 1}
    assert output["rows"] == len(lines) == NUM_PROMPTS


def test_no_usable_prompt_is_an_error_with_counts(tmp_path: Path, models: Path) -> None:
    with pytest.raises(StageError, match="none of the 1 rows") as caught:
        run_stage(tmp_path, models, [prompt_row("why " * 100, 1)])
    assert "1 prompts are longer than 52 tokens" in caught.value.cause


def test_interrupted_comparison_resumes_with_missing_responses(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_responses_module, "BATCH_ROWS", 8)
    staging_dir = tmp_path / "work"
    batch_sizes = tmp_path / "batch_sizes.txt"
    judge = f"""
def reward(prompts, responses):
    with open({str(batch_sizes)!r}, "a") as file:
        file.write(f"{{len(prompts)}}\\n")
    if len(open({str(batch_sizes)!r}).readlines()) == 4:
        raise OSError("connection lost")
    return [len(response) for response in responses]
"""
    with pytest.raises(TuneryError, match="connection lost"):
        run_stage(tmp_path / "first", models, prompt_rows(), judge, staging_dir)
    result, _ = run_stage(tmp_path / "second", models, prompt_rows(), judge, staging_dir)
    assert batch_sizes.read_text().split() == ["8", "8", "5", "8", "8", "8", "5"]  # the fourth failed and is repeated
    uninterrupted, _ = run_stage(tmp_path / "uninterrupted", models, prompt_rows())
    assert result.facts == uninterrupted.facts


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"pretrained": "./two"}, "is not a reward model: it has 2 labels"),
        ({"pretrained": "./base"}, "has no classification head"),
        ({"pretrained": "./broken"}, "gave nan for the response"),
        ("def reward(prompts, responses): return [1.0]\n", "gave 1 rewards for 21 responses"),
        ("def reward(prompts, responses): return [float('nan')] * len(responses)\n", "gave nan for the response"),
    ],
    ids=["two labels", "language model", "weights of NaN", "too few", "NaN"],
)
def test_judge_with_invalid_rewards_is_an_error(
    judge: str | dict[str, str], message: str, tmp_path: Path, models: Path
) -> None:
    if isinstance(judge, dict) and judge["pretrained"] == "./broken" and not (models / "broken").exists():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        broken = AutoModelForSequenceClassification.from_pretrained(models / "judge")
        torch.nn.init.constant_(broken.score.weight, float("nan"))
        broken.save_pretrained(models / "broken")
        AutoTokenizer.from_pretrained(models / "judge").save_pretrained(models / "broken")
    with pytest.raises(TuneryError, match=message):
        run_stage(tmp_path, models, prompt_rows(), judge)
