"""Check after every save that the saved model has the same outputs as the trained model.

Merging an adapter, tied weights, a new head or a library's file format can change a model when it is saved. The check
runs up to 4 training sequences of together 512 tokens through the trained model in the workers' memory, and through the
model that later stages load from the files (models/load.py). If the outputs differ by more than rounding, the stage
fails and writes no artifact.

Cost: rank 0 loads the model once more, in float32 on the CPU, and runs one forward pass. This takes 4 bytes of host
memory per parameter and no GPU memory. Large models get fewer tokens (`MAX_FLOPS`). A host with too little memory skips
the check, which is recorded in the stage's runtime stats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from tunery.errors import StageError
from tunery.models.load import load_saved_model
from tunery.training.collectives import broadcast_rank0
from tunery.training.job import Job

MAX_SEQUENCES, MAX_TOKENS, MIN_TOKENS = 4, 512, 64
PROBED = 16
"""Number of sequences that the probe is selected from: those with a single token have no loss."""
MAX_FLOPS = 2e11
"""Limit for the forward pass on the CPU (2 FLOPs per parameter and token), about 4 s on one core; at least `MIN_TOKENS`
are used. A model of 0.6 B parameters gets 166 tokens, one of 1.6 B or more gets 64."""
TOLERANCES = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.03)}
"""Absolute tolerance, and tolerance relative to the largest output, by the dtype of the training. In float32, different
kernels and orders of addition change a loss by about 1e-6; in bf16 (8 bits of precision) the mean loss of a short
sequence changes by about 0.02."""


class Probe(Protocol):
    """Computes a few outputs of the trained model and of the saved model."""

    what: str
    """Name of the output, for messages."""

    def trained(self, trainer: Any) -> list[float]:
        """Return the outputs of a transformers Trainer's model. Call on all ranks: under ZeRO-3 a forward pass gathers
        weights."""

    def saved(self) -> list[float]:
        """Return the outputs of the model loaded from `job.out`, on the CPU. Call on rank 0 only."""


class LanguageProbe:
    """Losses of a few token sequences, in nats per token."""

    what = "loss"

    def __init__(self, job: Job, sequences: Sequence[Sequence[int]], parameters: int) -> None:
        """`sequences`: the first `PROBED` training sequences; `parameters`: number of model parameters."""
        usable = list(islice((ids for ids in sequences if len(ids) > 1), MAX_SEQUENCES))
        self._job, self.sequences = job, first_tokens(usable, parameters)

    def trained(self, trainer: Any) -> list[float]:
        trainer.model.eval()
        with trainer.compute_loss_context_manager():
            return self.losses(trainer.model_wrapped, trainer.args.device)

    def saved(self) -> list[float]:
        return self.losses(load_saved_model(self._job.out, self._job.model, torch.float32).eval(), "cpu")

    @torch.no_grad()
    def losses(self, model: Any, device: Any) -> list[float]:
        losses = []
        for ids in self.sequences:
            ids_t = torch.tensor(ids, device=device)
            logits_tv = model(input_ids=ids_t[None], use_cache=False).logits[0, :-1].float()
            losses.append(cross_entropy(logits_tv, ids_t[1:]).item())
        return losses


def first_tokens(sequences: Sequence[Sequence[int]], parameters: int) -> list[list[int]]:
    """Return the first `MAX_SEQUENCES` sequences, truncated to the token budget of a model with `parameters`."""
    budget = max(MIN_TOKENS, min(MAX_TOKENS, int(MAX_FLOPS / (2 * max(1, parameters)))))
    return [list(ids[: budget // MAX_SEQUENCES]) for ids in sequences[:MAX_SEQUENCES]]


def check_saved(
    job: Job,
    rank: int,
    dtype: str,
    parameters: int,
    trained: Sequence[float],
    saved: Callable[[], list[float]],
    what: str = "loss",
) -> dict[str, Any]:
    """Compare the outputs of the trained and of the saved model. Call on all ranks, after the model was saved.

    `trained`: outputs of the trained model, named `what`; `saved` computes those of the saved model. Returns runtime
    stats: reload_check (a message) and reload_check_seconds. Raises StageError, on all ranks, if the outputs differ.
    """
    begin = time.perf_counter()
    error, outcome = "", ""
    if rank == 0:
        outcome = skip_reason(parameters)
        if not outcome:
            with unsharded_models():
                error, outcome = compare(what, trained, saved(), dtype)
    error, outcome = broadcast_rank0((error, outcome))
    if error:
        raise StageError(
            job.stage,
            error,
            cause="what was saved is not what was trained: merging the adapter, or writing or loading the weights, "
            "changed the model",
            remedy="leave out a part of `tuner` (train with `tuner: full`, or `target_modules: auto`), and report the "
            "model's architecture with this message",
        )
    return {"reload_check": outcome, "reload_check_seconds": time.perf_counter() - begin}


def compare(what: str, trained: Sequence[float], saved: Sequence[float], dtype: str) -> tuple[str, str]:
    """Return an error message ("" if outputs agree), and otherwise a message with the result."""
    if not trained:
        return "", "skipped: no training sequence has two tokens"
    absolute, relative = TOLERANCES[dtype]
    allowed = absolute + relative * max(map(abs, trained))
    pairs = list(zip(trained, saved, strict=True))
    trained_output, saved_output = max(pairs, key=lambda pair: _distance(*pair))
    distance = _distance(trained_output, saved_output)
    if not distance <= allowed:
        message = (
            f"the saved model is not the trained one: its {what} on a training sequence is {saved_output:.4f} when it "
            f"is loaded again, and was {trained_output:.4f} in training (allowed difference {allowed:.2g})"
        )
        return message, ""
    return "", f"passed: {what} of {len(pairs)} training sequences within {distance:.2g}"


def _distance(one: float, other: float) -> float:
    distance = abs(one - other)
    return distance if distance == distance else float("inf")  # NaN


def skip_reason(parameters: int) -> str:
    """Return why this host can't load the model once more; "" if it can."""
    needed, free = 4 * parameters, available_memory()
    if needed > 0.8 * free:
        return f"skipped: {needed / 1e9:.1f} GB to load the model again, and {free / 1e9:.1f} GB of memory are free"
    return ""


def available_memory() -> float:
    """Memory available without swapping, in bytes; infinite if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
    return min(free, _container_memory())


def _container_memory() -> float:
    """Memory left within a container's limit (cgroup v2), in bytes; infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return float("inf") if limit == "max" else float(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return float("inf")


@contextmanager
def unsharded_models() -> Iterator[None]:
    """Load models unsharded in this context: under ZeRO-3 transformers (5.23) would shard them over all ranks."""
    from transformers.integrations import deepspeed as integration

    config_ref = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config_ref
