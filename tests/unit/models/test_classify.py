"""Scores of sequence-classification models: equal to those of transformers for single rows, in any batch."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from experiment_text import LoadText
from scorer_rows import response_row, text_row
from scoring_runs import ROWS, run_score_stage
from small_classifiers import write_encoder, write_language_model, write_reward_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tunery.errors import SpecErrors, TuneryError
from tunery.models import load as load_module
from tunery.models.batching import token_budget_batches
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.models.classify import SequenceClassifier
from tunery.models.encode import Encoded
from tunery.models.labels import Labels, labels_of
from tunery.models.load import load_classifier, load_original_tokenizer
from tunery.models.model_folder import BadModel
from tunery.models.truncation import encode
from tunery.pipeline.validate import validate
from tunery.scoring.score_shard import ScorePass
from tunery.scoring.scorers.label_probability import ClassifierScorer
from tunery.scoring.scorers.reward_score import RewardScorer
from tunery.scoring.shard_scorers import ClassificationShardScorer
from tunery.spec import Classifier, Compute, Pretrained, Reward
from tunery.spec.scorers import SCORERS
from tunery.store import Store
from tunery.store.rows import Row

torch.set_num_threads(1)

COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_encoder(folder / "colours", COLOURS)
    write_encoder(folder / "several", COLOURS, problem_type="multi_label_classification")
    write_reward_model(folder / "reward")
    # Token 1 ends every message; many models also use it for padding.
    write_reward_model(folder / "padded", pad=1)
    write_reward_model(folder / "three", labels=3)
    write_language_model(folder / "causal")
    return folder


def source(folder: Path) -> dict[str, Any]:
    return {"pretrained": str(folder), "revision": None}


def classifier(folder: Path, max_length: int = 512, batch_tokens: int | None = None) -> SequenceClassifier:
    model, _ = load_classifier(source(folder), torch.float32)
    return SequenceClassifier(model.eval(), load_original_tokenizer(source(folder)), max_length, batch_tokens)


def test_encoder_distinguishes_first_and_second_text(folder: Path) -> None:
    pair = AutoTokenizer.from_pretrained(folder / "colours")(["why"], ["red"])
    assert pair["token_type_ids"] == [[0, 0, 0, 1, 1]]


@cache
def reference_model(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()


def reference_logits(folder: Path, *inputs: Any, **options: Any) -> np.ndarray:
    """Logits of one row, shape (labels,), computed by transformers without tunery."""
    tokenizer, model = reference_model(folder)
    with torch.inference_mode():
        logits: np.ndarray = (
            model(**tokenizer(*([text] for text in inputs), return_tensors="pt", **options)).logits[0].numpy()
        )
    return logits


def message_texts(row: Row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_encoder_gets_prompt_and_response_as_a_pair_and_other_rows_as_one_text(folder: Path) -> None:
    actual = classifier(folder / "colours")(ROWS)
    for row, logits in zip(ROWS, actual.logits, strict=True):
        inputs = message_texts(row) if row["messages"] else [row["text"]]
        np.testing.assert_allclose(logits, reference_logits(folder / "colours", *inputs), atol=1e-5)
    assert actual.logits.dtype == np.float32
    assert not any(actual.truncated)


def test_token_types_distinguish_the_texts_of_a_pair(folder: Path) -> None:
    pair, swapped = classifier(folder / "colours")([response_row("red", "why"), response_row("why", "red")]).logits
    assert np.abs(pair - swapped).max() > 0.01
    single_text = classifier(folder / "colours")([text_row("why red")]).logits
    assert np.abs(pair - single_text).max() > 0.01


def test_earlier_messages_precede_the_response(folder: Path) -> None:
    row = response_row("yes", "why")
    row["messages"] = [*response_row("no", "how")["messages"], *row["messages"]]
    expected = reference_logits(folder / "colours", "how\n\nno\n\nwhy", "yes")
    np.testing.assert_allclose(classifier(folder / "colours")([row]).logits[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["reward", "padded"])
def test_reward_model_gets_the_rendered_conversation(name: str, folder: Path) -> None:
    actual = classifier(folder / name)(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    for row, logits, tokens in zip(ROWS, actual.logits, actual.tokens, strict=True):
        text = row["text"]
        if row["messages"]:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            assert len(encode([row], tokenizer, 512)[0].ids) == tokens, (
                "the classifier must read the tokens that training reads"
            )
        expected = reference_logits(folder / name, text, add_special_tokens=False)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_without_pairs_or_template_messages_are_joined_by_a_blank_line(folder: Path) -> None:
    model, _ = load_classifier(source(folder / "three"), torch.float32)
    tokenizer = load_original_tokenizer(source(folder / "three"))
    tokenizer.chat_template = None
    actual = SequenceClassifier(model.eval(), tokenizer, 512)([response_row("yes", "why")])
    np.testing.assert_allclose(actual.logits[0], reference_logits(folder / "three", "why\n\nyes"), atol=1e-5)


@pytest.mark.parametrize("name", ["colours", "reward", "padded"])
def test_logits_do_not_depend_on_the_batch(name: str, folder: Path) -> None:
    reference = classifier(folder / name)
    expected = np.concatenate([reference([row]).logits for row in ROWS])
    assert np.ptp(expected[:, 0]) > 0.1, "otherwise the test is vacuous"
    for budget in (1, 40, 100_000):
        batched = classifier(folder / name, batch_tokens=budget)
        np.testing.assert_allclose(batched(ROWS).logits, expected, atol=1e-5)
        np.testing.assert_allclose(batched(ROWS[::-1]).logits[::-1], expected, atol=1e-5)


def test_padding_of_a_model_without_pad_token_masks_no_token(folder: Path) -> None:
    # No row ends with 2, so it is a valid padding token although rows contain it.
    ids = [[5, 2, 0], [1], [2, 9, 2, 7], [0, 0]]
    model, _ = load_classifier(source(folder / "three"), torch.float32)
    encoder = ClassifierEncoder(model.eval(), load_original_tokenizer(source(folder / "three")), 64)
    inputs = encoder.tensors([Encoded(row, ()) for row in ids])
    assert inputs["input_ids"].tolist() == [[5, 2, 0, 2], [1, 2, 2, 2], [2, 9, 2, 7], [0, 0, 2, 2]]
    reference = AutoModelForSequenceClassification.from_pretrained(folder / "three").eval()
    with torch.inference_mode():
        expected = torch.cat([reference(input_ids=torch.tensor([row])).logits for row in ids])
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_batches_hold_each_sequence_once_within_the_budget() -> None:
    lengths = [3, 0, 9, 1, 4, 4, 20, 2, 0, 5]
    batches = list(token_budget_batches(lengths, 12))
    assert sorted(index for batch in batches for index in batch) == [n for n, length in enumerate(lengths) if length]
    assert all(len(batch) * max(lengths[n] for n in batch) <= 12 or len(batch) == 1 for batch in batches)
    assert [6] in batches, "a sequence longer than the budget is a batch of its own"


def test_long_rows_are_truncated_at_the_end_and_counted(folder: Path) -> None:
    long = response_row("red green " * 20, "why")
    for name, limit in (("colours", 12), ("reward", 12)):
        actual = classifier(folder / name, max_length=limit)([long, response_row("yes", "so")])
        assert actual.truncated == [True, False]
        assert actual.tokens[0] == limit
    expected = reference_logits(folder / "colours", *message_texts(long), truncation=True, max_length=12)
    np.testing.assert_allclose(classifier(folder / "colours", 12)([long]).logits[0], expected, atol=1e-5)
    assert classifier(folder / "colours", 12)([text_row("red " * 10), text_row("red " * 11)]).truncated == [False, True]


def test_rows_are_truncated_to_the_positions_of_the_model(folder: Path) -> None:
    actual = classifier(folder / "colours", max_length=512)([text_row("red " * 100)])
    assert (actual.tokens, actual.truncated) == ([64], [True])


def test_padding_positions_are_not_used_by_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "colours")
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        type_vocab_size=2,
        pad_token_id=1,
    )
    classify = SequenceClassifier(RobertaForSequenceClassification(config).eval(), tokenizer, 512)
    actual = classify([text_row("red " * 100)])
    assert (actual.tokens, actual.truncated) == ([18], [True])
    assert np.isfinite(actual.logits).all()


def test_row_without_a_token_has_no_score(folder: Path) -> None:
    actual = classifier(folder / "three")([text_row(""), text_row("red")])
    assert np.isnan(actual.logits[0]).all()
    assert np.isfinite(actual.logits[1]).all()
    by_label = ClassifierScorer(Classifier(classifier="m", label=0), Labels(("a", "b", "c"), False), "m")
    columns = by_label(actual.logits)
    assert math.isnan(columns["score"][0])
    assert columns["predicted"][0] == ""


# Scores of logits


def scored(
    logits: list[list[float]], label: str | int, temperature: float = 1.0, independent: bool = False
) -> dict[str, list[Any]]:
    labels = Labels(("bad", "good", "odd")[: len(logits[0])], independent)
    spec = Classifier(classifier="m", label=label, temperature=temperature)
    return ClassifierScorer(spec, labels, "m")(np.array(logits, np.float32))


def test_probability_of_a_label_is_a_softmax_at_a_temperature() -> None:
    logits = [[math.log(1), math.log(3), math.log(4)]]
    assert scored(logits, "good")["score"] == pytest.approx([3 / 8])
    assert scored(logits, 1) == scored(logits, "good")
    assert scored(logits, "bad")["score"] == pytest.approx([1 / 8])
    # At temperature 1/2 odds are squared.
    assert scored(logits, "good", 0.5)["score"] == pytest.approx([9 / 26])
    assert scored(logits, "good", 1e9)["score"] == pytest.approx([1 / 3])
    assert scored(logits, "good")["predicted"] == ["odd"]


def test_multi_label_probabilities_are_independent() -> None:
    logits = [[math.log(3), -900.0, math.log(1 / 3)], [900.0, 900.0, -900.0]]
    columns = scored(logits, "bad", independent=True)
    assert columns["score"] == pytest.approx([3 / 4, 1.0])
    assert columns["predicted"] == ["bad", "bad, good"]
    assert scored(logits, "odd", 0.5, independent=True)["score"] == pytest.approx([1 / 10, 0.0])


def test_one_label_has_a_sigmoid() -> None:
    labels = labels_of({"architectures": ["XForSequenceClassification"], "id2label": {"0": "good"}}, "m")
    columns = ClassifierScorer(Classifier(classifier="m", label="good"), labels, "m")(np.array([[0.0], [-1.0]]))
    assert columns == {"score": pytest.approx([0.5, 1 / (1 + math.e)]), "predicted": ["good", ""]}


def test_reward_is_the_logit_itself() -> None:
    labels = Labels(("LABEL_0",), True)
    assert RewardScorer(Reward(reward="m"), labels, "m")(np.array([[-3.5], [7.0]])) == {"score": [-3.5, 7.0]}


def test_rewards_and_label_probabilities_are_maximized() -> None:
    assert [SCORERS[kind].direction for kind in ("reward", "classifier")] == ["maximize", "maximize"]


def test_labels_are_those_of_the_config_in_numeric_order() -> None:
    id2label = {str(n): f"l{n}" for n in range(11)}
    assert labels_of({"id2label": dict(sorted(id2label.items()))}, "m").names == tuple(id2label.values())
    assert labels_of({}, "m").names == ("LABEL_0", "LABEL_1")
    assert labels_of({"num_labels": 3}, "m").names == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_labels_of_a_folder_are_those_of_the_loaded_model(folder: Path) -> None:
    for name in ("colours", "several", "reward", "three"):
        config = json.loads((folder / name / "config.json").read_text())
        assert labels_of(config, name) == load_classifier(source(folder / name), torch.float32)[1]


# Rejected models


def validate_scorer(folder: Path, load_text: LoadText, tmp_path: Path, scorer: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    experiment, yaml_source = load_text(
        f"name: x\nseed: 1\nstages:\n  docs: {{kind: dataset, source: rows.jsonl}}\n"
        f"  scored:\n    kind: score\n    data: docs\n    by:\n      - {{length: words}}\n      - {scorer}\n"
    )
    validate(experiment, yaml_source, Store(tmp_path / "store"), 1, 1)


@pytest.mark.parametrize(
    ("scorer", "messages"),
    [
        ("{reward: {pretrained: M/causal}}", ["no classification head", "LlamaForCausalLM", "`perplexity` or `ifd`"]),
        ("{classifier: {pretrained: M/causal}, label: 0}", ["no classification head"]),
        (
            "{reward: {pretrained: M/colours}}",
            ["it has 3 labels", "`red`, `green`, `blue`", "{classifier: ..., label:"],
        ),
        ("{classifier: {pretrained: M/colours}, label: Gren}", ["no label `Gren`", "did you mean `green`?"]),
        ("{classifier: {pretrained: M/colours}, label: 3}", ["no label 3", "numbers 0 to 2", "`red`, `green`, `blue`"]),
        ("{reward: {pretrained: M/absent}}", ["there is no model folder"]),
    ],
)
def test_invalid_model_is_reported_at_its_line_before_the_run(
    scorer: str, messages: list[str], folder: Path, load_text: LoadText, tmp_path: Path
) -> None:
    with pytest.raises(SpecErrors) as caught:
        validate_scorer(folder, load_text, tmp_path, scorer.replace("M", str(folder)))
    (error,) = caught.value.errors
    assert error.exit_code == 2
    assert error.line == (5 if "absent" in scorer else 10)
    for message in messages:
        assert message in str(error)


@pytest.mark.parametrize(
    "scorer",
    [
        "{reward: {pretrained: M/reward}}",
        "{classifier: {pretrained: M/colours}, label: 2}",
        "{reward: {pretrained: a/b}}",
    ],
)
def test_suitable_model_passes_validation(scorer: str, folder: Path, load_text: LoadText, tmp_path: Path) -> None:
    validate_scorer(folder, load_text, tmp_path, scorer.replace("M", str(folder)))


def test_invalid_config_json_is_reported(folder: Path, load_text: LoadText, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_reward_model(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(SpecErrors, match=r"config.json of .* can't be read"):
        validate_scorer(folder, load_text, tmp_path, f"{{reward: {{pretrained: {broken}}}}}")


def test_head_without_weights_is_rejected(folder: Path, tmp_path: Path) -> None:
    config = json.loads((write_language_model(tmp_path / "no_architecture") / "config.json").read_text())
    del config["architectures"]  # the config no longer names a language model
    (tmp_path / "no_architecture" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TuneryError, match=r"no classification head\ncause: it has no weights for score.weight"):
        load_classifier(source(tmp_path / "no_architecture"), torch.float32)


def test_label_missing_in_the_loaded_model_is_reported_by_the_actor(folder: Path, tmp_path: Path) -> None:
    spec = Classifier(classifier=Pretrained(pretrained="org/name"), label="grey")
    with pytest.raises(TuneryError, match=r"has no label `grey`\ncause: its labels: `red`, `green`, `blue`"):
        ClassificationShardScorer(
            ScorePass(("classifier",), tmp_path, "1"),
            [spec],
            source(folder / "colours"),
            64,
            Compute(workers=1, device="cpu"),
        )
    with pytest.raises(BadModel):
        RewardScorer(Reward(reward="m"), Labels(("a", "b"), False), "m")


# Score stages


LIMIT = 20
"""`max_length` in tokens; some rows are longer."""
GREEN: dict[str, Any] = {"classifier": {"pretrained": "./colours"}, "label": "green"}
RED: dict[str, Any] = {**GREEN, "label": "red", "name": "red"}
REWARD: dict[str, Any] = {"reward": {"pretrained": "./reward"}}


@pytest.fixture
def load_counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each model was loaded, by folder name."""
    counts: Counter[str] = Counter()
    load = load_module.load_classifier

    def counted_load(source: dict[str, Any], dtype: Any) -> Any:
        counts[Path(source["pretrained"]).name] += 1
        return load(source, dtype)

    monkeypatch.setattr(load_module, "load_classifier", counted_load)
    return counts


