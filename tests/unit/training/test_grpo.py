"""`grpo` and `rloo` before they train: rewards of models and functions, prompts, groups of responses in a step."""

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
from tunery.training.auto import resolve
from tunery.training.batches import plan_training


def row(*turns: str, **columns: Any) -> dict[str, Any]:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text, "tool_calls": None} for n, text in enumerate(turns)]
    return {"messages": said, "tools": None, **columns}


PROMPTS = [row("what is the row"), row("why", "because", "how")]
ANSWERS = ["green", "the model"]


def function(tmp_path: Path, body: str) -> RewardFn:
    path = tmp_path / "reward.py"
    path.write_text(f"def reward(prompts, responses):\n    {body}\n")
    return load_reward({"python": str(path), "function": "reward"}, torch.float32, torch.device("cpu"), 64)


# Rewards.


def test_function_gets_texts_and_gives_a_number_each(tmp_path: Path) -> None:
    asked = function(tmp_path, "return [len(p) + len(a) for p, a in zip(prompts, responses)]")
    assert asked(PROMPTS, ANSWERS) == [15 + 5, len("how") + 9], "of several turns the last question"


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    assert function(tmp_path, "import numpy; return numpy.array([0.5, 1])")(PROMPTS, ANSWERS) == [0.5, 1.0]
    assert function(tmp_path, "import torch; return torch.tensor([0.5, 1])")(PROMPTS, ANSWERS) == [0.5, 1.0]
    assert function(tmp_path, "return [True, 2]")(PROMPTS, ANSWERS) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "told"),
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
def test_what_a_function_must_not_return_is_told_with_value_cause_and_remedy(
    tmp_path: Path, body: str, told: str
) -> None:
    with pytest.raises(TuneryError) as found:
        function(tmp_path, body)(PROMPTS, ANSWERS)
    assert told in str(found.value)
    assert found.value.message.startswith("the reward `reward` of reward.py")
    assert found.value.remedy


def test_file_that_fails_when_it_is_loaded_is_told(tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("import nowhere_to_be_found\ndef reward(prompts, responses): ...\n")
    with pytest.raises(TuneryError, match=r"can't be loaded\ncause: ModuleNotFoundError: .* at line 1"):
        load_reward({"python": str(path), "function": "reward"}, torch.float32, torch.device("cpu"), 64)


def test_reward_model_sees_conversations_as_its_own_tokenizer_and_template_have_them(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "rm")
    found = load_reward({"pretrained": str(folder), "revision": None}, torch.float32, torch.device("cpu"), 64)(
        PROMPTS, ANSWERS
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    wanted = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in prompt["messages"]]
        ids = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], return_dict=False)
        with torch.no_grad():
            wanted.append(model(torch.tensor([ids])).logits.item())
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_classifier_of_two_labels_is_no_reward(tmp_path: Path) -> None:
    folder = write_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(TuneryError, match="is not a reward model: it has 2 labels"):
        load_reward({"pretrained": str(folder), "revision": None}, torch.float32, torch.device("cpu"), 64)


# Prompts.


def test_generation_begins_where_training_finds_the_answer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer({"pretrained": str(write_language_model(tmp_path / "base")), "revision": None})
    whole = row("what is the row", "the model", "why", "because")
    (encoded,) = encode([whole], tokenizer, 100)
    (prompt,) = encode_prompts([as_prompt(whole)], tokenizer)
    assert prompt.ids == encoded.ids[: encoded.response[0]]


# Groups in a step.


def grpo(**fields: Any) -> Grpo:
    common = {"data": "rows", "model": "base", "epochs": 1, "learning_rate": 1e-3, "reward": {"python": "reward.py"}}
    return Grpo.model_validate({"kind": "grpo", **common, **fields})


def test_batch_counts_answers_and_epochs_count_prompts() -> None:
    batching = plan_training(grpo(epochs=2, group_size=4, global_batch_size=16), 10, 2, "auto")
    assert (batching.steps, batching.micro_batch_size, batching.accumulation) == (5, 4, 2)
    twice = plan_training(grpo(epochs=2, group_size=4, global_batch_size=16, iterations=2), 10, 2, "auto")
    assert twice.steps == 10


def test_auto_batch_holds_whole_groups() -> None:
    resolved, (said,) = resolve(grpo(group_size=6), 100)
    assert resolved.global_batch_size == 12
    assert said.rule == "fewer than 1,000 rows, a multiple of 6"


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
    ("fields", "told"),
    [
        ("group_size: 4, global_batch_size: 6,", "`global_batch_size` (6) counts responses: it must be a multiple of"),
        ("sampling: {temperature: 0},", "must be above 0"),
        ("sampling: {max_new_tokens: 512},", "must be above `max_new_tokens`"),
        ("loss: bnpo,", 'can\'t be "bnpo"'),
    ],
)
def test_what_cannot_be_drawn_is_refused(load_stage: Any, fields: str, told: str) -> None:
    with pytest.raises(SpecErrors) as found:
        load_stage("grpo", REWARD + fields)
    assert told in str(found.value)


def test_batch_that_workers_cannot_share_is_refused(load_stage: Any) -> None:
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
def test_plan_counts_the_reference_where_it_is_a_second_copy(
    load_stage: Any, tmp_path: Path, kind: str, fields: str, copies: int
) -> None:
    def memory(kind: str, fields: str) -> int:
        experiment, source = load_stage(kind, fields)
        planned = {stage.name: stage for stage in make_plan(experiment, source, Store(tmp_path / "store")).stages}
        assert planned["tuned"].memory_bytes is not None
        return planned["tuned"].memory_bytes

    same_tuner = "tuner: {lora: {}}," if "lora" in fields else ""
    assert memory(kind, fields) - memory("sft", same_tuner) == copies * 4 * 1_066_112


def test_plan_counts_both_answers_of_a_pair_that_kto_learns_from(load_stage: Any, tmp_path: Path) -> None:
    steps = {}
    for kind in ("dpo", "kto"):
        experiment, source = load_stage(kind, "global_batch_size: 2,")
        planned = {stage.name: stage for stage in make_plan(experiment, source, Store(tmp_path / "store")).stages}
        steps[kind] = planned["tuned"].steps
    assert steps == {"dpo": 3, "kto": 6}
