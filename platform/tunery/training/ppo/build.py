"""The four models of a training, loaded: which of them share weights, what the value model begins with, and by what
answers are rated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunery.errors import StageError
from tunery.models.adapters import lora_config
from tunery.models.labels import RewardNorm
from tunery.models.load import base_of, is_adapter, load_classifier, load_model, load_own_tokenizer, scale_of
from tunery.models.model_folder import BadModel
from tunery.models.reward_functions import NO_LIMIT, RewardFn, RewardOrigin, load_reward
from tunery.spec import LoraTuner, Ppo
from tunery.training.job import Job
from tunery.training.ppo.models import (
    POLICY,
    REWARD,
    VALUE,
    LanguageModel,
    PolicyAndValue,
    ScalarHead,
    ScalarModel,
    held_bytes,
    without_dropout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNSCALED = RewardNorm(0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Models:
    """Where a model is None, it is among the trained one's shared weights."""

    trained: PolicyAndValue
    reference: LanguageModel | None
    reward: ScalarModel | None
    rate: RewardFn | None
    """Rates answers as texts: a function of the user's, or a reward model that reads them by itself. Then `reward` is
    None."""
    value_from: str

    @property
    def held_bytes(self) -> int:
        """Of all weights, as they are: after DeepSpeed has rounded them."""
        modules = [module for module in (self.trained, self.reference, self.reward) if module is not None]
        return held_bytes(weights for module in modules for weights in module.parameters())

    @property
    def separate_bytes(self) -> int:
        """The same if each model had weights of its own."""
        if not self.trained.shared:
            return self.held_bytes
        base = [weights for name, weights in self.trained.policy.named_parameters() if "lora_" not in name]
        return (3 if self.rate is not None else 4) * held_bytes(base)


