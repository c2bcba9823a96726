"""The experiment: stages, search, compute and tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunery.spec.references import AUTO, Auto, Config
from tunery.spec.search import Search
from tunery.spec.stage_kinds import Stage


class Compute(Config):
    """How the experiment is executed; not part of any cache key. The result is the same up to floating-point order,
    except with other `precision` (bf16 rounds more), with LoRA dropout, which each worker samples itself, and in `grpo`
    and `rloo`, whose workers sample their own responses."""

    workers: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Training workers. auto: one per GPU, without GPUs two (one on a single core), fewer if that many cannot divide
    every stage's global batch size evenly."""
    workers_per_trial: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Workers of each trial of a search. auto: one, so that trials run in parallel."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs if there are any."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPU cores of a worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters (in `ppo` each
    worker first loads the complete models into host memory)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Offloading to host memory. optimizer: AdamW's states and full-precision weights (from ZeRO stage 1 on); all: with
    stage 3 the weights too. Slower, but allows larger models."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Sequences per forward pass and worker. auto: the largest divisor of the worker's share up to 4 (in `ppo` on a GPU
    up to 16 responses)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 if the GPU supports it, else fp32."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass to save memory."""
    save_steps: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Optimizer steps between checkpoints, each written at the next step whose loss is logged. auto: a tenth of the
    training, at least 20; in PPO a tenth of its steps, each a batch of responses."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """How often a training whose worker died or raised an error resumes from its last checkpoint before the run fails.
    The first retry starts after at least 5 s, each further one after twice the time. The death of a node, such as its
    preemption, does not count. Errors in the experiment or its data are not retried. A trial of one worker, which
    trains in its own process, is retried once instead."""
    max_packed_trials: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Maximum number of LoRA trials of a search that share one copy of their base, and its forward passes, on a worker.
    auto: 4, on a GPU up to 8 as memory allows. 1: each trial has its own copy."""
    object_store_gb: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Object store of a Ray that tunery starts, in GB. auto: 0.5."""


class Wandb(Config):
    """Settings of Weights & Biases."""

    project: str = "tunery"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; the account's default when not given."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if an API key is set, else offline (upload later with `wandb sync`)."""
    log_texts: bool = False
    """Whether W&B gets texts: prompts with their responses, rows that filters kept and dropped, the report, which has
    the experiment file and samples of rows, and the command line. Metrics and the values of the experiment are logged
    in any case."""


class Tracking(Config):
    """Where results are logged, besides the event log and the report."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Experiment(Config):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    """Name of the run: letters, digits, `_`, `.` and `-`, at most 64."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Seed of every stage that has none of its own."""
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    """Stages by name, in any order."""
    search: Search | None = None
    """Search over values of the stages."""
    compute: Compute = Compute()
    """How the experiment is executed."""
    tracking: Tracking = Tracking()
    """Where results are logged."""
