"""Set up the process of a training worker for DeepSpeed on its device."""

from __future__ import annotations

import os


def prepare_process(device: str, threads: int) -> None:
    """Set up environment, threads and torch.distributed. Call before transformers' Trainer is imported.

    On a CPU DeepSpeed 0.19 would compile its shared-memory all-reduce at first use, which takes 74 s and a C compiler.
    gloo does the same, so the op is marked as incompatible before its first use.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if device == "gpu" else "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(threads)
    import deepspeed
    from deepspeed import comm
    from deepspeed.ops import __compatible_ops__

    deepspeed.logger.setLevel("WARNING")
    __compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # an in-process trial has no launcher
        os.environ |= SINGLE_PROCESS_ENV
    if device == "gpu":
        # Ray Train makes all GPUs of a host visible to each worker, which must select its own.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        from torch._C._distributed_c10d import HashStore

        backend = "nccl" if device == "gpu" else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if not comm.is_initialized():
        # transformers would initialise it with the GPU's backend; ZeRO-3 on CPU then fails with
        # "train_batch_size 4 != 2*1*1" (DeepSpeed 0.19.8, transformers 5.23).
        comm.init_distributed("nccl" if device == "gpu" else "gloo")


SINGLE_PROCESS_ENV = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def reset_global_state() -> None:
    """Reset the state that accelerate and transformers keep in module globals, so that this process can run another
    training. After ZeRO-3, every model loaded later would be sharded otherwise.

    The process group is kept: DeepSpeed stores groups in many places (deepspeed.utils.groups, 0.19.8).
    """
    import gc

    import torch
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pick_dtype(precision: str, device: str) -> str:
    """Return "bf16" or "fp32"."""
    if precision != "auto":
        return precision
    if device == "gpu":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "fp32"
