"""The `reward` stage: training rows, metrics, reward normalization, and validation errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_text import LoadText
from peft import get_peft_model
from small_classifiers import write_language_model
from transformers import AutoTokenizer

from tunery.errors import SpecErrors, StageError
from tunery.events.run_state import StageState
from tunery.events.stage_summary import outcome
from tunery.models.adapters import lora_config
from tunery.models.classifier_inputs import ClassifierEncoder, encode_reward_pairs
from tunery.models.encode_rows import TokenizedRow
from tunery.models.labels import Labels, RewardNorm
from tunery.models.load import (
    load_classifier,
    load_original_tokenizer,
    load_with_new_head,
    weightless_model_with_head,
    write_base,
    write_head,
)
from tunery.models.metrics import preference_accuracy, preference_loss
from tunery.pipeline.validate import validate
from tunery.reporting.training_tables import training_tables
from tunery.scoring.scorers.reward_score import RewardScorer
from tunery.spec import REWARD, Lora, Reward
from tunery.spec.check_search import metrics_of
from tunery.store import Artifact, Store
from tunery.store.rows import Row
from tunery.training.reward import evenly_spaced, preference_metrics, reward_norm

# Training rows.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"pretrained": str(write_language_model(tmp_path_factory.mktemp("model"))), "revision": None}


def encoder_of(model: dict[str, Any], max_length: int = 64) -> ClassifierEncoder:
    return ClassifierEncoder(weightless_model_with_head(model, REWARD), load_original_tokenizer(model), max_length)


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "tool_calls": None, **fields}


def pair_row(chosen: str, rejected: str) -> Row:
    turns = [message("system", "yes and no"), message("user", "why is it red"), message("assistant", chosen)]
    row = {"id": f"{chosen}-{rejected}", "messages": turns, "rejected": [message("assistant", rejected)]}
    return {**row, "text": None, "tools": None}


def encode_rows(rows: list[Row], encoder: ClassifierEncoder, model: dict[str, Any]) -> list[TokenizedRow]:
    return list(encode_reward_pairs(rows, load_original_tokenizer(model), encoder.encoding))


def test_both_responses_have_the_tokens_of_the_scorer(model: dict[str, Any]) -> None:
    rows = [pair_row("it is the model", "no"), pair_row("blue", "green and one of three")]
    tokenizer = AutoTokenizer.from_pretrained(model["pretrained"])
    for row, encoded in zip(rows, encode_rows(rows, encoder_of(model), model), strict=True):
        prompt = row["messages"][:-1]
        conversations = (row["messages"], [*prompt, *row["rejected"]])
        assert encoded.sequences == encoder_of(model)([{"messages": turns} for turns in conversations])
        for side, turns in zip(encoded.sequences, conversations, strict=True):
            plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
            text = tokenizer.apply_chat_template(plain, tokenize=False)
            assert side.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert not encoded.unusable


def test_unusable_rows_have_a_reason(model: dict[str, Any]) -> None:
    call = json.dumps([{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}])
    rows = [
        pair_row("yes", "no"),
        {**pair_row("yes", "no"), "rejected": None},
        {**pair_row("yes", "no"), "messages": None, "text": "a text"},
        pair_row(" \n", "no"),
        pair_row("yes", ""),
        {**pair_row("yes", ""), "rejected": [message("assistant", "", tool_calls=call)]},
        pair_row("one " * 40 + "two", "one " * 40 + "three"),
        pair_row("one " * 40 + "two", "no"),
    ]
    encoded = encode_rows(rows, encoder_of(model, 48), model)
    assert [item.unusable for item in encoded] == [
        "",
        "it is not a preference pair",
        "it is not a preference pair",
        "a response is empty",
        "a response is empty",
        "",  # a response that only calls a tool
        "both responses have the same tokens after truncation",
        "",
    ]
    truncated = [any(side.truncated for side in item.sequences) for item in encoded if not item.unusable]
    assert truncated == [False, True, True], "the call, which the chat template renders, and the long response"


def test_sampled_indices_are_evenly_spaced() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(10, 2000) == list(range(10))


# Metrics and normalization.


def test_loss_accuracy_and_margin_by_hand() -> None:
    rewards_p2 = np.array([[2.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [5.0, 3.0]])  # margins 1, 0, -3, 2
    losses = [math.log(1 + math.exp(-margin)) for margin in (1, 0, -3, 2)]
    metrics = preference_metrics(rewards_p2)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 4)
    assert metrics["eval_accuracy"] == 2.5 / 4
    assert metrics["eval_margin"] == 0


def test_loss_of_wide_margins_does_not_overflow() -> None:
    assert preference_loss(np.array([-1000.0])) == 1000
    assert preference_loss(np.array([1000.0])) == 0
    assert preference_accuracy(np.array([0.0])) == 0.5


def test_norm_is_mean_and_standard_deviation_of_all_responses() -> None:
    norm = reward_norm(np.array([[1.0, 3.0], [5.0, 7.0]]), "rm")
    assert (norm.mean, norm.std) == (4, pytest.approx(math.sqrt(5)))
    assert norm(4 + 2 * math.sqrt(5)) == pytest.approx(2)


@pytest.mark.parametrize("outputs", [[1.0, 1.0], [1.0, math.nan], [1.0, math.inf]])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_outputs_that_cannot_be_normalized_end_the_stage(outputs: list[float]) -> None:
    with pytest.raises(StageError, match="the outputs of the reward model can't be normalized: for 2 responses"):
        reward_norm(np.array([outputs]), "rm")


def test_scorer_normalizes_rewards_if_the_model_has_a_norm() -> None:
    logits_nl = np.array([[1.0], [np.nan], [4.0]], np.float32)
    spec = Reward(reward="rm")
    normalized = RewardScorer(spec, Labels(REWARD, True, reward_norm=RewardNorm(2.0, 0.5)), "rm")(logits_nl)["score"]
    assert [normalized[0], normalized[2]] == [-2, 4]
    assert math.isnan(normalized[1])
    assert RewardScorer(spec, Labels(REWARD, True), "outside")(logits_nl)["score"][::2] == [1, 4]


# Artifacts.


def test_norm_is_loaded_with_a_full_model_and_with_an_adapter(model: dict[str, Any], tmp_path: Path) -> None:
    facts = {"facts": {"reward_mean": 0.25, "reward_std": 1.5}}
    full, adapter = tmp_path / "reward-1", tmp_path / "reward-2"
    model_with_head, new_modules = load_with_new_head(model, REWARD, torch.float32)
    model_with_head.save_pretrained(full / "model")
    config = lora_config(Lora(rank=2), "SEQ_CLS", new_modules)
    get_peft_model(model_with_head, config).save_pretrained(adapter / "adapter")
    write_base(adapter, model)
    write_head(adapter, REWARD)
    for artifact in (full, adapter):
        (artifact / "manifest.json").write_text(json.dumps(facts))
        _, labels = load_classifier({"artifact": str(artifact)}, torch.float32)
        assert labels == Labels(REWARD, True, None, RewardNorm(0.25, 1.5))
    _, pretrained = load_classifier({"pretrained": str(full / "model"), "revision": None}, torch.float32)
    assert pretrained == Labels(REWARD, True)


# Validation errors, with their line.

TEXT = """\
name: x
seed: 1
stages:
  pairs: {kind: dataset, source: pairs.jsonl}
  plain: {kind: dataset, source: plain.jsonl}
  base: {kind: pretrain, data: plain, model: {scratch: tiny}, epochs: 1, learning_rate: 2e-3}
  rm: {kind: reward, data: DATA, eval_data: EVAL, model: base, epochs: 2, learning_rate: 1e-3, global_batch_size: 4}
  rated: {kind: score, data: plain, by: [SCORER]}
