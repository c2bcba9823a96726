"""`grpo` and `rloo` before they train: reward models and functions, prompts, batches of groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_text import LoadText
from small_classifiers import write_language_model, write_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tunery.errors import SpecErrors, TuneryError
from tunery.models.encode import as_prompt, encode_prompts
from tunery.models.load import load_tokenizer
from tunery.models.reward_functions import RewardFn, load_reward
from tunery.models.truncation import encode
from tunery.pipeline.plan import make_plan
from tunery.pipeline.validate import validate
from tunery.spec import Grpo
from tunery.store import Store
from tunery.training.auto import resolve_auto
from tunery.training.batches import plan_training


def row(*contents: str, **columns: Any) -> dict[str, Any]:
    """Return a conversation of alternating user and assistant messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text, "tool_calls": None} for n, text in enumerate(contents)]
    return {"messages": messages, "tools": None, **columns}


PROMPTS = [row("what is the row"), row("why", "because", "how")]
RESPONSES = ["green", "the model"]


def python_reward(tmp_path: Path, body: str) -> RewardFn:
    path = tmp_path / "reward.py"
    path.write_text(f"def reward(prompts, responses):\n    {body}\n")
    return load_reward({"python": str(path), "function": "reward"}, torch.float32, torch.device("cpu"), 64)


# Rewards.


def test_python_reward_maps_texts_to_numbers(tmp_path: Path) -> None:
    reward_fn = python_reward(tmp_path, "return [len(p) + len(a) for p, a in zip(prompts, responses)]")
    assert reward_fn(PROMPTS, RESPONSES) == [15 + 5, len("how") + 9], "the prompt is the last user message"


def test_python_reward_may_return_numpy_and_torch_values(tmp_path: Path) -> None:
    assert python_reward(tmp_path, "import numpy; return numpy.array([0.5, 1])")(PROMPTS, RESPONSES) == [0.5, 1.0]
    assert python_reward(tmp_path, "import torch; return torch.tensor([0.5, 1])")(PROMPTS, RESPONSES) == [0.5, 1.0]
    assert python_reward(tmp_path, "return [True, 2]")(PROMPTS, RESPONSES) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "gave 1 rewards for 2 responses"),
        ("return None", "gave a NoneType"),
        ("return '12'", "gave a str"),
        ("return 0.5", "gave a float"),
        ("return [1.0, '2']", "gave '2' for the response 'the model'"),
        ("return [1.0, float('inf')]", "gave inf"),
        ("return 1 / 0", "failed\ncause: ZeroDivisionError: division by zero, at line 2"),
    ],
)
def test_invalid_return_value_is_an_error_with_value_cause_and_remedy(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(TuneryError) as caught:
        python_reward(tmp_path, body)(PROMPTS, RESPONSES)
    assert message in str(caught.value)
    assert caught.value.message.startswith("the reward `reward` of reward.py")
    assert caught.value.remedy


def test_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("import nowhere_to_be_found\ndef reward(prompts, responses): ...\n")
    with pytest.raises(TuneryError, match=r"can't be loaded\ncause: ModuleNotFoundError: .* at line 1"):
        load_reward({"python": str(path), "function": "reward"}, torch.float32, torch.device("cpu"), 64)


def test_reward_model_gets_conversations_by_its_own_tokenizer_and_template(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "rm")
    rewards = load_reward({"pretrained": str(folder), "revision": None}, torch.float32, torch.device("cpu"), 64)(
        PROMPTS, RESPONSES
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt["messages"]]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}], return_dict=False)
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits.item())
    np.testing.assert_allclose(rewards, expected, atol=1e-4)


