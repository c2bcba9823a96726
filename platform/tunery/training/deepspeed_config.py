"""DeepSpeed's configuration for a ZeRO stage. What transformers knows better (batch sizes, precision) stays `auto`."""

from __future__ import annotations

from typing import Any


def deepspeed_config(zero_stage: int, offload: str = "none") -> dict[str, Any]:
    """See https://www.deepspeed.ai/docs/config-json/. ZeRO: Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054),
    offload: Ren et al. 2021 (https://arxiv.org/abs/2101.06840)."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage in (1, 2):
        zero |= {"contiguous_gradients": True, "overlap_comm": False, "reduce_bucket_size": 5e7}
    if zero_stage == 3:
        # Whole weights are gathered once, at saving, so that the artifact is an ordinary folder.
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "reduce_bucket_size": 5e7}
    if offload != "none" and zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload == "all" and zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        # Else DeepSpeed wants its own AdamW for the CPU, which is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        # The optimizer is torch's AdamW, made by transformers: DeepSpeed's own fused ones are compiled at first use.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def model_state_bytes(parameters: int, trainable: int, zero_stage: int, workers: int, bf16: bool) -> int:
    """Memory per rank for weights, gradients and AdamW's states; activations come on top.

    fp32: 4 bytes a weight, 4 a gradient, 8 of AdamW. bf16: 2 + 2, and 12 of AdamW with the fp32 copy. ZeRO shards
    AdamW's part from stage 1, gradients from 2, weights from 3 (table 1 of the paper).
    """
    weight, gradient, optimizer = (2, 2, 12) if bf16 else (4, 4, 8)
    over = [workers if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return parameters * weight // over[0] + trainable * gradient // over[1] + trainable * optimizer // over[2]


def frozen_bytes(parameters: int, zero_stage: int, workers: int, bf16: bool) -> int:
    """Memory per rank for a model that is only asked: a reference. Its weights alone, sharded by stage 3."""
    return parameters * (2 if bf16 else 4) // (workers if zero_stage == 3 else 1)
