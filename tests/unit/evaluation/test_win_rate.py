"""Win rates against hand-worked values: independent of shards, no row is lost, and a failing judge is reported."""

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
from tunery.evaluation import generate_responses as answers_module
from tunery.evaluation.win_counts import WinCounts, compare, wilson_interval
from tunery.evaluation.win_rate import MAX_SAMPLE_CHARS, NUM_SAMPLES, run_win_rate
from tunery.spec import WinRate
from tunery.store import StageResult
from tunery.store.rows import Row, row_id, write_rows

LENGTH = "def reward(prompts, responses):\n    return [len(response) for response in responses]\n"
QUESTIONS = 21


# Win rates and intervals.


def test_a_tie_counts_half() -> None:
    actual = compare([(2.0, 1.0, False), (0.5, 0.1, False), (1.0, 1.0, False), (0.0, 3.0, False)])
    assert actual == WinCounts(wins=2, ties=1, losses=1)
    assert actual.rate == 0.625


def test_equal_responses_are_a_tie_whatever_their_rewards() -> None:
    assert compare([(1.0000001, 1.0, True), (1.0, 1.0000001, True)]) == WinCounts(0, 2, 0)


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.5, 1000, 0.4691, 0.5309)],
)
def test_interval_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    assert wilson_interval(share, rows) == pytest.approx((low, high), abs=1e-4)


def test_interval_covers_the_true_rate_at_its_nominal_level() -> None:
    draw = random.Random(3)
    held = 0
    for _ in range(2000):
        won = [draw.choices([1.0, 0.5, 0.0], [0.5, 0.2, 0.3])[0] for _ in range(40)]
        low, high = wilson_interval(sum(won) / 40, 40)
        held += low <= 0.6 <= high
    assert 0.94 <= held / 2000 <= 1.0


# The stage, in one process.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("twin", 0), ("sft", 1)):
        write_language_model(folder / name, seed)
    write_reward_model(folder / "judge", pad=0)
    write_reward_model(folder / "two", labels=2)
    return folder


def question_row(question: str, line: int, answer: str | None = "yes") -> Row:
    turns = [{"role": "user", "content": question, "tool_calls": None}]
    turns += [{"role": "assistant", "content": answer, "tool_calls": None}] if answer else []
    row: Row = {"messages": turns, "line": line}
    return {**row, "id": row_id(row)}


def questions() -> list[Row]:
    return [question_row(f"{WORDS[n % 7]} {WORDS[n]} {n}", n, "yes" if n % 2 else None) for n in range(QUESTIONS)]


