"""DeepSpeed for PPO: the engine of what is trained, frozen models under ZeRO-3, whole weights for generating,
checkpoints, and the policy that is left at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunery.models.load import write_base
from tunery.spec import Compute, Ppo
from tunery.training.batches import Batching
from tunery.training.deepspeed_config import deepspeed_config
from tunery.training.job import Job
from tunery.training.ppo.models import POLICY, PolicyAndValue

TAG = "state"
"""Of DeepSpeed's own folder in a checkpoint."""


def trained_engine(model: PolicyAndValue, spec: Ppo, compute: Compute, batching: Batching, dtype: str) -> Any:
    """With torch's AdamW. `batching` is that of a minibatch."""
    import deepspeed

    if compute.zero_stage == 3 and not model.shared:
        gather_by_layer(model)
    config = deepspeed_config(compute.zero_stage, compute.offload) | {
        "train_batch_size": batching.global_batch_size,
        "train_micro_batch_size_per_gpu": batching.micro_batch_size,
        "gradient_accumulation_steps": batching.accumulation,
        "gradient_clipping": spec.max_grad_norm,
        "bf16": {"enabled": dtype == "bf16"},
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Huang et al., detail "Adam's epsilon": theirs is 1e-5; ours is torch's, as in all other trainings and in TRL.
    optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=spec.weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=learning, optimizer=optimizer, config=config)
    engine.train()  # models are loaded for asking, and then transformers checkpoints no gradients
    return engine


def gather_by_layer(model: nn.Module) -> None:
    """Under ZeRO-3 a decoder layer's weights are gathered together, instead of those of each module in it.

    Not where policy and value model share their layers: DeepSpeed 0.19.8 reduces the gradients of such a layer whenever
    a backward pass leaves it, which then happens twice in one, and it asserts that it doesn't.
    """
    from deepspeed.utils import set_z3_leaf_modules

    layers = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    set_z3_leaf_modules(model, sorted(layers), raise_if_not_found=False)


def frozen_engine(model: nn.Module | None, compute: Compute, dtype: str) -> Any:
    """A model that is only asked. Under ZeRO-3 its weights are sharded too; else it is as it was."""
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
def whole_weights(engine: Any, zero_stage: int) -> Iterator[None]:
    """Under ZeRO-3 every worker holds the policy whole for as long as it generates: gathered once, not once a token.

    DeepSpeed's hooks would shard each layer again behind its forward pass, so they are taken off meanwhile; TRL keeps
    the two functions that do that in step with DeepSpeed.
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
    """The artifact: a whole model, or an adapter and what it lies on. All ranks take part: under ZeRO-3 weights are
    gathered."""
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
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(module.parameters()))
    return gathered


def _save_adapter(model: Any, folder: Path) -> None:
    """As PeftModel.save_pretrained writes it; `model` is the model in it."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.peft_config[POLICY].save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, adapter_name=POLICY)
    named = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def save_state(engine: Any, folder: Path, shared: bool) -> None:
    """Trained weights, optimizer and counters, each worker its part. The base of adapters never changes: it is left
    out."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=shared)


def load_state(engine: Any, folder: Path, shared: bool) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not shared)
    assert path is not None, f"{folder} was marked as whole"


def set_hyperparams(engine: Any, learning_rate: float, weight_decay: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = learning_rate, weight_decay