def build(job: Job, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device) -> Models:
    """Trained weights in fp32 on the CPU (DeepSpeed moves and rounds them), frozen ones in `dtype` on `device`.

    Raises StageError where answers can't be rated as asked for.
    """
    spec = job.spec
    assert isinstance(spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    by_tokens = reads_tokens(job, tokenizer)
    policy = load_model(job.model, torch.float32)
    policy.config.use_cache = False
    if isinstance(spec.tuner, str):
        models = _separate(job, policy, by_tokens, dtype, device)
    else:
        models = _shared(job, spec.tuner, policy, by_tokens, dtype, device)
    for module in (models.trained, models.reference, models.reward):
        if module is not None:
            without_dropout(module)
        for part in module.modules() if module is not None else ():
            if isinstance(part, LanguageModel):
                part.sharded = job.compute.zero_stage == 3
    return models


def reads_tokens(job: Job, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the reward is a model that takes the policy's tokens as they are.

    Raises StageError where it is one with another tokenizer, and nobody allowed for that.
    """
    assert isinstance(job.spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    if "python" in job.reward:
        return False
    theirs = load_own_tokenizer(job.reward)
    if theirs.get_vocab() == tokenizer.get_vocab():
        # With another chat template it has learned from other tokens: it is given texts.
        return bool(theirs.chat_template == tokenizer.chat_template)
    if not job.spec.allow_retokenize:
        name = job.reward.get("pretrained") or Path(job.reward["artifact"]).name
        raise StageError(
            job.stage,
            f"the reward model `{name}` reads other tokens than the policy writes",
            cause=f"its tokenizer has {len(theirs):,} tokens, the policy's {len(tokenizer):,}; they differ",
            remedy="set `allow_retokenize: true`: responses are then decoded and retokenized for it; or take a reward "
            "model that was trained from the same model",
        )
    return False


def _separate(job: Job, policy: PreTrainedModel, by_tokens: bool, dtype: torch.dtype, device: torch.device) -> Models:
    """Each model for itself."""
    spec = job.spec
    assert isinstance(spec, Ppo)
    assert job.reward is not None, "every ppo stage has one"
    reference = LanguageModel(_frozen(load_model(job.model, dtype), job, device))
    reward, rate = _reward(job, job.reward, by_tokens, dtype, device)
    if _value_from(job, reward is not None) == "reward":
        loaded = _as_backbone(job, job.reward, torch.float32)
        assert loaded is not None, "it was one a moment ago"
        return Models(PolicyAndValue(LanguageModel(policy), loaded), reference, reward, rate, "reward")
    value = ScalarModel(load_model(job.model, torch.float32).base_model, ScalarHead(_width(policy)))
    return Models(PolicyAndValue(LanguageModel(policy), value), reference, reward, rate, "policy")


def _shared(
    job: Job, tuner: LoraTuner, policy: PreTrainedModel, by_tokens: bool, dtype: torch.dtype, device: torch.device
) -> Models:
    """Adapters on one base."""
    from peft import get_peft_model

    assert job.reward is not None, "every ppo stage has one"
    config = lora_config(tuner.lora, "CAUSAL_LM")
    model = get_peft_model(policy, config, adapter_name=POLICY)
    heads: dict[str, ScalarHead] = {}
    on_same_base = by_tokens and is_adapter(job.reward) and base_of(Path(job.reward["artifact"])) == job.model
    width = _width(policy)
    reward, rate = None, None
    if on_same_base:
        heads[REWARD] = _add_reward_adapter(model, REWARD, Path(job.reward["artifact"]), width)
    else:
        reward, rate = _reward(job, job.reward, by_tokens, dtype, device)
    value_from = _value_from(job, on_same_base)
    if value_from == "reward":
        heads[VALUE] = _add_reward_adapter(model, VALUE, Path(job.reward["artifact"]), width)
    else:
        model.add_adapter(VALUE, config)
        heads[VALUE] = ScalarHead(width)
    trained = PolicyAndValue(LanguageModel(model.get_base_model()), None, heads)
    for name, parameter in trained.named_parameters():
        # ...lora_A.<adapter>.weight, and heads.value.linear.weight
        adapted = "lora_" in name and bool({POLICY, VALUE} & set(name.split(".")[-2:]))
        parameter.requires_grad_(adapted or name.startswith(f"heads.{VALUE}."))
    return Models(trained, None, reward, rate, value_from)


def _add_reward_adapter(model: Any, name: str, artifact: Path, width: int) -> ScalarHead:
    """The adapter of a `reward` stage laid on the same base under `name`, and its head, scaled."""
    from peft import PeftConfig
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(artifact / "adapter")
    # The head is no part of a language model: it stands beside.
    config.modules_to_save, config.exclude_modules, config.task_type = None, None, "CAUSAL_LM"
    model.add_adapter(name, config)
    weights = load_file(artifact / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {key: value for key, value in weights.items() if "lora_" in key}, name)
    head = next(value for key, value in weights.items() if key.endswith("score.weight"))
    linear = nn.Linear(width, 1, bias=False)
    linear.weight.data = head.float()
    scale = scale_of(artifact) or UNSCALED
    return ScalarHead(width).take(linear, scale.mean, scale.deviation)


def _reward(
    job: Job, origin: RewardOrigin, by_tokens: bool, dtype: torch.dtype, device: torch.device
) -> tuple[ScalarModel | None, RewardFn | None]:
    if by_tokens and (backbone := _as_backbone(job, origin, dtype)) is not None:
        return _frozen(backbone, job, device), None
    return None, load_reward(origin, dtype, device, NO_LIMIT)


def _as_backbone(job: Job, origin: RewardOrigin, dtype: torch.dtype) -> ScalarModel | None:
    """A reward model as a backbone with a head that gives scaled rewards; None where it is built otherwise: causal
    models call their head `score`, and it is asked for a row's last token."""
    try:
        model, labels = load_classifier(origin, dtype)
        labels.check_single(str(origin.get("pretrained", origin.get("artifact"))))
    except BadModel as error:
        raise StageError(job.stage, error.message, cause=error.cause, remedy=error.remedy) from None
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        return None
    scale = labels.scale or UNSCALED
    return ScalarModel(model.base_model, ScalarHead(head.in_features).take(head, scale.mean, scale.deviation))


def _value_from(job: Job, reward_fits: bool) -> str:
    """Raises StageError where the value model is to begin with a reward model that can't be one."""
    assert isinstance(job.spec, Ppo)
    if job.spec.value_init == "reward" and not reward_fits:
        raise StageError(
            job.stage,
            "the value model can't begin with this reward",
            cause="it is no causal model that reads the policy's tokens"
            if isinstance(job.spec.tuner, str)
            else "with LoRA that takes a reward model that is an adapter on the same base",
            remedy="set `value_init: policy`, or leave it out",
        )
    if job.spec.value_init == "auto":
        return "reward" if reward_fits else "policy"
    return job.spec.value_init


def _width(model: PreTrainedModel) -> int:
    """Of the last hidden states, by what the head takes: some configurations have it elsewhere."""
    return int(model.get_output_embeddings().weight.shape[1])


def _frozen(module: Any, job: Job, device: torch.device) -> Any:
    """Under ZeRO-3 DeepSpeed places it."""
    module = module.requires_grad_(False).eval()
    return module if job.compute.zero_stage == 3 else module.to(device)
