"""Training sequences of prompts and of labelled rows: tokens come from the token cache, labels and rows from the
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
from tunery.models.load import load_original_tokenizer, load_tokenizer
from tunery.models.prompts import NO_PROMPT, TOO_LONG
from tunery.models.row_encodings import PROMPTS
from tunery.models.token_cache import TokenCache
from tunery.models.truncation import encode
from tunery.spec import ClassifierTraining, Grpo, Ppo
from tunery.store import rows as store_rows
from tunery.store.rows import row_id
from tunery.training.classifier import ClassifierTask
from tunery.training.ppo.ptx import load_ptx_data
from tunery.training.sequences import UNUSABLE, PromptSet, read_row_sequences


def row(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    fields_without_id = {"messages": messages, **fields}
    return {**fields_without_id, "id": row_id(fields_without_id), "source": "rows.jsonl", "line": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tokenizer(model: Path) -> Any:
    return load_tokenizer({"pretrained": str(model), "revision": None})


# Prompts.

QUESTIONS = [row("why", "it is so"), row("what is a row"), row("how " * 60), row("what is it", "a row", "why")]


def grpo(**fields: Any) -> Grpo:
    defaults = {"kind": "grpo", "data": "rows", "model": "base", "reward": "rm", "epochs": 1.0, "learning_rate": 1e-3}
    sampling = {"max_new_tokens": 24}
    return Grpo.model_validate({**defaults, "max_length": 64, "max_unusable": 0.5, "sampling": sampling, **fields})


def test_prompts_and_their_rows_are_read_from_the_cache(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = [*QUESTIONS, {"text": "a text", "id": f"{1:016x}"}]
    job = training_job(tmp_path, grpo(), model, data=(rows_at(tmp_path, rows),))
    prompts = PromptSet(read_row_sequences(job, tokenizer)[0])
    usable = [as_prompt(QUESTIONS[number]) for number in (0, 1, 3)]
    assert [prompts.ids(index) for index in range(len(prompts))] == [
        item.ids for item in encode_prompts(usable, tokenizer)
    ]
    for index, prompt in enumerate(usable):
        messages = [{key: message[key] for key in ("role", "content")} for message in prompts.row(index)["messages"]]
        assert messages == prompt["messages"]
    assert prompts.facts() == {"rows": 5, "sequences": 3, "too_long": 1, "unusable": 1}
    reasons = [json.loads(line)["reason"] for line in (job.out / UNUSABLE).read_text().splitlines()]
    assert reasons == [TOO_LONG, NO_PROMPT]


def test_too_few_usable_prompts_end_the_stage(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    job = training_job(tmp_path, grpo(max_unusable=0.2), model, data=(rows_at(tmp_path, QUESTIONS),))
    with pytest.raises(StageError, match=r"1 of 4 rows of `rows` \(data\) can't be trained on: 25%") as caught:
        read_row_sequences(job, tokenizer)
    assert caught.value.cause == f"1 row: {TOO_LONG}; the first of them: rows.jsonl:1"
    assert "max_length (now 64) or sampling.max_new_tokens (now 24)" in caught.value.remedy
    short = grpo(max_length=26)
    job = training_job(tmp_path, short, model, data=(rows_at(tmp_path, QUESTIONS),))
    with pytest.raises(StageError, match="none of the 4 rows"):
        read_row_sequences(job, tokenizer)


def test_rows_of_several_shards_and_processes_are_kept_in_order(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_rows, "SHARD", 7)
    monkeypatch.setattr(token_cache, "BATCH_ROWS", 3)
    rows = [row(f"what is row {number}") if number % 4 else row("how " * 60, str(number)) for number in range(30)]
    source = rows_at(tmp_path, rows)

    def build(name: str) -> list[str]:
        cache = TokenCache(tmp_path / name, tmp_path / "leases")
        tokenized = cache.open_or_build(source.path, "rows", tokenizer, Encoding(40), PROMPTS)
        assert [f"{tokenized.row_ids[index]:016x}" for index in range(len(tokenized))] == [
            tokenized.row(index)["id"] for index in range(len(tokenized))
        ]
        return [tokenized.row(index)["messages"][0]["content"] for index in range(len(tokenized))]

    expected = [f"what is row {number}" for number in range(30) if number % 4]
    assert build("one") == expected
    monkeypatch.setattr(token_cache, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(token_cache, "available_cpus", lambda: 2)
    assert build("two") == expected


def test_ptx_data_repeats_its_shuffled_rows(model: Path, tokenizer: Any, tmp_path: Path) -> None:
    answered = [row("why", "it is so"), row("what", "a row"), row("how", "so")]
    defaults = {"kind": "ppo", "data": "rows", "model": "base", "reward": "rm", "epochs": 1.0, "learning_rate": 1e-3}
    spec = Ppo.model_validate(
        {**defaults, "max_length": 64, "sampling": {"max_new_tokens": 8}, "ptx": {"data": "rows", "coefficient": 1.0}}
    )
    source = rows_at(tmp_path, [*answered, row("no response")])
    ptx_data = load_ptx_data(training_job(tmp_path, spec, model, ptx_data=(source,)), tokenizer)
    assert ptx_data is not None
    prompts, responses = ptx_data(0, 6)
    assert (prompts[:3], responses[:3]) == (prompts[3:], responses[3:])
    expected = {
        (tuple(item.ids[: item.response[0]]), tuple(item.ids[slice(*item.response)]))
        for item in encode(answered, tokenizer, 64)
    }
    assert {(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)} == expected
    assert ptx_data(2, 2) == (prompts[2:4], responses[2:4])


# Labelled rows.


def classifier(**fields: Any) -> ClassifierTraining:
    defaults = {"kind": "classifier", "data": "rows", "model": "base", "epochs": 1.0, "learning_rate": 1e-3}
    return ClassifierTraining.model_validate({**defaults, "max_length": 32, **fields})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"), ["bad", "good"])


def test_rows_without_a_label_are_skipped_and_not_counted_as_unusable(encoder: Path, tmp_path: Path) -> None:
    rows = [row("why", "it is so", label=True), row("what", "a row"), row("how", "so", label=False)]
    job = training_job(tmp_path, classifier(), encoder, data=(rows_at(tmp_path, rows),))
    task = ClassifierTask(job, 0)
    stats = task.data_stats()
    assert stats["labels"] == {"bad": 1, "good": 1}
    assert (stats["rows"], stats["sequences"], stats["unlabelled"], stats["unusable"]) == (3, 2, 1, 0)
    (line,) = (job.out / UNUSABLE).read_text().splitlines()
    assert json.loads(line)["reason"] == NO_LABEL


def test_rows_of_positive_and_negative_stages_have_the_label_of_their_stage(encoder: Path, tmp_path: Path) -> None:
    good = rows_at(tmp_path, [row("why", "it is so", label=False), row("what", "a row")], label=True)
    bad = rows_at(tmp_path, [row("how", "so"), row("why", "it is so", label=False)], label=False)
    spec = classifier(data={"good": "one", "bad": "two"}, eval_data="held_out")
    held_out = rows_at(tmp_path, [row("why", "it is so", label=False), row("is it", "yes", label=True)])
    job = training_job(tmp_path, spec, encoder, data=(good, bad), eval_data=(held_out,))
    task = ClassifierTask(job, 0)
    stats = task.data_stats()
    assert stats["labels"] == {"bad": 2, "good": 2}
    assert stats["eval_rows_trained_on"] == 1
    batch = task._collate([0, 1, 2, 3])
    assert batch["target"].tolist() == [1, 1, 0, 0]
    # An encoder gets a conversation as a pair of texts, with their token types.
    tokenizer = load_original_tokenizer({"pretrained": str(encoder), "revision": None})
    (encoded,) = encode_classifier_inputs([row("what", "a row")], tokenizer, Encoding(32))
    length = len(encoded.ids)
    assert batch["input_ids"][1][:length].tolist() == encoded.ids
    assert batch["token_type_ids"][1][:length].tolist() == encoded.token_types
    assert set(encoded.token_types or ()) == {0, 1}


def test_rows_of_one_label_only_are_rejected(encoder: Path, tmp_path: Path) -> None:
    rows = [row("why", "it is so", label=True), row("what", "a row")]
    job = training_job(tmp_path, classifier(), encoder, data=(rows_at(tmp_path, rows),))
    with pytest.raises(StageError, match=r"`rows` \(data\) don't have both labels: 0 bad, 1 good, 1 without a label"):
        ClassifierTask(job, 0)
