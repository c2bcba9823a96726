"""PPO models: adapters on one base are equivalent to separate models; batches and how they are sharded."""

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
    rows=[0, 1, 2],
    prompts=[[5, 6, 7], [9], [10, 11, 12, 13, 14]],
    responses=[[20, 21], [30, 31, 32, 33], [1]],
    ended=[False, False, True],
    sampler_log_probs=[[0.0] * 2, [0.0] * 4, [0.0]],
)


def spec(**fields: object) -> Ppo:
    given = {"kind": "ppo", "data": "d", "model": "m", "reward": "r", "epochs": 1.0, "learning_rate": 1.0}
    return Ppo.model_validate({**given, **fields})


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
    """As a `reward` stage with LoRA on `policy` leaves it, every weight of the adapter random."""
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


def built(job: Job) -> Models:
    torch.manual_seed(17)
    return build_models(job, AutoTokenizer.from_pretrained(job.model["pretrained"]), torch.float32, CPU)


def batch() -> MicroBatch:
    return micro_batch(ROLLOUTS, [2, 0, 1], CPU)


# Batches.


def test_micro_batch_knows_the_state_before_each_token_of_the_answers() -> None:
    assert batch().tokens_n.tolist() == [1, 20, 21, 30, 31, 32, 33]
    states = batch().ids_bs.flatten()
    assert states[batch().state_indices_n].tolist() == [14, 7, 20, 9, 30, 31, 32]
    assert states[batch().last_b].tolist() == [1, 21, 33]


def test_values_of_the_whole_batch_are_cut_to_the_micro_batch() -> None:
    whole = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 5.0, 6.0], [7.0, 0.0, 0.0, 0.0]])
    assert batch().select(whole).tolist() == [7, 1, 2, 3, 4, 5, 6]


def test_reward_is_read_behind_what_the_template_puts_after_an_end() -> None:
    closed = ROLLOUTS.with_template_suffix([8, 9])
    assert closed.responses == [[20, 21], [30, 31, 32, 33], [1, 8, 9]]
    states = micro_batch(closed, [2, 0], CPU)
    assert states.ids_bs.flatten()[states.last_b].tolist() == [9, 21]
    assert ROLLOUTS.with_template_suffix([]) is ROLLOUTS


