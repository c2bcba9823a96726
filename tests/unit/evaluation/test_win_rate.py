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

LENGTH = "def reward(prompts, answers):\n    return [len(answer) for answer in answers]\n"
QUESTIONS = 21


# How often, and how sure.


def test_a_tie_counts_half() -> None:
    found = compare([(2.0, 1.0, False), (0.5, 0.1, False), (1.0, 1.0, False), (0.0, 3.0, False)])
    assert found == WinCounts(wins=2, ties=1, losses=1)
    assert found.rate == 0.625


def test_the_same_text_is_a_tie_whatever_rounding_makes_of_its_rewards() -> None:
    assert compare([(1.0000001, 1.0, True), (1.0, 1.0000001, True)]) == WinCounts(0, 2, 0)


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.8, 10, 0.4902, 0.9433), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.5, 1000, 0.4691, 0.5309)],
)
def test_interval_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    assert wilson_interval(share, rows) == pytest.approx((low, high), abs=1e-4)


def test_interval_holds_the_true_share_about_as_often_as_it_says() -> None:
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


def asked(question: str, line: int, answer: str | None = "yes") -> Row:
    turns = [{"role": "user", "content": question, "tool_calls": None}]
    turns += [{"role": "assistant", "content": answer, "tool_calls": None}] if answer else []
    row: Row = {"messages": turns, "line": line}
    return {**row, "id": row_id(row)}


def questions() -> list[Row]:
    return [asked(f"{WORDS[n % 7]} {WORDS[n]} {n}", n, "yes" if n % 2 else None) for n in range(QUESTIONS)]


