"""The whole experiment, and how it is computed and tracked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunery.spec.references import AUTO, Auto, Config
from tunery.spec.search import Search
from tunery.spec.stages import Stage


class Compute(Config):
    """How, never what: outside every fingerprint. The result is the same up to floating-point order,
    but for `precision` (bf16 rounds more), for LoRA's dropout, which each worker draws for itself, and for `grpo` and
    `rloo`, whose workers draw answers of their own."""

    workers: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Training workers; auto: one a GPU, without GPUs two (or one on a single core), or fewer where that many can't
    share out every stage's global batch size."""
    workers_per_trial: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Of each trial of a search; auto: one, so that trials run side by side."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters (in `ppo` each
    worker loads the models whole into its host's memory first)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the host's memory while it is not needed: AdamW's states and full-precision weights (from ZeRO
    stage 1 on), or, under stage 3, the weights too. Slower, and room for a larger model."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Sequences per forward pass and worker; auto: the largest up to 4 (of answers, in
    `ppo` on a GPU, up to 16) that divides the worker's share."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the GPU has it, else fp32."""
    gradient_checkpointing: bool = False
    save_steps: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Optimizer steps between checkpoints, each written at the next step whose loss is logged; auto: a tenth of the
    training, at least 20; of PPO's steps, each a batch of answers, a tenth."""
    max_failures: Annotated[int, Field(ge=0)] = 0
    """How often a training whose worker died goes on from its last checkpoint before the run ends with the error;
    not in trials of one worker, which train in their own process."""
    max_packed_trials: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Trials of a search that train LoRA on the same base: how many at most share one copy of it on a worker, and its
    forward passes; auto: 4, on a GPU up to 8, as its memory has room. 1: each trial has a copy for itself."""
    object_store_gb: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Of a Ray started here, in GB; auto: 0.5. A cluster that is already running has its own."""


class Wandb(Config):
    project: str = "tunery"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when an API key is set, else offline (sync later with `wandb sync`)."""


class Tracking(Config):
    wandb: Wandb = Wandb()


class Experiment(Config):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    seed: int
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    search: Search | None = None
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