@pytest.mark.parametrize(("behind", "closing"), [("", 0), ("\n", 1)])
def test_what_the_template_puts_after_an_end_is_found(policy: Path, behind: str, closing: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>" + behind)
    found = template_suffix_ids(tokenizer, [tokenizer.eos_token_id])
    assert (len(found), tokenizer.decode(found)) == (closing, behind)


def test_workers_share_a_batch_whole_and_evenly() -> None:
    lengths = [5, 9, 1, 7, 3, 8]
    parts = [shard_by_length(range(6), lengths, rank, 2) for rank in range(2)]
    assert parts == [[1, 3, 4], [5, 0, 2]]


def test_minibatches_part_the_batch_otherwise_each_epoch_and_alike_everywhere() -> None:
    first, second = (minibatches(8, 2, 17, 3, epoch) for epoch in (0, 1))
    assert sorted(place for part in first for place in part) == list(range(8))
    assert first != second
    assert first == minibatches(8, 2, 17, 3, 0)


# Models apart.


def test_policy_reference_value_and_reward_say_what_plain_transformers_says(policy: Path, reward: Path) -> None:
    models = built(job(policy, {"pretrained": str(reward), "revision": None}))
    assert (models.value_init, models.trained.shared, models.reward_fn) == ("reward", False, None)
    with torch.no_grad():
        outputs = models.trained("policy", batch(), 0.8)
        assert models.reference is not None
        reference = models.reference(batch(), 0.8)[0]
        assert models.reward is not None
        scores = models.reward(batch().ids_bs, batch().last_b)
        plain = AutoModelForCausalLM.from_pretrained(policy)
        judge = AutoModelForSequenceClassification.from_pretrained(reward)
        expected, values = [], []
        for row in (2, 0, 1):
            ids = torch.tensor([ROLLOUTS.prompts[row] + ROLLOUTS.responses[row]])
            count = len(ROLLOUTS.responses[row])
            logits = plain(ids).logits[0, -count - 1 : -1] / 0.8
            expected += logits.log_softmax(1)[range(count), ROLLOUTS.responses[row]].tolist()
            values += judge.score(judge.model(ids).last_hidden_state)[0, -count - 1 : -1, 0].tolist()
            assert float(scores[[2, 0, 1].index(row)]) == pytest.approx(float(judge(ids).logits), abs=1e-5)
    assert outputs["log_probs"].tolist() == pytest.approx(expected, abs=1e-5)
    assert reference.tolist() == pytest.approx(expected, abs=1e-5)
    assert outputs["values"].tolist() == pytest.approx(values, abs=1e-5)


def test_without_a_reward_model_that_reads_tokens_the_value_model_begins_with_the_policy(
    policy: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text("def reward(prompts, responses):\n    return [len(a) for a in responses]\n")
    models = built(job(policy, {"python": str(tmp_path / "r.py"), "function": "reward"}))
    assert models.value_init == "policy"
    assert models.reward_fn is not None
    asked = [{"messages": [{"role": "user", "content": "?"}]}] * 2
    assert models.reward_fn(asked, ["abc", ""]) == [3.0, 0.0]


def test_logits_a_piece_at_a_time_give_the_same_gradients(
    policy: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
        outputs = trained("policy", batch(), 0.8, "gradient")
        (outputs["log_probs"].sum() + 0.1 * outputs["entropy"].sum()).backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    whole = gradients(built(job(policy, {"pretrained": str(reward), "revision": None})).trained)
    monkeypatch.setattr("tunery.models.token_log_probs.LOGIT_BYTES", 4 * 300 * 3)  # three tokens
    pieces = gradients(built(job(policy, {"pretrained": str(reward), "revision": None})).trained)
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, msg=name)


# Models on one base.


@pytest.fixture
def shared(policy: Path, reward_artifact: Path) -> Models:
    models = built(job(policy, {"artifact": str(reward_artifact)}, tuner={"lora": {"rank": 2}}))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in models.trained.named_parameters():
        if f"lora_B.{POLICY}" in name or f"lora_B.{VALUE}" in name:  # LoRA begins with zeros, which would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return models


def test_each_model_on_the_base_says_what_one_of_its_own_would(
    shared: Models, policy: Path, reward_artifact: Path
) -> None:
    trained = shared.trained
    assert (trained.shared, shared.reference, shared.reward, shared.value_init) == (True, None, None, "reward")
    with torch.no_grad():
        outputs = trained("policy", batch())
        plain = AutoModelForCausalLM.from_pretrained(policy)
        alone = built(job(policy, {"artifact": str(reward_artifact)}))
        assert alone.reward is not None
        assert alone.reference is not None
        torch.testing.assert_close(trained("reference", batch())["log_probs"], alone.reference(batch(), 1.0)[0])
        scores = alone.reward(batch().ids_bs, batch().last_b)
        torch.testing.assert_close(trained("reward", batch())["scores"], scores, atol=1e-5, rtol=1e-5)
        # The policy's adapter merged into the base by hand.
        for name, weight in plain.named_parameters():
            pieces = {
                n: p for n, p in trained.policy.model.named_parameters() if n.startswith(name.removesuffix("weight"))
            }
            a, b = (next((p for n, p in pieces.items() if f"lora_{x}.{POLICY}." in n), None) for x in "AB")
            if a is not None and b is not None:
                weight += 2.0 * b @ a  # alpha / rank is 2
        ids = batch().ids_bs
        merged = plain(ids).logits.flatten(0, 1)[batch().state_indices_n].log_softmax(1)
        torch.testing.assert_close(outputs["log_probs"], merged[range(7), batch().tokens_n], atol=1e-5, rtol=1e-5)


def test_only_policy_and_value_learn_and_one_backward_pass_reaches_both(shared: Models) -> None:
    outputs = shared.trained("policy", batch())
    (outputs["log_probs"].sum() + outputs["values"].sum()).backward()
    learning = {name for name, parameter in shared.trained.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in shared.trained.named_parameters() if parameter.grad is not None}
    assert with_gradient == learning
    kinds = {name.split(".")[-2] for name in learning if "lora_" in name}
    assert kinds == {POLICY, VALUE}
    assert not [name for name in learning if REWARD in name.split(".")]


def test_recomputed_layers_use_the_adapter_that_they_used_at_first(shared: Models) -> None:
    def gradients(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
        outputs = trained("policy", batch())
        (outputs["log_probs"].sum() + 3 * outputs["values"].sum()).backward()
        return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    kept = copy.deepcopy(shared.trained).train()
    model = kept.policy.model
    how = {"use_reentrant": False, "context_fn": recompute_with_same_adapter(kept.adapter_layers)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    expected, found = gradients(shared.trained), gradients(kept)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_adapters_in_use_are_as_before_also_after_an_error(shared: Models) -> None:
    layer = next(m for m in shared.trained.modules() if hasattr(m, "_active_adapter"))
    before = (layer._active_adapter, layer._disable_adapters)
    with pytest.raises(KeyError), active_adapter(shared.trained.adapter_layers, None):
        raise KeyError
    assert (layer._active_adapter, layer._disable_adapters) == before


def test_one_base_takes_about_a_quarter_of_the_weights(shared: Models) -> None:
    whole = shared.unshared_weight_bytes / 4
    assert whole < shared.weight_bytes < 1.7 * whole  # adapters weigh much on a model this small
    base = AutoModelForCausalLM.from_pretrained(shared.trained.policy.model.config._name_or_path)
    assert whole == sum(weights.numel() * 4 for weights in base.parameters())


# Bad input.


def test_reward_model_with_another_tokenizer_is_refused_and_read_as_text_when_asked(
    policy: Path, tmp_path: Path
) -> None:
    from tunery.models.scratch import train_tokenizer

    other = write_reward_model(tmp_path, pad=0)
    train_tokenizer(["another text altogether " * 3], 290).save_pretrained(other)
    origin = {"pretrained": str(other), "revision": None}
    with pytest.raises(StageError, match="has another tokenizer") as caught:
        built(job(policy, origin))
    assert "allow_retokenize: true" in caught.value.remedy
    models = built(job(policy, origin, allow_retokenize=True))
    assert (models.reward, models.value_init) == (None, "policy")
    assert models.reward_fn is not None
    assert len(models.reward_fn([{"messages": [{"role": "user", "content": "why"}]}], ["because"])) == 1


def test_reward_model_with_two_outputs_is_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneryError, match="it has 2 labels"):
        built(job(policy, {"pretrained": str(write_reward_model(tmp_path, pad=0, labels=2)), "revision": None}))


def test_value_model_can_not_begin_with_a_function(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def reward(prompts, responses):\n    return [0] * len(responses)\n")
    origin = {"python": str(tmp_path / "r.py"), "function": "reward"}
    with pytest.raises(StageError, match="can't be initialized from this reward"):
        built(job(policy, origin, value_init="reward"))


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
def test_function_that_gives_no_rewards_is_reported(policy: Path, tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "r.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    models = built(job(policy, {"python": str(tmp_path / "r.py"), "function": "reward"}))
    assert models.reward_fn is not None
    with pytest.raises(TuneryError, match=message):
        models.reward_fn([{"messages": [{"role": "user", "content": "?"}]}] * 2, ["a", "b"])