def compared(
    folder: Path,
    home: Path,
    rows: Sequence[Row],
    judge: str | dict[str, str] = LENGTH,
    work: Path | None = None,
    **fields: Any,
) -> tuple[StageResult, list[dict[str, Any]]]:
    """The result, and the lines of answers.jsonl. `home` holds the models."""
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
    return result, [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_win_rate_is_that_of_the_answers_that_were_written(tmp_path: Path, models: Path) -> None:
    result, lines = compared(tmp_path, models, questions())
    (told,) = result.facts["results"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == [told]
    assert [line["id"] for line in lines] == [row["id"] for row in questions()]
    assert all(line["prompt"][-1]["role"] == "user" for line in lines)
    sides = [(line["answers"]["sft"], line["answers"]["base"]) for line in lines]
    assert all(side["reward"] == len(side["answer"]) for both in sides for side in both)
    wins = sum(1.0 if mine["reward"] > theirs["reward"] else 0.5 * (mine["reward"] == theirs["reward"])
               for mine, theirs in sides)  # fmt: skip
    assert told["win_rate"] == wins / QUESTIONS
    assert told["interval"] == list(wilson_interval(wins / QUESTIONS, QUESTIONS))
    assert 0 < told["outcomes"]["wins"] < QUESTIONS
    assert (told["model"], told["set"], told["baseline"]["model"]) == ("sft", "data", "base")
    for measured, place in ((told, 0), (told["baseline"], 1)):
        assert measured["reward"] == pytest.approx(sum(both[place]["reward"] for both in sides) / QUESTIONS)
        assert measured["response_length"] == pytest.approx(sum(both[place]["tokens"] for both in sides) / QUESTIONS)
        assert measured["eos_rate"] == pytest.approx(sum(both[place]["ended"] for both in sides) / QUESTIONS)


def test_shown_are_the_prompts_of_the_smallest_ids(tmp_path: Path, models: Path) -> None:
    rows = [*questions(), asked("why " * 300, 99)]
    result, lines = compared(tmp_path, models, rows, max_length=400, sampling={"max_new_tokens": 4})
    smallest = sorted(lines, key=lambda line: line["id"])[:NUM_SAMPLES]
    shown = result.facts["responses"]
    assert [one["prompt"] for one in shown] == [line["prompt"][-1]["content"][:MAX_SAMPLE_CHARS] for line in smallest]
    assert list(shown[0]["answers"]) == ["base", "sft"]
    assert shown[0]["answers"]["sft"]["reward"] == smallest[0]["answers"]["sft"]["reward"]


def test_other_shards_another_order_and_other_models_beside_change_no_result(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"pretrained": "./judge"}
    whole, _ = compared(tmp_path / "whole", models, questions(), judge)
    monkeypatch.setattr(answers_module, "BATCH_ROWS", 4)
    three = [{"pretrained": "./twin"}, {"pretrained": "./sft"}]
    parts, _ = compared(tmp_path / "parts", models, questions()[::-1], judge, models=three)
    (told,), (_, again) = whole.facts["results"], parts.facts["results"]
    assert again["outcomes"] == told["outcomes"]
    assert again["reward"] == pytest.approx(told["reward"], abs=1e-5)
    assert again["response_length"] == told["response_length"]
    assert [one["prompt"] for one in parts.facts["responses"]] == [one["prompt"] for one in whole.facts["responses"]]


def test_model_of_the_same_weights_gives_the_same_answers_and_neither_wins(tmp_path: Path, models: Path) -> None:
    result, lines = compared(
        tmp_path, models, questions(), {"pretrained": "./judge"}, models=[{"pretrained": "./twin"}]
    )
    (told,) = result.facts["results"]
    assert told["outcomes"] == {"wins": 0, "ties": QUESTIONS, "losses": 0}
    assert len({line["answers"]["twin"]["answer"] for line in lines}) > QUESTIONS / 2, "they are drawn"


def test_prompts_that_are_left_out_are_counted(tmp_path: Path, models: Path) -> None:
    silent: Row = {"text": "a text that asks nothing", "line": 90}
    rows = [*questions(), {**silent, "id": row_id(silent)}, asked("why " * 100, 91), asked("how " * 100, 92)]
    result, lines = compared(tmp_path, models, rows)
    (told,) = result.facts["results"]
    assert told["left_out"] == {"too_long": 2, "unusable": 1}
    assert told["rows"] == len(lines) == QUESTIONS


def test_nothing_to_answer_is_an_error_with_its_numbers(tmp_path: Path, models: Path) -> None:
    with pytest.raises(StageError, match="none of the 1 rows") as caught:
        compared(tmp_path, models, [asked("why " * 100, 1)])
    assert "1 prompts are longer than 52 tokens" in caught.value.cause


def test_interrupted_comparison_goes_on_with_what_is_missing(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "BATCH_ROWS", 8)
    work = tmp_path / "work"
    seen = tmp_path / "seen.txt"
    counting = f"""
def reward(prompts, answers):
    with open({str(seen)!r}, "a") as file:
        file.write(f"{{len(prompts)}}\\n")
    if len(open({str(seen)!r}).readlines()) == 4:
        raise OSError("the power went")
    return [len(answer) for answer in answers]
"""
    with pytest.raises(TuneryError, match="the power went"):
        compared(tmp_path / "first", models, questions(), counting, work)
    result, _ = compared(tmp_path / "second", models, questions(), counting, work)
    assert seen.read_text().split() == ["8", "8", "5", "8", "8", "8", "5"]  # the fourth failed, and comes again
    undisturbed, _ = compared(tmp_path / "undisturbed", models, questions())
    assert result.facts == undisturbed.facts


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"pretrained": "./two"}, "is no reward model: it has 2 labels"),
        ({"pretrained": "./base"}, "has no classification head"),
        ({"pretrained": "./broken"}, "gave nan for the answer"),
        ("def reward(prompts, answers): return [1.0]\n", "gave 1 rewards for 21 answers"),
        ("def reward(prompts, answers): return [float('nan')] * len(answers)\n", "gave nan for the answer"),
    ],
    ids=["two labels", "language model", "weights of NaN", "too few", "NaN"],
)
def test_judge_that_can_not_judge_is_an_error(
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
