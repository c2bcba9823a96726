"""The `classifier` stage before it trains: labels, validation errors, and the initial head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_text import LoadText
from peft import get_peft_model
from review_workspace import TEXT as TEXT_OF_REVIEW
from review_workspace import questions, review_workspace
from small_classifiers import write_encoder, write_language_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from tunery.errors import SpecErrors, TuneryError
from tunery.events.run_state import StageState
from tunery.events.stage_summary import outcome
from tunery.models.adapters import lora_config
from tunery.models.classify import SequenceClassifier
from tunery.models.load import (
    load_classifier,
    load_original_tokenizer,
    load_with_new_head,
    weightless_model_with_head,
    write_base,
    write_head,
)
from tunery.pipeline.plan import make_plan
from tunery.pipeline.validate import validate
from tunery.reporting.training_tables import training_tables
from tunery.spec import LABELS, Lora, PositiveNegative
from tunery.spec.check_search import metrics_of
from tunery.spec.trainings import data_refs
from tunery.store import Artifact, Store
from tunery.store.rows import REVIEWED_DIR, read_rows
from tunery.training.batches import evaluation_batches
from tunery.training.classification_head import set_padding_token

TEXT = """\
name: x
seed: 1
stages:
  rated: {kind: dataset, source: rated.jsonl}
  plain: {kind: dataset, source: plain.jsonl}
  docs: {kind: dataset, source: plain.jsonl, limit: 3}
  scored: {kind: score, data: plain, by: [{length: words}]}
  clean: {kind: select, data: scored, keep: {length: {keep_fraction: 0.5}}}
  checked: {kind: review, data: clean, decisions: checked.jsonl, rows: 7}
  base: {kind: pretrain, data: docs, model: {scratch: tiny}, epochs: 1, learning_rate: 2e-3}
  judge: {kind: classifier, data: DATA, eval_data: EVAL, model: base, epochs: 2, learning_rate: 1e-3,
          global_batch_size: 4}
  judged: {kind: score, data: plain, by: [SCORER]}
