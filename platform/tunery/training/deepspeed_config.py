"""DeepSpeed's configuration for a ZeRO stage. Batch sizes and precision stay `auto`: transformers sets them."""

from __future__ import annotations

from typing import Any


def deepspeed_config(zero_stage: int, offload: str = "none") -> dict[str, Any]:
    """Return the configuration (https://www.deepspeed.ai/docs/config-json/) of a ZeRO stage, 0 to 3 (Rajbhandari et al.
    2020, https://arxiv.org/abs/1910.02054).

    offload: "none", "optimizer", or "all" (optimizer and, in stage 3, weights), to host memory (Ren et al. 2021,
    https://arxiv.org/abs/2101.06840).
    """
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage in (1, 2):
        zero |= {"contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": 5e7}
    if zero_stage == 3:
        # Weights are gathered when the model is saved, so that the artifact is an ordinary model folder.
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "reduce_bucket_size": 5e7}
    if offload != "none" and zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload == "all" and zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        # True would require DeepSpeed's own CPU AdamW, which is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # The optimizer is torch's AdamW, created by transformers: DeepSpeed's own fused ones are compiled at first use.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def model_state_bytes(parameters: int, trainable: int, zero_stage: int, workers: int, bf16: bool) -> int:
    """Return the bytes per rank for weights, gradients and AdamW states, without activations.

    parameters, trainable: number of parameters, and of those that are trained. Bytes per parameter in fp32: 4 (weight)
    + 4 (gradient) + 8 (AdamW); in bf16: 2 + 2 + 12 (AdamW with an fp32 copy). ZeRO shards AdamW states from stage 1,
    gradients from stage 2 and weights from stage 3 (table 1 of the paper).
    """
    weight, gradient, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    shards = [workers if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return parameters * weight // shards[0] + trainable * gradient // shards[1] + trainable * optimizer // shards[2]


def frozen_bytes(parameters: int, zero_stage: int, workers: int, bf16: bool) -> int:
    """Return the bytes per rank for the weights of a frozen model, such as the reference; ZeRO-3 shards them."""
    return parameters * (2 if bf16 else 4) // (workers if zero_stage == 3 else 1)