def test_classifier_with_two_labels_is_rejected(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(TuneryError, match="is not a reward model: it has 2 labels"):
        load_reward({"pretrained": str(folder), "revision": None}, torch.float32, torch.device("cpu"), 64)


# Prompts.


def test_prompt_ends_where_the_response_starts_in_training(tmp_path: Path) -> None:
    tokenizer = load_tokenizer({"pretrained": str(write_language_model(tmp_path / "base")), "revision": None})
    conversation = row("what is the row", "the model", "why", "because")
    (encoded,) = encode([conversation], tokenizer, 100)
    (prompt,) = encode_prompts([as_prompt(conversation)], tokenizer)
    assert prompt.ids == encoded.ids[: encoded.response[0]]


# Groups in a step.


def grpo(**fields: Any) -> Grpo:
    common = {"data": "rows", "model": "base", "epochs": 1, "learning_rate": 1e-3, "reward": {"python": "reward.py"}}
    return Grpo.model_validate({"kind": "grpo", **common, **fields})


def test_batch_size_counts_responses_and_epochs_count_prompts() -> None:
    batching = plan_training(grpo(epochs=2, group_size=4, global_batch_size=16), 10, 2, "auto")
    assert (batching.steps, batching.micro_batch_size, batching.gradient_accumulation_steps) == (5, 4, 2)
    twice = plan_training(grpo(epochs=2, group_size=4, global_batch_size=16, iterations=2), 10, 2, "auto")
    assert twice.steps == 10


def test_auto_batch_size_is_a_multiple_of_the_group_size() -> None:
    resolved, (field,) = resolve_auto(grpo(group_size=6), 100)
    assert resolved.global_batch_size == 12
    assert field.rule == "fewer than 1,000 rows, a multiple of 6"


TEXT = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: rows.jsonl}
  base: {kind: pretrain, data: rows, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  tuned: {kind: KIND, data: rows, model: base, FIELDS epochs: 1, learning_rate: 1e-4}
"""
REWARD = "reward: {python: reward.py},"


@pytest.fixture
def load_stage(tmp_path: Path, load_text: LoadText) -> Any:
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text("def reward(prompts, responses): return [0.0] * len(prompts)\n")

    def load_it(kind: str, fields: str, workers: int = 1) -> Any:
        experiment, source = load_text(TEXT.replace("KIND", kind).replace("FIELDS", fields))
        validate(experiment, source, Store(tmp_path / "store"), workers, 1)
        return experiment, source

    return load_it


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("group_size: 4, global_batch_size: 6,", "`global_batch_size` (6) counts responses: it must be a multiple of"),
        ("sampling: {temperature: 0},", "must be above 0"),
        ("sampling: {max_new_tokens: 512},", "must be above `max_new_tokens`"),
        ("loss: bnpo,", 'can\'t be "bnpo"'),
    ],
)
def test_invalid_sampling_fields_are_rejected(load_stage: Any, fields: str, message: str) -> None:
    with pytest.raises(SpecErrors) as caught:
        load_stage("grpo", REWARD + fields)
    assert message in str(caught.value)


def test_batch_that_cannot_be_split_over_the_workers_is_rejected(load_stage: Any) -> None:
    with pytest.raises(SpecErrors, match="global_batch_size 6 can't be split over 4 workers"):
        load_stage("rloo", REWARD + "group_size: 3, global_batch_size: 6,", workers=4)


@pytest.mark.parametrize(
    ("kind", "fields", "copies"),
    [
        ("dpo", "", 1),
        ("dpo", "reference_free: true,", 0),
        ("dpo", "tuner: {lora: {}},", 0),
        ("kto", "", 1),
        ("grpo", REWARD, 0),
        ("grpo", REWARD + "beta: 0.1,", 1),
    ],
)
def test_plan_includes_the_memory_of_a_separate_reference_model(
    load_stage: Any, tmp_path: Path, kind: str, fields: str, copies: int
) -> None:
    def memory(kind: str, fields: str) -> int:
        experiment, source = load_stage(kind, fields)
        planned = {stage.name: stage for stage in make_plan(experiment, source, Store(tmp_path / "store")).stages}
        assert planned["tuned"].memory_bytes is not None
        return planned["tuned"].memory_bytes

    same_tuner = "tuner: {lora: {}}," if "lora" in fields else ""
    assert memory(kind, fields) - memory("sft", same_tuner) == copies * 4 * 1_066_112


def test_plan_counts_both_responses_of_a_pair_in_kto(load_stage: Any, tmp_path: Path) -> None:
    steps = {}
    for kind in ("dpo", "kto"):
        experiment, source = load_stage(kind, "global_batch_size: 2,")
        planned = {stage.name: stage for stage in make_plan(experiment, source, Store(tmp_path / "store")).stages}
        steps[kind] = planned["tuned"].steps
    assert steps == {"dpo": 3, "kto": 6}
