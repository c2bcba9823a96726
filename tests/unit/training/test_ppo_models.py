"""PPO models: adapters on one base are equivalent to separate models. Micro batches and their sharding."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_classifiers import write_language_model, write_reward_model
from training_jobs import training_job
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tunery.errors import StageError, TuneryError
from tunery.models.encode import template_suffix_ids
from tunery.models.load import write_base
from tunery.spec import Ppo
from tunery.training.job import Job
from tunery.training.ppo.build import Models, build_models
from tunery.training.ppo.models import POLICY, REWARD, VALUE, active_adapter, recompute_with_same_adapter
from tunery.training.ppo.rollouts import MicroBatch, Rollouts, micro_batch, minibatches, shard_by_length

CPU = torch.device("cpu")
ROLLOUTS = Rollouts(
    prompt_indices=[0, 1, 2],
    prompts=[[5, 6, 7], [9], [10, 11, 12, 13, 14]],
    responses=[[20, 21], [30, 31, 32, 33], [1]],
    ended=[False, False, True],
    sampler_log_probs=[[0.0] * 2, [0.0] * 4, [0.0]],
)


def spec(**fields: object) -> Ppo:
    defaults = {"kind": "ppo", "data": "d", "model": "m", "reward": "r", "epochs": 1.0, "learning_rate": 1.0}
    return Ppo.model_validate({**defaults, **fields})


def job(policy: Path, reward: dict, **fields: object) -> Job:
    return training_job(Path(), spec(**fields), policy, seed=17, reward=reward, out=Path())


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward"), pad=0)


@pytest.fixture(scope="module")
def reward_artifact(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Path:
    """Write the artifact of a `reward` stage with LoRA on `policy`; all weights of the adapter are random."""
    folder = tmp_path_factory.mktemp("store") / "reward-0"
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=0)
    config = LoraConfig(r=3, target_modules="all-linear", exclude_modules=["score"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder / "adapter")
    write_base(folder, {"pretrained": str(policy), "revision": None})
    (folder / "head.json").write_text(json.dumps({"labels": ["reward"]}))
    manifest = {"kind": "reward", "facts": {"reward_mean": 0.5, "reward_std": 2.0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def build(job: Job) -> Models:
    torch.manual_seed(17)
    return build_models(job, AutoTokenizer.from_pretrained(job.model["pretrained"]), torch.float32, CPU)


def batch() -> MicroBatch:
    return micro_batch(ROLLOUTS, [2, 0, 1], CPU)


# Batches.


def test_micro_batch_has_the_index_of_the_token_before_each_response_token() -> None:
    assert batch().tokens_n.tolist() == [1, 20, 21, 30, 31, 32, 33]
    ids = batch().ids_bs.flatten()
    assert ids[batch().state_indices_n].tolist() == [14, 7, 20, 9, 30, 31, 32]
    assert ids[batch().last_b].tolist() == [1, 21, 33]


def test_select_returns_the_values_of_the_micro_batch() -> None:
    values_bt = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0], [7.0, 0.0, 0.0, 0.0]])
    assert batch().select(values_bt).tolist() == [7, 1, 2, 3, 4, 5, 6]


def test_template_suffix_is_appended_to_ended_responses() -> None:
    with_suffix = ROLLOUTS.with_template_suffix([8, 9])
    assert with_suffix.responses == [[20, 21], [30, 31, 32, 33], [1, 8, 9]]
    micro = micro_batch(with_suffix, [2, 0], CPU)
    assert micro.ids_bs.flatten()[micro.last_b].tolist() == [9, 21]
    assert ROLLOUTS.with_template_suffix([]) is ROLLOUTS


@pytest.mark.parametrize(("suffix", "num_tokens"), [("", 0), ("\n", 1)])
def test_template_suffix_ids(policy: Path, suffix: str, num_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>" + suffix)
    ids = template_suffix_ids(tokenizer, [tokenizer.eos_token_id])
    assert (len(ids), tokenizer.decode(ids)) == (num_tokens, suffix)


def test_workers_get_equal_shares_sorted_by_length() -> None:
    lengths = [5, 9, 1, 7, 3, 8]
    shares = [shard_by_length(range(6), lengths, rank, 2) for rank in range(2)]
    assert shares == [[1, 3, 4], [5, 0, 2]]


def test_minibatches_differ_between_epochs_and_are_reproducible() -> None:
    first, second = (minibatches(8, 2, 17, 3, epoch) for epoch in (0, 1))
    assert sorted(index for minibatch in first for index in minibatch) == list(range(8))
    assert first != second
    assert first == minibatches(8, 2, 17, 3, 0)


# Separate models.


def test_outputs_of_separate_models_equal_those_of_transformers(policy: Path, reward: Path) -> None:
    models = build(job(policy, {"pretrained": str(reward), "revision": None}))
    assert (models.value_init, models.trained.shared, models.reward_fn) == ("reward", False, None)
    with torch.no_grad():
        outputs = models.trained("policy", batch(), 0.8)
        assert models.reference is not None
        reference = models.reference(batch(), 0.8)[0]
        assert models.reward is not None
        scores = models.reward(batch().ids_bs, batch().last_b)
        language_model = AutoModelForCausalLM.from_pretrained(policy)
        reward_model = AutoModelForSequenceClassification.from_pretrained(reward)
        expected, values = [], []
        for row in (2, 0, 1):
            ids = torch.tensor([ROLLOUTS.prompts[row] + ROLLOUTS.responses[row]])
            count = len(ROLLOUTS.responses[row])
            logits = language_model(ids).logits[0, -count - 1 : -1] / 0.8
            expected += logits.log_softmax(1)[range(count), ROLLOUTS.responses[row]].tolist()
            values += reward_model.score(reward_model.model(ids).last_hidden_state)[0, -count - 1 : -1, 0].tolist()
            assert float(scores[[2, 0, 1].index(row)]) == pytest.approx(float(reward_model(ids).logits), abs=1e-5)
    assert outputs["log_probs"].tolist() == pytest.approx(expected, abs=1e-5)
    assert reference.tolist() == pytest.approx(expected, abs=1e-5)
    assert outputs["values"].tolist() == pytest.approx(values, abs=1e-5)


def test_value_model_is_initialized_from_the_policy_with_a_python_reward(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def reward(prompts, responses):\n    return [len(a) for a in responses]\n")
    models = build(job(policy, {"python": str(tmp_path / "r.py"), "function": "reward"}))
    assert models.value_init == "policy"
    assert models.reward_fn is not None
    prompts = [{"messages": [{"role": "user", "content": "?"}]}] * 2
    assert models.reward_fn(prompts, ["abc", ""]) == [3.0, 0.0]


def test_chunked_logits_have_the_same_gradients(policy: Path, reward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
        outputs = trained("policy", batch(), 0.8, "gradient")
        (outputs["log_probs"].sum() + 0.1 * outputs["entropy"].sum()).backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    unchunked = gradients(build(job(policy, {"pretrained": str(reward), "revision": None})).trained)
    monkeypatch.setattr("tunery.models.token_log_probs.LOGIT_BYTES", 4 * 300 * 3)  # three tokens
    chunked = gradients(build(job(policy, {"pretrained": str(reward), "revision": None})).trained)
    assert unchunked.keys() == chunked.keys()
    for name, gradient in unchunked.items():
        torch.testing.assert_close(chunked[name], gradient, msg=name)


# Models on one base.


@pytest.fixture
def shared(policy: Path, reward_artifact: Path) -> Models:
    models = build(job(policy, {"artifact": str(reward_artifact)}, tuner={"lora": {"rank": 2}}))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in models.trained.named_parameters():
        if f"lora_B.{POLICY}" in name or f"lora_B.{VALUE}" in name:  # LoRA begins with zeros, which would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return models


def test_adapters_on_one_base_have_the_outputs_of_separate_models(
    shared: Models, policy: Path, reward_artifact: Path
) -> None:
    trained = shared.trained
    assert (trained.shared, shared.reference, shared.reward, shared.value_init) == (True, None, None, "reward")
    with torch.no_grad():
        outputs = trained("policy", batch())
        language_model = AutoModelForCausalLM.from_pretrained(policy)
        separate = build(job(policy, {"artifact": str(reward_artifact)}))
        assert separate.reward is not None
        assert separate.reference is not None
        torch.testing.assert_close(trained("reference", batch())["log_probs"], separate.reference(batch(), 1.0)[0])
        scores = separate.reward(batch().ids_bs, batch().last_b)
        torch.testing.assert_close(trained("reward", batch())["scores"], scores, atol=1e-5, rtol=1e-5)
        # The policy's adapter merged into the base by hand.
        for name, weight in language_model.named_parameters():
            weights = {
                key: value
                for key, value in trained.policy.model.named_parameters()
                if key.startswith(name.removesuffix("weight"))
            }
            a, b = (next((value for key, value in weights.items() if f"lora_{x}.{POLICY}." in key), None) for x in "AB")
            if a is not None and b is not None:
                weight += 2.0 * b @ a  # alpha / rank is 2
        ids = batch().ids_bs
        merged = language_model(ids).logits.flatten(0, 1)[batch().state_indices_n].log_softmax(1)
        torch.testing.assert_close(outputs["log_probs"], merged[range(7), batch().tokens_n], atol=1e-5, rtol=1e-5)


def test_one_backward_pass_reaches_all_trained_weights_of_policy_and_value(shared: Models) -> None:
    outputs = shared.trained("policy", batch())
    (outputs["log_probs"].sum() + outputs["values"].sum()).backward()
    trainable = {name for name, parameter in shared.trained.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in shared.trained.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable
    kinds = {name.split(".")[-2] for name in trainable if "lora_" in name}
    assert kinds == {POLICY, VALUE}
    assert not [name for name in trainable if REWARD in name.split(".")]


def test_gradient_checkpointing_recomputes_with_the_same_adapter(shared: Models) -> None:
    def gradients(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
        outputs = trained("policy", batch())
        (outputs["log_probs"].sum() + 3 * outputs["values"].sum()).backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    checkpointed = copy.deepcopy(shared.trained).train()
    model = checkpointed.policy.model
    kwargs = {"use_reentrant": False, "context_fn": recompute_with_same_adapter(checkpointed.adapter_layers)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    expected, actual = gradients(shared.trained), gradients(checkpointed)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_active_adapter_is_restored_after_an_error(shared: Models) -> None:
    layer = next(m for m in shared.trained.modules() if hasattr(m, "_active_adapter"))
    previous = (layer._active_adapter, layer._disable_adapters)
    with pytest.raises(KeyError), active_adapter(shared.trained.adapter_layers, None):
        raise KeyError
    assert (layer._active_adapter, layer._disable_adapters) == previous


def test_one_base_takes_about_a_quarter_of_the_memory_of_four_models(shared: Models) -> None:
    base_bytes = shared.unshared_weight_bytes / 4
    assert base_bytes < shared.weight_bytes < 1.7 * base_bytes  # adapters are large relative to a model this small
    base = AutoModelForCausalLM.from_pretrained(shared.trained.policy.model.config._name_or_path)
    assert base_bytes == sum(weights.numel() * 4 for weights in base.parameters())


# Invalid rewards.


def test_reward_model_with_another_tokenizer_requires_allow_retokenize(policy: Path, tmp_path: Path) -> None:
    from tunery.models.scratch import train_tokenizer

    other = write_reward_model(tmp_path, pad=0)
    train_tokenizer(["another text altogether " * 3], 290).save_pretrained(other)
    origin = {"pretrained": str(other), "revision": None}
    with pytest.raises(StageError, match="has another tokenizer") as caught:
        build(job(policy, origin))
    assert "allow_retokenize: true" in caught.value.remedy
    models = build(job(policy, origin, allow_retokenize=True))
    assert (models.reward, models.value_init) == (None, "policy")
    assert models.reward_fn is not None
    assert len(models.reward_fn([{"messages": [{"role": "user", "content": "why"}]}], ["because"])) == 1


def test_reward_model_with_two_outputs_is_rejected(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneryError, match="it has 2 labels"):
        build(job(policy, {"pretrained": str(write_reward_model(tmp_path, pad=0, labels=2)), "revision": None}))


def test_value_model_cannot_be_initialized_from_a_python_reward(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def reward(prompts, responses):\n    return [0] * len(responses)\n")
    origin = {"python": str(tmp_path / "r.py"), "function": "reward"}
    with pytest.raises(StageError, match="can't be initialized from this reward"):
        build(job(policy, origin, value_init="reward"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "gave 1 rewards for 2 responses"),
        ("return [1.0, float('nan')]", "gave nan for the response 'b'"),
        ("return [1.0, None]", "gave None"),
        ("return ['x', 1]", "gave 'x'"),
        ("return 1 / 0", "failed"),
    ],
)
def test_invalid_python_rewards_are_an_error(policy: Path, tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "r.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    models = build(job(policy, {"python": str(tmp_path / "r.py"), "function": "reward"}))
    assert models.reward_fn is not None
    with pytest.raises(TuneryError, match=message):
        models.reward_fn([{"messages": [{"role": "user", "content": "?"}]}] * 2, ["a", "b"])