def compared(
    folder: Path,
    home: Path,
    rows: Sequence[Row],
    judge: str | dict[str, str] = LENGTH,
    work: Path | None = None,
    **fields: Any,
) -> tuple[StageResult, list[dict[str, Any]]]:
    """Return the result and the lines of responses.jsonl. `home` has the models."""
    data, out = folder / "data", folder / "out"
    folder.mkdir(exist_ok=True)
    out.mkdir()
    write_rows(rows, data)
    if isinstance(judge, str):
        (home / "reward.py").write_text(judge)
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
        parsed(WinRate, spec), {"data": dataset(data)}, home, out=out, staging_dir=work or folder / "work"
    )
    result = run_win_rate(context)
    return result, [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def test_win_rate_matches_the_written_responses(tmp_path: Path, models: Path) -> None:
    result, lines = compared(tmp_path, models, questions())
    (output,) = result.facts["results"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == [output]
    assert [line["id"] for line in lines] == [row["id"] for row in questions()]
    assert all(line["prompt"][-1]["role"] == "user" for line in lines)
    sides = [(line["responses"]["sft"], line["responses"]["base"]) for line in lines]
    assert all(side["reward"] == len(side["response"]) for both in sides for side in both)
    wins = sum(1.0 if mine["reward"] > theirs["reward"] else 0.5 * (mine["reward"] == theirs["reward"])
               for mine, theirs in sides)  # fmt: skip
    assert output["win_rate"] == wins / QUESTIONS
    assert output["interval"] == list(wilson_interval(wins / QUESTIONS, QUESTIONS))
    assert 0 < output["outcomes"]["wins"] < QUESTIONS
    assert (output["model"], output["set"], output["baseline"]["model"]) == ("sft", "data", "base")
    for measured, index in ((output, 0), (output["baseline"], 1)):
        assert measured["reward"] == pytest.approx(sum(both[index]["reward"] for both in sides) / QUESTIONS)
        assert measured["response_length"] == pytest.approx(sum(both[index]["tokens"] for both in sides) / QUESTIONS)
        assert measured["eos_rate"] == pytest.approx(sum(both[index]["ended"] for both in sides) / QUESTIONS)


def test_samples_are_the_prompts_with_the_smallest_ids(tmp_path: Path, models: Path) -> None:
    rows = [*questions(), question_row("why " * 300, 99)]
    result, lines = compared(tmp_path, models, rows, max_length=400, sampling={"max_new_tokens": 4})
    smallest = sorted(lines, key=lambda line: line["id"])[:NUM_SAMPLES]
    displayed = result.facts["responses"]
    assert [one["prompt"] for one in displayed] == [
        line["prompt"][-1]["content"][:MAX_SAMPLE_CHARS] for line in smallest
    ]
    assert list(displayed[0]["responses"]) == ["base", "sft"]
    assert displayed[0]["responses"]["sft"]["reward"] == smallest[0]["responses"]["sft"]["reward"]


def test_results_do_not_depend_on_shards_order_and_other_models(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"pretrained": "./judge"}
    whole, _ = compared(tmp_path / "whole", models, questions(), judge)
    monkeypatch.setattr(answers_module, "BATCH_ROWS", 4)
    three = [{"pretrained": "./twin"}, {"pretrained": "./sft"}]
    parts, _ = compared(tmp_path / "parts", models, questions()[::-1], judge, models=three)
    (result,), (_, again) = whole.facts["results"], parts.facts["results"]
    assert again["outcomes"] == result["outcomes"]
    assert again["reward"] == pytest.approx(result["reward"], abs=1e-5)
    assert again["response_length"] == result["response_length"]
    assert [one["prompt"] for one in parts.facts["responses"]] == [one["prompt"] for one in whole.facts["responses"]]


def test_equal_models_give_equal_responses_and_tie(tmp_path: Path, models: Path) -> None:
    result, lines = compared(
        tmp_path, models, questions(), {"pretrained": "./judge"}, models=[{"pretrained": "./twin"}]
    )
    (output,) = result.facts["results"]
    assert output["outcomes"] == {"wins": 0, "ties": QUESTIONS, "losses": 0}
    assert len({line["responses"]["twin"]["response"] for line in lines}) > QUESTIONS / 2, "the responses are sampled"


def test_skipped_prompts_are_counted(tmp_path: Path, models: Path) -> None:
    silent: Row = {"text": "a text that asks nothing", "line": 90}
    rows = [
        *questions(),
        {**silent, "id": row_id(silent)},
        question_row("why " * 100, 91),
        question_row("how " * 100, 92),
    ]
    result, lines = compared(tmp_path, models, rows)
    (output,) = result.facts["results"]
    assert output["left_out"] == {"too_long": 2, "unusable": 1}
    assert output["rows"] == len(lines) == QUESTIONS


def test_no_usable_prompt_is_an_error_with_counts(tmp_path: Path, models: Path) -> None:
    with pytest.raises(StageError, match="none of the 1 rows") as caught:
        compared(tmp_path, models, [question_row("why " * 100, 1)])
    assert "1 prompts are longer than 52 tokens" in caught.value.cause


def test_interrupted_comparison_resumes_with_missing_responses(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "BATCH_ROWS", 8)
    work = tmp_path / "work"
    observed = tmp_path / "seen.txt"
    counting = f"""
def reward(prompts, responses):
    with open({str(observed)!r}, "a") as file:
        file.write(f"{{len(prompts)}}\\n")
    if len(open({str(observed)!r}).readlines()) == 4:
        raise OSError("the power went")
    return [len(response) for response in responses]
"""
    with pytest.raises(TuneryError, match="the power went"):
        compared(tmp_path / "first", models, questions(), counting, work)
    result, _ = compared(tmp_path / "second", models, questions(), counting, work)
    assert observed.read_text().split() == ["8", "8", "5", "8", "8", "8", "5"]  # the fourth failed and is repeated
    undisturbed, _ = compared(tmp_path / "undisturbed", models, questions())
    assert result.facts == undisturbed.facts


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
        compared(tmp_path, models, questions(), judge)