"""


@pytest.fixture
def load_stage(tmp_path: Path, load_text: LoadText) -> Any:
    answers = [{"prompt": f"q{n}", "completion": "a b"} for n in range(6)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    pairs = [{"prompt": f"q{n}", "chosen": "a b", "rejected": "c"} for n in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def load_it(data: str = "pairs", held_out: str = "pairs", scorer: str = "{reward: rm}") -> Any:
        lines = TEXT.replace("DATA", data).replace("EVAL", held_out).replace("SCORER", scorer)
        experiment, source = load_text(lines)
        validate(experiment, source, Store(tmp_path / "store"), 1, 1)
        return experiment, source

    return load_it


@pytest.mark.parametrize(
    ("change", "line", "messages"),
    [
        ({"data": "plain"}, 7, ["`rm.data` needs preference pairs", "holds conversations", "`chosen` and `rejected`"]),
        ({"held_out": "plain"}, 7, ["`rm.eval_data` needs preference pairs"]),
        ({"data": "base"}, 7, ["`rm.data` needs rows"]),
        ({"scorer": "{perplexity: rm}"}, 8, ["needs a model, but `rm` is a reward stage"]),
        ({"scorer": "{reward: base}"}, 8, ["`base` is a pretrain stage"]),
        ({"scorer": "{classifier: rm, label: good}"}, 8, ["`rm` has no label `good`", "its labels: `reward`"]),
        ({"scorer": "{classifier: rm, label: 1}"}, 8, ["`rm` has no label 1"]),
        (
            {"scorer": "{classifier: rm, label: reward, temperature: auto}"},
            8,
            ["`rm` has no fitted temperature"],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_invalid_data_and_scorers_are_rejected_before_a_run(
    load_stage: Any, change: dict[str, str], line: int, messages: list[str]
) -> None:
    with pytest.raises(SpecErrors) as caught:
        load_stage(**change)
    (error,) = caught.value.errors
    assert error.line == line
    for message in messages:
        assert message in str(error)


def test_search_metrics_of_a_reward_model(load_stage: Any) -> None:
    assert metrics_of(load_stage()[0]) == ["rm.eval_loss", "rm.eval_accuracy", "rm.eval_margin"]


# Reporting.

FACTS = {
    "rows": 12,
    "pairs": 9,
    "unusable": 3,
    "unusable_because": {"both responses have the same tokens": 2, "a response is empty": 1},
    "eval_pairs": 4,
    "eval_rows_trained_on": 1,
    "loss": 0.25,
    "eval_loss": 0.5,
    "eval_accuracy": 0.75,
    "eval_margin": 0.875,
    "reward_mean": -0.5,
    "reward_std": 1.5,
    "reward_norm_responses": 8,
    "scale_from": "eval_data",
}


def test_summary_table_of_reward_models(load_stage: Any) -> None:
    experiment, _ = load_stage()
    (table,) = training_tables(experiment, {"rm": Artifact(Path(), {"facts": FACTS}, {})})
    assert table["rows"] == [["rm", "9", "4", 0.5, 0.75, 0.875, -0.5, 1.5]]
    assert (
        "3 of 12 rows were skipped (2: both responses have the same tokens; 1: a response is empty)"
        in table["notes"][0]
    )
    assert "1 of the held-out pairs are also training pairs" in table["notes"][1]
    without_eval = {**FACTS, "unusable": 0, "eval_rows_trained_on": 0, "eval_pairs": 0, "scale_from": "data"}
    (table,) = training_tables(experiment, {"rm": Artifact(Path(), {"facts": without_eval}, {})})
    assert table["notes"][0] == "rm: mean and std were computed on 8 training responses"


def test_summary_line_of_a_reward_model() -> None:
    stage = StageState("rm", kind="reward", facts=FACTS)
    assert outcome(stage) == "loss 0.250 → eval 0.500, accuracy 0.75, 9 of 12 rows (3 unusable)"
