"""Load the four models of PPO, sharing weights between them where the tuner allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunery.errors import StageError
from tunery.models.adapters import freeze_untrained, peft_config
from tunery.models.labels import RewardNorm
from tunery.models.load import (
    Source,
    base_of,
    is_adapter,
    load_classifier,
    load_model,
    load_original_tokenizer,
    load_reward_norm,
)
from tunery.models.model_folder import BadModel
from tunery.models.reward_functions import NO_LIMIT, RewardFn, RewardOrigin, load_reward
from tunery.spec import Ppo, adapter_spec, settings_of
from tunery.training.job import Job
from tunery.training.ppo.models import (
    POLICY,
    REWARD,
    VALUE,
    LanguageModel,
    PolicyAndValue,
    ScalarHead,
    ScalarModel,
    disable_dropout,
    parameter_bytes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_REWARD_NORM = RewardNorm(0.0, 1.0)
"""Leaves rewards unchanged."""


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of PPO."""

    trained: PolicyAndValue
    reference: LanguageModel | None
    """None if the reference is the base of `trained`, without adapters."""
    reward: ScalarModel | None
    """None if the reward model is an adapter of `trained`, or if there is a `reward_fn`."""
    reward_fn: RewardFn | None
    """Computes rewards from texts: a user's function, or a reward model with its own tokenizer or chat template."""
    value_init: str
    """What the value model was initialized from: "policy" or "reward"."""
    is_adapter_weight: Callable[[str], bool]
    """Whether the parameter with this name belongs to an adapter."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in their current dtypes. Read it after DeepSpeed has cast them."""
        modules = [module for module in (self.trained, self.reference, self.reward) if module is not None]
        return parameter_bytes(weight for module in modules for weight in module.parameters())

    @property
    def unshared_weight_bytes(self) -> int:
        """Bytes that the weights would take if the models shared none."""
        if not self.trained.shared:
            return self.weight_bytes
        base = [weight for name, weight in self.trained.policy.named_parameters() if not self.is_adapter_weight(name)]
        num_models = 3 if self.reward_fn is not None else 4
        return num_models * parameter_bytes(base)