"""
SCORER = "{classifier: judge, label: good}"


@pytest.fixture
def load_stage(tmp_path: Path, load_text: LoadText) -> Any:
    answers = [{"prompt": f"q{n}", "completion": "a b"} for n in range(6)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    rated = [{**row, "label": n % 2 == 0} for n, row in enumerate(answers)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))

    def load_it(data: str = "rated", held_out: str = "rated", scorer: str = SCORER) -> Any:
        lines = TEXT.replace("DATA", data).replace("EVAL", held_out).replace("SCORER", scorer)
        experiment, source = load_text(lines)
        validate(experiment, source, Store(tmp_path / "store"), 1, 1)
        return experiment, source

    return load_it


# Where labels come from.


@pytest.mark.parametrize(
    ("data", "rows"), [("rated", 6), ("{good: plain, bad: docs}", 9), ("{review: checked}", 7)], ids=str
)
def test_labels_come_from_rows_two_stages_or_a_review(load_stage: Any, tmp_path: Path, data: str, rows: int) -> None:
    experiment, source = load_stage(data)
    planned = {stage.name: stage for stage in make_plan(experiment, source, Store(tmp_path / "store")).stages}
    assert (planned["judge"].rows, planned["judge"].steps) == (rows, -(-rows * 2 // 4))
    assert planned["judge"].memory_bytes == planned["base"].memory_bytes


def test_reviewed_rows_have_the_decision_as_their_label(tmp_path: Path) -> None:
    workspace = review_workspace(tmp_path, [*questions(40), *questions(1)])
    ids = [row["id"] for row in read_rows(workspace.build("scored")["scored"].path, ["id"])]
    workspace.decide({ids[0]: "drop", ids[39]: "keep", "elsewhere": "drop"})
    checked = workspace.build("checked")["checked"]
    decided = {row["id"]: row["label"] for row in read_rows(checked.path / REVIEWED_DIR)}
    assert decided == {ids[0]: False, ids[39]: True}
    assert checked.facts["decided"] == 2


def test_review_of_randomly_sampled_rows_gives_labels(tmp_path: Path) -> None:
    text = TEXT_OF_REVIEW.replace("data: scored, keep: {perplexity:", "data: questions, keep: {random:")
    workspace = review_workspace(tmp_path, questions(40), text=text)
    ids = [row["id"] for row in read_rows(workspace.build("questions")["questions"].path, ["id"])]
    workspace.decide({ids[0]: "drop", ids[1]: "keep"})
    checked = workspace.build("checked")["checked"]
    assert [row["label"] for row in read_rows(checked.path / REVIEWED_DIR)] == [False, True]


def test_every_eval_row_is_evaluated_once_and_workers_have_equally_many_batches() -> None:
    lengths = [5, 1, 9, 2, 7, 3, 3]
    for workers in (1, 2, 3):
        shares = [evaluation_batches(lengths, 2, rank, workers) for rank in range(workers)]
        assert {len(share) for share in shares} == {-(-4 // workers)}
        evaluated = [index for share in shares for batch, is_padding in share if not is_padding for index in batch]
        assert sorted(evaluated) == list(range(7))


def test_search_metrics_of_a_classifier(load_stage: Any) -> None:
    assert metrics_of(load_stage()[0]) == ["judge.eval_loss", "judge.eval_accuracy", "judge.eval_auc"]


def test_positive_and_negative_stage_are_data_references() -> None:
    assert data_refs(PositiveNegative(good="a", bad="b")) == {("good",): "a", ("bad",): "b"}


# Validation errors, with their line.


@pytest.mark.parametrize(
    ("change", "line", "messages"),
    [
        ({"data": "plain"}, 11, ["`judge.data` needs labelled rows", "none of the first 6 of plain.jsonl"]),
        ({"held_out": "docs"}, 11, ["`judge.eval_data` needs labelled rows", "{good: STAGE, bad: STAGE}"]),
        ({"data": "checked"}, 11, ["those of `checked` have no label", "{review: STAGE}"]),
        ({"data": "{good: plain}"}, 11, ["`stages.judge.data` has no `bad`"]),
        ({"data": "{good: plain, bad: plain}"}, 11, ["`plain` can't be both good and bad"]),
        ({"data": "{good: plain, bda: docs}"}, 11, ["has no key `bda`", "did you mean `bad`?"]),
        ({"data": "{good: plain, bad: dosc}"}, 11, ["`judge.data.bad` refers to the stage `dosc`", "`docs`"]),
        ({"data": "{review: clean}"}, 11, ["needs a review, but `clean` is a select stage", "write `data: clean`"]),
        ({"data": "{review: base}"}, 11, ["`judge.data.review` needs rows"]),
        ({"scorer": "{classifier: judge, label: god}"}, 13, ["`judge` has no label `god`", "did you mean `good`?"]),
        ({"scorer": "{classifier: judge, label: 2}"}, 13, ["`judge` has no label 2"]),
        ({"scorer": "{reward: judge}"}, 13, ["`judge` is not a reward model", "label: good}"]),
        ({"scorer": "{perplexity: judge}"}, 13, ["needs a model, but `judge` is a classifier stage"]),
        (
            {"held_out": "null", "scorer": "{classifier: judge, label: good, temperature: auto}"},
            13,
            ["no fitted temperature", "`eval_data`"],
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


def test_temperature_auto_is_valid_with_eval_data(load_stage: Any) -> None:
    load_stage(scorer="{classifier: judge, label: bad, temperature: auto}")


# The head.


def write_masked_model(folder: Path) -> Path:
    """Write a masked language model. It has no pooler, so a classifier gets a new pooler and a new head."""
    write_encoder(folder, ["a", "b"])
    config = json.loads((folder / "config.json").read_text())
    shape = {key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**shape, num_attention_heads=2, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def source(folder: Path) -> dict[str, Any]:
    return {"pretrained": str(folder), "revision": None}


ROWS = [
    {"messages": [{"role": "user", "content": "what is the row"}, {"role": "assistant", "content": content}]}
    for content in ("green", "blue one two", "the model")
]


@pytest.mark.parametrize("write", [write_language_model, write_masked_model])
def test_loaded_adapter_and_head_have_the_trained_logits(write: Any, tmp_path: Path) -> None:
    base = source(write(tmp_path / "base"))
    tokenizer = load_original_tokenizer(base)
    model, new_modules = load_with_new_head(base, LABELS, torch.float32)
    tuned = get_peft_model(model, lora_config(Lora(rank=2), "SEQ_CLS", new_modules))
    with torch.no_grad():  # LoRA's B matrices are initialized with zeros
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    trained = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    for module in new_modules:
        assert any(module in name and "modules_to_save" in name for name in trained), module
    tuned.eval()
    expected = SequenceClassifier(tuned.base_model.model, tokenizer, 64)(ROWS).logits
    artifact = tmp_path / "classifier-1"
    tuned.save_pretrained(artifact / "adapter")
    tokenizer.save_pretrained(artifact / "adapter")
    write_base(artifact, base)
    write_head(artifact, LABELS)
    (artifact / "manifest.json").write_text(json.dumps({"facts": {"temperature": 1.5}}))
    loaded, labels = load_classifier({"artifact": str(artifact)}, torch.float32)
    assert (labels.names, labels.independent, labels.temperature) == (LABELS, False, 1.5)
    logits = SequenceClassifier(loaded.eval(), tokenizer, 64)(ROWS).logits
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_full_model_with_a_new_head_loads_with_transformers(tmp_path: Path) -> None:
    base = source(write_language_model(tmp_path / "base"))
    model, new_modules = load_with_new_head(base, LABELS, torch.float32)
    assert new_modules == ["score"]
    model.save_pretrained(tmp_path / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert plain.config.id2label == {0: "bad", 1: "good"}
    assert plain.config.pad_token_id == load_original_tokenizer(base).pad_token_id, "required for batches"


def test_existing_head_is_kept_only_if_it_has_the_same_number_of_labels(tmp_path: Path) -> None:
    two_labels, three_labels = (write_encoder(tmp_path / str(n), [str(n) for n in range(n)]) for n in (2, 3))
    kept, new_modules = load_with_new_head(source(two_labels), LABELS, torch.float32)
    assert new_modules == []
    before = AutoModelForSequenceClassification.from_pretrained(two_labels)
    assert torch.equal(kept.classifier.weight, before.classifier.weight)
    assert load_with_new_head(source(three_labels), LABELS, torch.float32)[1] == ["classifier"]


@pytest.mark.parametrize(("configured", "expected"), [(7, 7), (None, 0), (-1, 0), (10_000, 0)])
def test_rows_are_padded_with_the_configured_token_if_it_is_valid(
    tmp_path: Path, configured: int | None, expected: int
) -> None:
    base = source(write_language_model(tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "pad_token_id": configured}))
    meta_model = weightless_model_with_head(base, LABELS)
    assert (
        set_padding_token(load_original_tokenizer(base), meta_model).pad_token_id
        == meta_model.config.pad_token_id
        == expected
    )


def test_model_with_missing_weights_is_rejected(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "base", ["a", "b"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(TuneryError, match="can't be given a classification head\ncause: it has no weights for bert"):
        load_with_new_head(source(folder), LABELS, torch.float32)


# Reporting

FACTS = {
    "rows": 10,
    "labels": {"bad": 3, "good": 5},
    "unlabelled": 2,
    "eval_labels": {"bad": 2, "good": 2},
    "eval_rows_trained_on": 1,
    "loss": 0.25,
    "eval_loss": 0.5,
    "eval_accuracy": 0.75,
    "eval_auc": 0.875,
    "temperature": 1.5,
}


def test_summary_table_of_classifiers(load_stage: Any) -> None:
    experiment, _ = load_stage()
    (table,) = training_tables(experiment, {"judge": Artifact(Path(), {"facts": FACTS}, {})})
    assert table["rows"] == [["judge", "5", "3", "4", 0.5, 0.75, 0.875, 1.5]]
    assert "2 of 10 rows have no label" in table["notes"][0]
    assert "1 of the held-out rows are also training rows" in table["notes"][1]


def test_summary_line_of_a_classifier() -> None:
    stage = StageState("judge", kind="classifier", facts=FACTS)
    assert outcome(stage) == "loss 0.250 → eval 0.500, AUC 0.88"
