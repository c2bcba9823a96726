"""Rows of trainings that read prompts or complete rows: tokens come from the token cache, labels and rows from the
artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_classifiers import write_encoder, write_language_model
from training_jobs import rows_at, training_job

from tunery.errors import StageError
from tunery.models import token_cache
from tunery.models.classifier_inputs import NO_LABEL, encode_classifier_inputs
from tunery.models.encode import Encoding, as_prompt, encode_prompts
from tunery.models.load import load_own_tokenizer, load_tokenizer
from tunery.models.prompts import NO_QUESTION, TOO_LONG
from tunery.models.row_encodings import PROMPTS
from tunery.models.token_cache import TokenCache
from tunery.models.truncation import encode
from tunery.spec import ClassifierTraining, Grpo, Ppo
from tunery.store import rows as store_rows
from tunery.store.rows import row_id
from tunery.training.classifier import ClassifierTask
from tunery.training.ppo.ptx import load_ptx_data
from tunery.training.sequences import UNUSABLE, PromptSet, read_row_sequences


def row(*turns: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(turns)]
    made = {"messages": messages, **fields}
    return {**made, "id": row_id(made), "source": "rows.jsonl", "line": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tokenizer(model: Path) -> Any:
    return load_tokenizer({"pretrained": str(model), "revision": None})


# Prompts.

QUESTIONS = [row("why", "it is so"), row("what is a row"), row("how " * 60), row("what is it", "a row", "why")]


def grpo(**fields: Any) -> Grpo:
    given = {"kind": "grpo", "data": "rows", "model": "base", "reward": "rm", "epochs": 1.0, "learning_rate": 1e-3}
    sampling = {"max_new_tokens": 24}
    return Grpo.model_validate({**given, "max_length": 64, "max_unusable": 0.5, "sampling": sampling, **fields})


def test_prompts_and_their_rows_come_from_the_cache(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*QUESTIONS, {"text": "a text", "id": f"{1:016x}"}]
    job = training_job(tmp_path, grpo(), model, rows=(rows_at(tmp_path, rows),))
    prompts = PromptSet(read_row_sequences(job, tokenizer)[0])
    asked = [as_prompt(QUESTIONS[number]) for number in (0, 1, 3)]
    assert [prompts.ids(index) for index in range(len(prompts))] == [
        item.ids for item in encode_prompts(asked, tokenizer)
    ]
    for index, prompt in enumerate(asked):
        turns = [{key: turn[key] for key in ("role", "content")} for turn in prompts.row(index)["messages"]]
        assert turns == prompt["messages"]
    assert prompts.facts() == {"rows": 5, "sequences": 3, "too_long": 1, "unusable": 1}
    reasons = [json.loads(line)["reason"] for line in (job.out / UNUSABLE).read_text().splitlines()]
    assert reasons == [TOO_LONG, NO_QUESTION]


def test_too_few_usable_prompts_end_the_stage(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    job = training_job(tmp_path, grpo(max_unusable=0.2), model, rows=(rows_at(tmp_path, QUESTIONS),))
    with pytest.raises(StageError, match=r"1 of 4 rows of `rows` \(data\) can't be trained on: 25%") as found:
        read_row_sequences(job, tokenizer)
    assert found.value.cause == f"1 row: {TOO_LONG}; the first of them: rows.jsonl:1"
    assert "max_length (now 64) or sampling.max_new_tokens (now 24)" in found.value.remedy
    short = grpo(max_length=26)
    job = training_job(tmp_path, short, model, rows=(rows_at(tmp_path, QUESTIONS),))
    with pytest.raises(StageError, match="none of the 4 rows"):
        read_row_sequences(job, tokenizer)


def test_rows_of_several_shards_and_processes_are_kept_in_order(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_rows, "SHARD", 7)
    monkeypatch.setattr(token_cache, "BATCH_ROWS", 3)
    rows = [row(f"what is row {number}") if number % 4 else row("how " * 60, str(number)) for number in range(30)]
    found = rows_at(tmp_path, rows)

    def build(at: str) -> list[str]:
        cache = TokenCache(tmp_path / at, tmp_path / "leases")
        part = cache.open_or_build(found.path, "rows", tokenizer, Encoding(40), PROMPTS)
        assert [f"{part.row_ids[index]:016x}" for index in range(len(part))] == [
            part.row(index)["id"] for index in range(len(part))
        ]
        return [part.row(index)["messages"][0]["content"] for index in range(len(part))]

    expected = [f"what is row {number}" for number in range(30) if number % 4]
    assert build("one") == expected
    monkeypatch.setattr(token_cache, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(token_cache, "available_cpus", lambda: 2)
    assert build("two") == expected


def test_rows_mixed_into_ppo_come_round_and_round_in_their_own_order(
    model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    answered = [row("why", "it is so"), row("what", "a row"), row("how", "so")]
    given = {"kind": "ppo", "data": "rows", "model": "base", "reward": "rm", "epochs": 1.0, "learning_rate": 1e-3}
    spec = Ppo.model_validate(
        {**given, "max_length": 64, "sampling": {"max_new_tokens": 8}, "ptx": {"data": "rows", "coefficient": 1.0}}
    )
    source = rows_at(tmp_path, [*answered, row("nothing is answered")])
    mixed = load_ptx_data(training_job(tmp_path, spec, model, ptx_rows=(source,)), tokenizer)
    assert mixed is not None
    prompts, responses = mixed(0, 6)
    assert (prompts[:3], responses[:3]) == (prompts[3:], responses[3:])
    expected = {
        (tuple(item.ids[: item.response[0]]), tuple(item.ids[slice(*item.response)]))
        for item in encode(answered, tokenizer, 64)
    }
    assert {(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)} == expected
    assert mixed(2, 2) == (prompts[2:4], responses[2:4])


# Labelled rows.


def classifier(**fields: Any) -> ClassifierTraining:
    given = {"kind": "classifier", "data": "rows", "model": "base", "epochs": 1.0, "learning_rate": 1e-3}
    return ClassifierTraining.model_validate({**given, "max_length": 32, **fields})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), ["bad", "good"])


def test_rows_without_a_label_are_left_out_and_are_no_fault(encoder: Path, tmp_path: Path) -> None:
    rows = [row("why", "it is so", label=True), row("what", "a row"), row("how", "so", label=False)]
    job = training_job(tmp_path, classifier(), encoder, rows=(rows_at(tmp_path, rows),))
    recipe = ClassifierTask(job, 0)
    counted = recipe.data_stats()
    assert counted["labels"] == {"bad": 1, "good": 1}
    assert (counted["rows"], counted["sequences"], counted["unlabelled"], counted["unusable"]) == (3, 2, 1, 0)
    (line,) = (job.out / UNUSABLE).read_text().splitlines()
    assert json.loads(line)["reason"] == NO_LABEL


def test_rows_of_two_stages_have_the_label_of_their_stage(encoder: Path, tmp_path: Path) -> None:
    good = rows_at(tmp_path, [row("why", "it is so", label=False), row("what", "a row")], label=True)
    bad = rows_at(tmp_path, [row("how", "so"), row("why", "it is so", label=False)], label=False)
    spec = classifier(data={"good": "one", "bad": "two"}, eval_data="held_out")
    held_out = rows_at(tmp_path, [row("why", "it is so", label=False), row("is it", "yes", label=True)])
    job = training_job(tmp_path, spec, encoder, rows=(good, bad), eval_rows=(held_out,))
    recipe = ClassifierTask(job, 0)
    counted = recipe.data_stats()
    assert counted["labels"] == {"bad": 2, "good": 2}
    assert counted["eval_rows_trained_on"] == 1
    batch = recipe._collate([0, 1, 2, 3])
    assert batch["target"].tolist() == [1, 1, 0, 0]
    # What an encoder is shown of a conversation is a pair of texts, with their token types.
    tokenizer = load_own_tokenizer({"pretrained": str(encoder), "revision": None})
    (shown,) = encode_classifier_inputs([row("what", "a row")], tokenizer, Encoding(32))
    length = len(shown.ids)
    assert batch["input_ids"][1][:length].tolist() == shown.ids
    assert batch["token_type_ids"][1][:length].tolist() == shown.token_types
    assert set(shown.token_types or ()) == {0, 1}


def test_one_label_alone_is_refused(encoder: Path, tmp_path: Path) -> None:
    rows = [row("why", "it is so", label=True), row("what", "a row")]
    job = training_job(tmp_path, classifier(), encoder, rows=(rows_at(tmp_path, rows),))
    with pytest.raises(StageError, match=r"`rows` \(data\) don't have both labels: 0 bad, 1 good, 1 without a label"):
        ClassifierTask(job, 0)