def build_models(job: Job, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device) -> Models:
    """Load all models: trained weights in fp32 on the CPU (DeepSpeed moves and casts them), frozen ones in `dtype` on
    `device`. Raises StageError if the reward model is incompatible with the policy or with `value_init`."""
    spec = job.spec
    assert isinstance(spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    takes_token_ids = reward_takes_token_ids(job, tokenizer)
    policy = load_model(job.model, torch.float32)
    policy.config.use_cache = False
    load = _load_on_shared_base if adapter_spec(spec.tuner).has_adapter else _load_separately
    models = load(job, policy, takes_token_ids, dtype, device)
    for model in (models.trained, models.reference, models.reward):
        if model is not None:
            disable_dropout(model)
        for module in model.modules() if model is not None else ():
            if isinstance(module, LanguageModel):
                module.log_probs.sharded = job.compute.zero_stage == 3
    return models


def reward_takes_token_ids(job: Job, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the reward is a model that takes the policy's token ids unchanged.

    Raises StageError if it is a model with another tokenizer and `allow_retokenize` is not set.
    """
    assert isinstance(job.spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    if "python" in job.reward:
        return False
    reward_tokenizer = load_original_tokenizer(job.reward)
    if reward_tokenizer.get_vocab() == tokenizer.get_vocab():
        # A reward model with another chat template was trained on other token sequences, so it gets texts.
        return bool(reward_tokenizer.chat_template == tokenizer.chat_template)
    if not job.spec.allow_retokenize:
        name = job.reward.get("pretrained") or Path(job.reward["artifact"]).name
        raise StageError(
            job.stage,
            f"the reward model `{name}` has another tokenizer than the policy",
            cause=f"its vocabulary has {len(reward_tokenizer):,} tokens, the policy's has {len(tokenizer):,}",
            remedy="set `allow_retokenize: true`: responses are then decoded and retokenized for it; or use a reward "
            "model that was trained from the same base model",
        )
    return False


def _load_separately(
    job: Job, policy: PreTrainedModel, takes_token_ids: bool, dtype: torch.dtype, device: torch.device
) -> Models:
    """Load one model per role, for tuners without adapter."""
    spec = job.spec
    assert isinstance(spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    # The reference rounds like the policy, whose head is trained, so that the KL of the initial policy is exactly 0.
    reference = LanguageModel(_frozen(load_model(job.model, dtype), job, device), fuse_frozen_head=False)
    reward, reward_fn = _load_reward(job, job.reward, takes_token_ids, dtype, device)
    if _value_init(job, reward is not None) == "reward":
        value = _load_scalar_model(job, job.reward, torch.float32)
        assert value is not None, "`reward` was loaded from the same source"
        value_init = "reward"
    else:
        value = ScalarModel(load_model(job.model, torch.float32).base_model, ScalarHead(_hidden_size(policy)))
        value_init = "policy"
    for module in (policy, value.model):
        freeze_untrained(module, spec.tuner)
    trained = PolicyAndValue(LanguageModel(policy), value)
    return Models(trained, reference, reward, reward_fn, value_init, _is_adapter_weight(job))


def _load_on_shared_base(
    job: Job, policy: PreTrainedModel, takes_token_ids: bool, dtype: torch.dtype, device: torch.device
) -> Models:
    """Load one base with an adapter per role, for tuners with adapters."""
    from peft import get_peft_model

    assert job.reward is not None, "every ppo stage has one"
    assert isinstance(job.spec, Ppo)
    config = peft_config(job.spec.tuner, "CAUSAL_LM")
    is_adapter_weight = _is_adapter_weight(job)
    model = get_peft_model(policy, config, adapter_name=POLICY)
    heads: dict[str, ScalarHead] = {}
    reward_on_base = takes_token_ids and _is_adapter_of(job.reward, job.model, config)
    hidden_size = _hidden_size(policy)
    reward, reward_fn = None, None
    if reward_on_base:
        heads[REWARD] = _add_reward_adapter(model, REWARD, Path(job.reward["artifact"]), hidden_size, is_adapter_weight)
    else:
        reward, reward_fn = _load_reward(job, job.reward, takes_token_ids, dtype, device)
    value_init = _value_init(job, reward_on_base)
    if value_init == "reward":
        heads[VALUE] = _add_reward_adapter(model, VALUE, Path(job.reward["artifact"]), hidden_size, is_adapter_weight)
    else:
        model.add_adapter(VALUE, config)
        heads[VALUE] = ScalarHead(hidden_size)
    trained = PolicyAndValue(LanguageModel(model.get_base_model()), None, heads)
    for name, parameter in trained.named_parameters():
        # Names are such as `...lora_A.<adapter>.weight` and `heads.value.linear.weight`.
        is_trained_adapter = is_adapter_weight(name) and bool({POLICY, VALUE} & set(name.split(".")[-2:]))
        parameter.requires_grad_(is_trained_adapter or name.startswith(f"heads.{VALUE}."))
    return Models(trained, None, reward, reward_fn, value_init, is_adapter_weight)


def _is_adapter_weight(job: Job) -> Callable[[str], bool]:
    """Return a function that tells by its name whether a parameter belongs to an adapter of the stage's tuner."""
    assert isinstance(job.spec, Ppo)
    spec = adapter_spec(job.spec.tuner)
    return partial(spec.trains, settings_of(job.spec.tuner)) if spec.has_adapter else lambda name: False


def _is_adapter_of(reward: RewardOrigin, model: Source, config: Any) -> bool:
    """Whether the reward model is an adapter on the base `model`, of the same PEFT type as the policy's: a model can't
    have adapters of different types."""
    from peft import PeftConfig

    if not is_adapter(reward) or base_of(artifact := Path(reward["artifact"])) != model:
        return False
    return bool(PeftConfig.from_pretrained(artifact / "adapter").peft_type == config.peft_type)


def _add_reward_adapter(
    model: Any, name: str, artifact: Path, hidden_size: int, is_adapter_weight: Callable[[str], bool]
) -> ScalarHead:
    """Add the adapter of a `reward` stage to `model` under `name`; return its head, which normalizes rewards."""
    from peft import PeftConfig
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(artifact / "adapter")
    # The language model has no classification head.
    config.modules_to_save, config.exclude_modules, config.task_type = None, None, "CAUSAL_LM"
    model.add_adapter(name, config)
    weights = load_file(artifact / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {key: value for key, value in weights.items() if is_adapter_weight(key)}, name)
    head = next(value for key, value in weights.items() if key.endswith("score.weight"))
    linear = nn.Linear(hidden_size, 1, bias=False)
    linear.weight.data = head.float()
    norm = load_reward_norm(artifact) or NO_REWARD_NORM
    return ScalarHead(hidden_size).load_from(linear, norm.mean, norm.std)


def _load_reward(
    job: Job, origin: RewardOrigin, takes_token_ids: bool, dtype: torch.dtype, device: torch.device
) -> tuple[ScalarModel | None, RewardFn | None]:
    """Load the reward as a model that takes token ids if possible, otherwise as a function of texts."""
    if takes_token_ids and (model := _load_scalar_model(job, origin, dtype)) is not None:
        return _frozen(model, job, device), None
    return None, load_reward(origin, dtype, device, NO_LIMIT)


def _load_scalar_model(job: Job, origin: RewardOrigin, dtype: torch.dtype) -> ScalarModel | None:
    """Load a reward model as a backbone with a head that returns normalized rewards. Return None if it is not a causal
    model: only those name their head `score` and apply it to the last token."""
    try:
        model, labels = load_classifier(origin, dtype)
        labels.check_single(str(origin.get("pretrained", origin.get("artifact"))))
    except BadModel as error:
        raise StageError(job.stage, error.message, cause=error.cause, remedy=error.remedy) from None
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        return None
    norm = labels.reward_norm or NO_REWARD_NORM
    return ScalarModel(model.base_model, ScalarHead(head.in_features).load_from(head, norm.mean, norm.std))


def _value_init(job: Job, reward_is_compatible: bool) -> str:
    """Return `value_init` with `auto` resolved. Raises StageError if it is `reward` and the reward model can't
    initialize the value model."""
    assert isinstance(job.spec, Ppo)
    adapter = adapter_spec(job.spec.tuner)
    if job.spec.value_init == "reward" and not reward_is_compatible:
        raise StageError(
            job.stage,
            "the value model can't be initialized from this reward",
            cause="it is not a causal model with the policy's tokenizer and chat template"
            if not adapter.has_adapter
            else f"with {adapter.title}, the reward model must be such an adapter on the policy's base model",
            remedy="set `value_init: policy`, or omit it",
        )
    if job.spec.value_init == "auto":
        return "reward" if reward_is_compatible else "policy"
    return job.spec.value_init


def _hidden_size(model: PreTrainedModel) -> int:
    """Return the size of the last hidden states, from the output head: its name in the config differs between
    models."""
    return int(model.get_output_embeddings().weight.shape[1])


def _frozen(module: Any, job: Job, device: torch.device) -> Any:
    """Freeze a model and move it to `device` (under ZeRO-3 DeepSpeed moves it); return it."""
    module = module.requires_grad_(False).eval()
    return module if job.compute.zero_stage == 3 else module.to(device)
