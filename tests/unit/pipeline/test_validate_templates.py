"""`validate` and `plan` on the first rows: estimates, errors, and generation prompts that open a thinking block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText
from template_tokenizers import tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

from tunery.errors import SpecErrors
from tunery.pipeline.validate import validate
from tunery.pipeline.validate_templates import template_notes
from tunery.store import Store

SYSTEM = {"role": "system", "content": "be brief"}
QUESTION = {"role": "user", "content": "where"}
RESPONSE = {"role": "assistant", "content": "in Paris"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(template: str, rows: list[list[dict[str, Any]]], fields: str = "") -> str:
        tokenizer = tokenizer_of(template)
        folder = tmp_path / "model"
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        return (
            "name: x\nseed: 1\nstages:\n  rows: {kind: dataset, source: rows.jsonl}\n"
            "  sft: {kind: sft, data: rows, model: {pretrained: ./model}, epochs: 1, learning_rate: 1e-4, "
            f"max_length: 64{fields}}}\n"
        )

    return write


def notes(load_text: LoadText, text: str, folder: Path) -> dict[str, str]:
    experiment, source = load_text(text)
    validate(experiment, source, Store(folder / "store"), 1, 1)
    return template_notes(experiment, folder)


def test_rejected_rows_are_estimated(load_text: LoadText, write: Any, tmp_path: Path) -> None:
    text = write("gemma", [[SYSTEM, QUESTION, RESPONSE], [QUESTION, RESPONSE]])
    assert notes(load_text, text, tmp_path) == {
        "sft": "of the first 2 rows: 50% unusable (1 x the chat template fails: System role not supported), "
        "more than max_unusable (0.1): the stage would fail"
    }


def test_usable_rows_have_no_note(load_text: LoadText, write: Any, tmp_path: Path) -> None:
    assert notes(load_text, write("qwen3", [[QUESTION, RESPONSE]]), tmp_path) == {}


def test_template_that_rejects_every_row_is_an_error(load_text: LoadText, write: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecErrors) as caught:
        notes(load_text, write("gemma", [[SYSTEM, QUESTION, RESPONSE]]), tmp_path)
    assert "none of the 1 rows of `rows` can be used with `./model`" in str(caught.value)
    assert "1 row: the chat template fails: System role not supported" in str(caught.value)


def test_error_for_too_long_rows_names_max_length(load_text: LoadText, write: Any, tmp_path: Path) -> None:
    text = write("qwen3", [[QUESTION, {**RESPONSE, "content": "in Paris " * 80}]], ", truncate: drop")
    with pytest.raises(SpecErrors) as caught:
        notes(load_text, text, tmp_path)
    assert "longer than max_length (64 tokens)" in str(caught.value)
    assert "raise max_length (now 64)" in str(caught.value)


def test_generation_prompt_that_opens_thinking_is_noted_for_rows_without_it(
    load_text: LoadText, write: Any, tmp_path: Path
) -> None:
    without_reasoning = notes(load_text, write("deepseek_r1_distill", [[QUESTION, RESPONSE]]), tmp_path)
    assert "which rows without reasoning do not have in training" in without_reasoning["sft"]
    reasoned = [[QUESTION, {**RESPONSE, "reasoning_content": "because"}]]
    assert notes(load_text, write("deepseek_r1_distill", reasoned), tmp_path) == {}