def test_stage_scores_every_row_and_loads_each_model_once(
    folder: Path, tmp_path: Path, load_counts: Counter[str]
) -> None:
    result = run_score_stage(folder, tmp_path, "one", [GREEN, RED, REWARD], max_length=LIMIT)
    assert load_counts == {"colours": 1, "reward": 1}
    assert (result.facts["rows_in"], result.facts["rows_out"]) == (len(ROWS), len(ROWS))
    truncated = [classifier(folder / name, LIMIT)(ROWS).truncated for name in ("colours", "reward")]
    assert 0 < sum(truncated[0]) < sum(truncated[1]) < len(ROWS)
    assert result.facts["truncated"] == np.logical_or(*truncated).sum()
    assert result.facts["scores"]["classifier"]["good"] == "high"
    (shard,) = (tmp_path / "one" / "out" / "scores").iterdir()
    table = pq.read_table(shard).to_pydict()
    assert table["id"] == [row["id"] for row in ROWS]
    colours, reward_model = classifier(folder / "colours", LIMIT), classifier(folder / "reward", LIMIT)
    for row, green, red, reward in zip(ROWS, *(table[name] for name in ("classifier", "red", "reward")), strict=True):
        logits = colours([row]).logits[0]
        weights = np.exp(logits - logits.max())
        assert (red, green) == pytest.approx(tuple(weights[:2] / weights.sum()), abs=1e-5)
        assert reward == pytest.approx(reward_model([row]).logits[0, 0], abs=1e-5)
    assert set(table["classifier_predicted"]) <= set(COLOURS)


def test_scores_are_cached_by_model_label_and_temperature(folder: Path, tmp_path: Path) -> None:
    def rows_scored(name: str, *by: dict[str, Any], max_length: int = 64) -> int:
        return int(run_score_stage(folder, tmp_path, name, list(by), max_length).runtime_stats["rows_scored"])

    assert rows_scored("first", GREEN) == len(ROWS)
    assert rows_scored("again", GREEN) == 0
    for number, other in enumerate(
        [{"temperature": 2.0}, {"label": "red"}, {"classifier": {"pretrained": "./several"}}]
    ):
        assert rows_scored(f"other{number}", {**GREEN, **other}) == len(ROWS)
    assert rows_scored("shorter", GREEN, max_length=16) == len(ROWS)
    # The same folder name with different weights
    write_encoder(folder / "retrained", COLOURS)
    retrained = {**GREEN, "classifier": {"pretrained": "./retrained"}}
    assert rows_scored("before", retrained) == len(ROWS)
    write_encoder(folder / "retrained", COLOURS, hidden_act="relu")
    assert rows_scored("after", retrained) == len(ROWS)
