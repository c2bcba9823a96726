"""The process of a worker: set up for DeepSpeed on its device, and reset between two trainings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def prepare_process(device: str, threads: int) -> None:
    """Set up environment, threads and torch.distributed. Call before transformers' Trainer is imported.

    device: "cpu" or "gpu"; threads: number of torch's threads. On a CPU, DeepSpeed (0.19) would compile its
    shared-memory all-reduce at first use, which takes 74 s and a C compiler. gloo has the same operation, so
    DeepSpeed's is marked as incompatible before its first use.
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
    if "RANK" not in os.environ:  # a trial in its own process was not started by Ray Train
        os.environ |= SINGLE_PROCESS_ENV
    if device == "gpu":
        # Ray Train makes all GPUs of a host visible to each worker, which must select its own.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():
        from torch._C._distributed_c10d import HashStore

        backend = "nccl" if device == "gpu" else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if not comm.is_initialized():
        # transformers (5.23) would initialize it with the backend for GPUs, and ZeRO-3 on a CPU would fail with
        # "train_batch_size 4 != 2*1*1" (DeepSpeed 0.19.8).
        comm.init_distributed("nccl" if device == "gpu" else "gloo")


SINGLE_PROCESS_ENV = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class ProcessState:
    """The state of a worker process that jobs may change."""

    environment: Mapping[str, str]
    threads: int
    random_state: Any
    numpy_state: Any
    torch_state: Any

    @classmethod
    def capture(cls) -> ProcessState:
        """Return the current state."""
        import random

        import numpy as np
        import torch

        return cls(
            dict(os.environ), torch.get_num_threads(), random.getstate(), np.random.get_state(), torch.get_rng_state()
        )

    def restore(self) -> None:
        """Reset the process to this state, so that the next job runs as in a new process. The process group is kept,
        and so is the random state of GPUs, which each training seeds."""
        import random

        import numpy as np
        import torch

        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        random.setstate(self.random_state)
        np.random.set_state(self.numpy_state)
        torch.set_rng_state(self.torch_state)
        reset_global_state()


def reset_global_state() -> None:
    """Reset the global state of accelerate and transformers, and free the memory of models. Otherwise every model that
    is loaded after a ZeRO-3 training would be sharded.

    The process group is kept: DeepSpeed stores groups in many places (deepspeed.utils.groups, 0.19.8).
    """
    _destroy_engines()
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    free_memory()


def _destroy_engines() -> None:
    """Destroy all DeepSpeed engines of this process, which would otherwise never be freed (0.19.8).

    Their hooks on gradient accumulation refer to the model from C++, where the garbage collector detects no cycle.
    Under ZeRO-3 a global stack refers to modules, and a cached method to the object that gathers their parameters.
    """
    import functools
    import gc

    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    for item in gc.get_objects():
        if issubclass(type(item), DeepSpeedEngine):
            item.destroy()
        elif type(item) is functools._lru_cache_wrapper and item.__module__ == partitioned_param_coordinator.__name__:
            item.cache_clear()
    parameter_offload.FWD_MODULE_STACK.clear()


def free_memory() -> None:
    """Free models in reference cycles and torch's cached GPU memory, and reset the peak memory."""
    import gc

    import torch

    gc.collect()
    with suppress(OSError):  # not permitted in some containers; the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
