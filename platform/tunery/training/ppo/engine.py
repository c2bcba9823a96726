"""DeepSpeed for PPO: the engine of the trained models, engines of frozen models under ZeRO-3, gathered weights for
generation, checkpoints, and saving the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunery.models.load import write_base
from tunery.spec import Compute, Ppo
from tunery.training.batches import Batching
from tunery.training.deepspeed_config import deepspeed_config
from tunery.training.job import Job
from tunery.training.ppo.build import Models
from tunery.training.ppo.models import POLICY, PolicyAndValue

TAG = "state"
"""DeepSpeed's tag of a checkpoint: the name of its folder within the checkpoint."""


@dataclass(frozen=True)
class PpoEngines:
    """The models of PPO, ready for forward passes."""

    trained: Any
    """DeepSpeed engine of the policy and the value model."""
    reference: Any
    """Reference model, as an engine under ZeRO-3; None if the reference is the base of `trained`."""
    reward: Any
    """Reward model, as an engine under ZeRO-3; None if the reward is an adapter of `trained` or a function."""

    @staticmethod
    def from_models(models: Models, spec: Ppo, compute: Compute, minibatch: Batching, dtype: str) -> PpoEngines:
        """minibatch: batch sizes of an optimizer step; dtype: "fp32" or "bf16"."""
        return PpoEngines(
            trained_engine(models.trained, spec, compute, minibatch, dtype),
            frozen_engine(models.reference, compute, dtype),
            frozen_engine(models.reward, compute, dtype),
        )


def trained_engine(model: PolicyAndValue, spec: Ppo, compute: Compute, batching: Batching, dtype: str) -> Any:
    """Build the DeepSpeed engine of the policy and the value model, with torch's AdamW. `batching`: batch sizes of an
    optimizer step."""
    import deepspeed

    if compute.zero_stage == 3 and not model.shared:
        gather_by_layer(model)
    config = deepspeed_config(compute.zero_stage, compute.offload) | {
        "train_batch_size": batching.global_batch_size,
        "train_micro_batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.gradient_accumulation_steps,
        "gradient_clipping": spec.max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Huang et al., detail "Adam's epsilon", use 1e-5. This is torch's default, as in all other trainers and in TRL.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=spec.weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, optimizer=optimizer, config=config)
    engine.train()  # models load in eval mode, in which transformers does no gradient checkpointing
    return engine


def gather_by_layer(model: nn.Module) -> None:
    """Make ZeRO-3 gather the weights of a complete decoder layer at once, instead of module by module.

    Do not use this if policy and value model share their layers: DeepSpeed 0.19.8 reduces the gradients of such a layer
    each time a backward pass leaves it, and asserts that this happens once per backward pass; here it happens twice.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    set_z3_leaf_modules(model, sorted(layers), raise_if_not_found=False)


def frozen_engine(model: nn.Module | None, compute: Compute, dtype: str) -> Any:
    """Wrap a frozen model in an engine that shards its weights under ZeRO-3; otherwise return it unchanged."""
    if model is None or compute.zero_stage < 3:
        return model
    import deepspeed

    gather_by_layer(model)
    config = deepspeed_config(3, compute.offload) | {
        "train_batch_size": torch.distributed.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bf16"},
    }
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.module.eval()
    return engine


@contextmanager
def gathered_policy(engine: Any, zero_stage: int) -> Iterator[None]:
    """A context in which ZeRO-3 has gathered all policy weights: once per generation instead of once per token.

    DeepSpeed's hooks would shard each layer again after its forward pass. TRL's functions, which follow DeepSpeed's
    internals, remove the hooks in this context.
    """
    if zero_stage < 3:
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    with _gathered(engine.module.policy, zero_stage):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


def save_policy(trained: PolicyAndValue, job: Job, tokenizer: Any, rank: int) -> None:
    """Save the policy to the artifact: a full model, or an adapter and the reference to its base. Call on all ranks:
    ZeRO-3 gathers weights."""
    model, folder = trained.policy.model, job.out / ("adapter" if trained.shared else "model")
    with _gathered(model, job.compute.zero_stage):
        if rank == 0:
            if trained.shared:
                _save_adapter(model, folder)
                write_base(job.out, job.model)
            else:
                model.config.use_cache = True
                model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


def _gathered(module: nn.Module, zero_stage: int) -> AbstractContextManager[Any]:
    """Return a context in which ZeRO-3 has gathered the weights of `module`."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(module.parameters()))
    return gathered


def _save_adapter(model: Any, folder: Path) -> None:
    """Save the policy adapter in the format of PeftModel.save_pretrained; `model` is the base model with adapters."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.peft_config[POLICY].save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, adapter_name=POLICY)
    named = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def save_state(engine: Any, folder: Path, shared: bool) -> None:
    """Save trained weights, optimizer state and counters; each worker saves its part. Call on all ranks. `shared`:
    whether the models are adapters, whose frozen base is not saved."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=shared)


def load_state(engine: Any, folder: Path, shared: bool) -> None:
    """Load what `save_state` has saved. Call on all ranks."""
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not shared)
    assert path is not None, f"{folder} is marked as complete"


def set_hyperparams(engine: Any, learning_rate: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay of all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = learning_rate, weight_decay
