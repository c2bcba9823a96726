"""`dpo` and `kto`: tokens, losses against values computed by hand and by torch, row counts, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_text import LoadText
from peft import get_peft_model
from small_classifiers import write_language_model
from training_jobs import rows_at, training_job
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from tunery.errors import SpecErrors, StageError
from tunery.events.run_state import StageState
from tunery.events.stage_summary import outcome
from tunery.models.adapters import lora_config
from tunery.models.encode import Encoding
from tunery.models.encode_preferences import encode_pairs, rejected_side
from tunery.models.load import load_model, load_tokenizer, write_base
from tunery.models.truncation import encode
from tunery.spec import Dpo, Kto, Lora
from tunery.spec.trainings import Training
from tunery.store.rows import row_id
from tunery.training.distributed_eval import pad_batch
from tunery.training.dpo import DpoTask, pair_losses
from tunery.training.job import Job
from tunery.training.kto import KtoTask, kl_estimate, mismatch, response_losses, reward_margin
from tunery.training.reference_log_probs import response_log_probs

COMMON: dict[str, Any] = {"data": "rows", "model": "base", "epochs": 1, "learning_rate": 1e-3, "global_batch_size": 4}


def dpo(**fields: Any) -> Dpo:
    return Dpo(kind="dpo", **{**COMMON, **fields})


def kto(**fields: Any) -> Kto:
    return Kto(kind="kto", **{**COMMON, **fields})


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    row = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    return {**row, "id": row_id(row)}


def rated(question: str, response: str, label: bool | None) -> dict[str, Any]:
    row = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": response}],
        "label": label,
    }
    return {**row, "id": row_id(row)}


PAIRS = [pair("what is a row", "the model", "no"), pair("why", "because it is so", "red green blue")]
RATED = [rated("what is it", "the row", True), rated("why", "yes no yes", False), rated("how", "so", None)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer({"pretrained": str(model_folder), "revision": None})


@pytest.fixture
def job_of(model_folder: Path, tmp_path: Path) -> Any:
    def build(spec: Training[Any], rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]] | None = None) -> Job:
        sources = rows_at(tmp_path, rows), rows_at(tmp_path, eval_rows or [])
        eval_data = () if eval_rows is None else sources[1:]
        return training_job(tmp_path, spec, model_folder, data=sources[:1], eval_data=eval_data)

    return build


# Tokens.


def test_both_responses_have_the_tokens_of_sft(tokenizer: Any) -> None:
    rows = [{**row, "tools": None, "text": None} for row in PAIRS]
    pairs = [row.sequences for row in encode_pairs(rows, tokenizer, Encoding(64))]
    for side in (0, 1):
        encoded = encode([rejected_side(row) if side else row for row in rows], tokenizer, 64)
        assert [pair[side] for pair in pairs] == encoded
    chosen, rejected = pairs[0]
    start = rejected.response[0]
    assert chosen.ids[: chosen.response[0]] == rejected.ids[:start], "both have the same prompt"
    assert tokenizer.decode(rejected.ids[start:]) == "no<|end|>"


def test_padding_has_no_attention_and_no_label() -> None:
    batch = pad_batch([([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_log_probabilities_of_responses_equal_those_of_transformers(model_folder: Path, tokenizer: Any) -> None:
    sequences = [item for row in encode_pairs(PAIRS, tokenizer, Encoding(64)) for item in row.sequences]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = []
    with torch.no_grad():
        for item in sequences:
            log_probs = model(torch.tensor([item.ids])).logits[0].log_softmax(dim=-1)
            expected.append(sum(log_probs[index - 1, item.ids[index]] for index in item.loss_indices))
        add_fused_lm_head(model)
        actual = response_log_probs(
            model, pad_batch([(item.ids, item.labels) for item in sequences], tokenizer.pad_token_id)
        )
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_each_response_is_mismatched_once_with_another_prompt_of_the_step(job_of: Any) -> None:
    responses = KtoTask(job_of(kto(), PAIRS), 0).responses
    assert responses.sequences.row_labels.tolist() == [1, 0, 1, 0]
    mismatches = responses.mismatches([0, 1, 2, 3], batch_size=4)
    assert sorted(mismatches) == [0, 1, 2, 3], "each response is used once"
    matched = [responses.sequence(index)[0] for index in range(4)]
    for index, other in enumerate(mismatches):
        (start, _), *_ = responses.sequences.spans(index)
        ids, labels = responses.mismatched_sequence(index, other)
        assert ids[:start] == matched[index][:start]
        assert ids not in matched, "never the response of the prompt itself"
        first = responses.sequences.spans(other)[0][0]
        assert ids[start:] == [label for label in labels if label != -100] == matched[other][first:]


def test_mismatched_responses_are_of_the_same_step_and_truncated(job_of: Any) -> None:
    responses = KtoTask(job_of(kto(max_length=14, truncate="right"), PAIRS), 0).responses
    mismatches = responses.mismatches([0, 2, 1, 3], batch_size=2)
    assert mismatches[:2] == responses.mismatches([0, 2], batch_size=2) == [2, 0]
    assert (
        max(len(responses.mismatched_sequence(*pair)[0]) for pair in zip([0, 2, 1, 3], mismatches, strict=True)) == 14
    )


def test_long_prompt_is_truncated_equally_for_both_responses(tokenizer: Any) -> None:
    long = pair("why how " * 40, "because", "so it is")
    (row,) = encode_pairs([long], tokenizer, Encoding(40, truncate="left"))
    chosen, rejected = row.sequences
    assert not row.unusable
    assert max(len(chosen.ids), len(rejected.ids)) == 40
    assert chosen.ids[: chosen.response[0]] == rejected.ids[: rejected.response[0]]
    assert [tokenizer.decode(item.ids[slice(*item.response)]) for item in (chosen, rejected)] == [
        "because<|end|>",
        "so it is<|end|>",
    ]
    (dropped,) = encode_pairs([long], tokenizer, Encoding(40, truncate="drop"))
    assert "max_length (40 tokens)" in dropped.unusable


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [("ab", [1, 0]), ("aabb", [2, 3, 0, 1]), ("abc", [2, 0, 1]), ("aab", [2, 0, 1]), ("aa", [1, 0]), ("a", [0])],
)
def test_prompts_get_responses_of_different_prompts_if_possible(prompts: str, expected: list[int]) -> None:
    assert mismatch(prompts) == expected


# Losses.


def test_dpo_losses_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-1.0, 1.0])
    tokens = torch.tensor([4, 2]), torch.tensor([2, 1])

    def losses(**fields: Any) -> list[float]:
        return pair_losses(dpo(beta=0.5, **fields), chosen, rejected, *tokens).tolist()

    good, bad = math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))
    assert losses() == pytest.approx([good, bad])
    smoothed = [0.9 * good + 0.1 * math.log1p(math.exp(1.5)), 0.9 * bad + 0.1 * math.log1p(math.exp(-1.0))]
    assert losses(label_smoothing=0.1) == pytest.approx(smoothed)
    assert losses(loss="hinge") == pytest.approx([0.0, 2.0])
    assert losses(loss="ipo") == pytest.approx([(0.5 + 0.5 - 1) ** 2, (-0.5 - 1 - 1) ** 2])


def test_kto_losses_by_hand() -> None:
    ratios, desirable = torch.tensor([3.0, -1.0, 1.0]), torch.tensor([True, True, False])
    spec = kto(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    losses = response_losses(spec, ratios, desirable, torch.tensor(1.0)).tolist()
    assert losses == pytest.approx([2 * (1 - 1 / (1 + math.exp(-1))), 2 * (1 - 1 / (1 + math.exp(1))), 1.5])


def test_kl_estimate_is_never_negative_and_margin_requires_both_kinds() -> None:
    assert kl_estimate(torch.tensor([1.0, 3.0])).item() == 2.0
    assert kl_estimate(torch.tensor([1.0, -3.0])).item() == 0.0
    assert reward_margin(torch.tensor([1.0, 3.0, 1.0]), torch.tensor([True, True, False])) == 1.0
    assert reward_margin(torch.tensor([1.0]), torch.tensor([True])) is None


# The model.


def test_merged_adapter_has_no_frozen_weights(model_folder: Path, tmp_path: Path) -> None:
    source = {"pretrained": str(model_folder), "revision": None}
    tuned = get_peft_model(load_model(source, torch.float32), lora_config(Lora(rank=2), "CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "sft-1" / "adapter")
    write_base(tmp_path / "sft-1", source)
    merged = load_model({"artifact": str(tmp_path / "sft-1")}, torch.float32)
    assert all(weight.requires_grad for weight in merged.parameters())


# Row counts and errors.


def test_unusable_pairs_are_counted(job_of: Any) -> None:
    same_after_truncation = pair("what", "the model the model the model one", "the model the model the model two")
    rows = [*PAIRS, pair("what", "", "no"), RATED[0], same_after_truncation, pair("why how " * 20, "a", "b")]
    task = DpoTask(
        job_of(dpo(eval_data="held_out", max_length=20, max_unusable=1, truncate="right"), rows, PAIRS[:1]), 0
    )
    stats = task.data_stats()
    assert stats["rows"] == 6
    assert stats["sequences"] + stats["unusable"] == 6
    assert stats["sequences"] == len(task.examples.lengths) == 2, "an empty response is unusable"
    assert stats["eval_rows"] == 1


def test_kto_trains_on_rated_rows_and_both_responses_of_pairs(job_of: Any) -> None:
    stats = KtoTask(job_of(kto(max_unusable=0.2), [*RATED, *PAIRS]), 0).data_stats()
    expected = {"rows": 5, "sequences": 6, "wanted": 3, "unwanted": 3, "truncated": 0, "unusable": 1, "eval_rows": 0}
    assert {name: stats[name] for name in expected} == expected
    assert stats["unusable_because"] == {"it has no label": 1}


def test_rows_without_pairs_are_rejected(job_of: Any) -> None:
    with pytest.raises(StageError, match=r"none of the 3 rows of `rows` \(data\)") as caught:
        DpoTask(job_of(dpo(), RATED), 0)
    assert caught.value.cause == "3 rows: it is not a preference pair"
    assert "`chosen` and `rejected`" in caught.value.remedy
    with pytest.raises(StageError, match=r"none of the 3 rows of `held_out` \(eval_data\)"):
        DpoTask(job_of(dpo(eval_data="held_out"), PAIRS, RATED), 0)


def test_more_unusable_rows_than_allowed_end_the_stage_with_an_example(job_of: Any) -> None:
    rows = [*PAIRS, {**RATED[0], "source": "pairs.jsonl", "line": 7}]
    with pytest.raises(StageError, match=r"1 of 3 rows of `rows` \(data\) can't be trained on: 33%") as caught:
        DpoTask(job_of(dpo(), rows), 0)
    assert "max_unusable is 0.1" in caught.value.message
    assert "pairs.jsonl:7" in caught.value.cause
    assert len(DpoTask(job_of(dpo(max_unusable=0.5), rows), 0).examples) == 2


def test_responses_of_one_kind_only_are_rejected(job_of: Any) -> None:
    with pytest.raises(StageError, match="the 2 rows of `data` give 1 desirable and 0 undesirable responses") as caught:
        KtoTask(job_of(kto(max_unusable=0.5), [RATED[0], RATED[2]]), 0)
    assert "1 rows are unusable" in caught.value.cause


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("kind: dpo, loss: ipo, label_smoothing: 0.1", "`label_smoothing` requires `loss: sigmoid`, but `loss` is ipo"),
        ("kind: dpo, label_smoothing: 0.5", "less than 0.5"),
        ("kind: kto, global_batch_size: 1", "responses are compared with those to other prompts of the step"),
    ],
)
def test_invalid_fields_are_rejected(load_text: LoadText, fields: str, message: str) -> None:
    with pytest.raises(SpecErrors, match=message.replace("(", r"\(")):
        load_text(
            "name: x\nseed: 1\nstages:\n"
            "  rows: {kind: dataset, source: rows.jsonl}\n"
            f"  tuned: {{{fields}, data: rows, model: {{pretrained: ./base}}, epochs: 1, learning_rate: 1e-4}}\n"
        )


# Reporting


def test_summary_lines_of_dpo_and_kto() -> None:
    facts = {"loss": 0.5, "eval_loss": 0.625, "eval_accuracy": 0.75, "eval_margin": 1.25}
    assert outcome(StageState("a", kind="dpo", facts=facts)) == "loss 0.500 → eval 0.625, accuracy 0.75"
    assert outcome(StageState("a", kind="kto", facts=facts)) == "loss 0.500 → eval 0.625, margin 1.25"
