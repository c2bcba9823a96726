"""Check after a training that the saved model has the same outputs as the trained model.

Merging an adapter, tied weights, a new head or a library's file format can change a model when it is saved. The check
runs up to 4 training sequences with at most 512 tokens in total through the trained model in the workers' memory, and
through the model that later stages load from the files (models/load.py). If the outputs differ by more than rounding,
the stage fails and writes no artifact.

Cost: rank 0 loads the model once more, in float32 on the CPU, and runs the sequences through it. This takes 4 bytes of
host memory per parameter and no GPU memory. Large models get fewer tokens (`MAX_FLOPS`). If the host has too little
memory, the check is skipped, which the stage's runtime stats record.
"""

from __future__ import annotations

import math
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
"""Maximum number of sequences; maximum number of tokens of all of them, and its minimum for large models."""
NUM_PROBE_CANDIDATES = 16
"""Number of training sequences that the probe's sequences are selected from. Those with one token have no loss."""
MAX_FLOPS = 2e11
"""Limit for the forward pass on the CPU (2 FLOPs per parameter and token), about 4 s on one core; at least `MIN_TOKENS`
are used. A model of 0.6 B parameters gets 166 tokens, one of 1.6 B or more gets 64."""
TOLERANCES = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.03)}
"""Absolute tolerance, and tolerance relative to the largest output, by the dtype of the training. In float32, different
kernels and orders of addition change a loss by about 1e-6; in bf16 (8 bits of precision) the mean loss of a short
sequence changes by about 0.02."""


class Probe(Protocol):
    """A few training sequences, and the outputs that are compared: one or several numbers per sequence."""

    output_name: str
    """What the outputs are, for messages."""

    def trained_outputs(self, trainer: Any) -> list[float]:
        """Return the outputs of the trainer's model. Call on all ranks: under ZeRO-3 a forward pass gathers weights."""

    def saved_outputs(self) -> list[float]:
        """Return the outputs of the model loaded from `job.out`, on the CPU. Call on rank 0 only."""


class LanguageProbe:
    """The probe of a language model: losses of a few token sequences, in nats per token."""

    output_name = "loss"

    def __init__(self, job: Job, sequences: Sequence[Sequence[int]], num_parameters: int) -> None:
        """sequences: the first `NUM_PROBE_CANDIDATES` training sequences; num_parameters: number of parameters of the
        model."""
        usable = list(islice((ids for ids in sequences if len(ids) > 1), MAX_SEQUENCES))
        self._job, self.sequences = job, first_tokens(usable, num_parameters)

    def trained_outputs(self, trainer: Any) -> list[float]:
        trainer.model.eval()
        with trainer.compute_loss_context_manager():
            return self.losses(trainer.model_wrapped, trainer.args.device)

    def saved_outputs(self) -> list[float]:
        return self.losses(load_saved_model(self._job.out, self._job.model, torch.float32).eval(), "cpu")

    @torch.no_grad()
    def losses(self, model: Any, device: Any) -> list[float]:
        """Return the mean loss of each sequence under `model`, in nats per token."""
        losses = []
        for ids in self.sequences:
            ids_t = torch.tensor(ids, device=device)
            logits_tv = model(input_ids=ids_t[None], use_cache=False).logits[0, :-1].float()
            losses.append(cross_entropy(logits_tv, ids_t[1:]).item())
        return losses


def first_tokens(sequences: Sequence[Sequence[int]], num_parameters: int) -> list[list[int]]:
    """Return the first `MAX_SEQUENCES` sequences, each truncated to its share of the token budget, which decreases with
    the size of the model."""
    budget = max(MIN_TOKENS, min(MAX_TOKENS, int(MAX_FLOPS / (2 * max(1, num_parameters)))))
    return [list(ids[: budget // MAX_SEQUENCES]) for ids in sequences[:MAX_SEQUENCES]]


def check_saved(
    job: Job,
    rank: int,
    dtype: str,
    num_parameters: int,
    trained_outputs: Sequence[float],
    saved_outputs: Callable[[], list[float]],
    output_name: str = "loss",
) -> dict[str, Any]:
    """Compare the outputs of the trained and of the saved model. Call on all ranks, after the model was saved.

    dtype: precision of the training, "fp32" or "bf16"; trained_outputs: outputs of the trained model; saved_outputs:
    computes those of the saved model; output_name: see Probe. Returns runtime stats: reload_check, a message with the
    result, and reload_check_seconds. Raises StageError, on all ranks, if the outputs differ.
    """
    start_time = time.perf_counter()
    error, result = "", ""
    if rank == 0:
        result = skip_reason(num_parameters)
        if not result:
            with unsharded_models():
                error, result = compare(output_name, trained_outputs, saved_outputs(), dtype)
    error, result = broadcast_rank0((error, result))
    if error:
        raise StageError(
            job.stage,
            error,
            cause="merging the adapter, or writing or loading the weights, changed the model",
            remedy="leave out a part of `tuner` (train with `tuner: full`, or `target_modules: auto`), and report the "
            "model's architecture with this message",
        )
    return {"reload_check": result, "reload_check_seconds": time.perf_counter() - start_time}


def compare(
    output_name: str, trained_outputs: Sequence[float], saved_outputs: Sequence[float], dtype: str
) -> tuple[str, str]:
    """Return (error message, ""), or ("", message with the result) if the outputs agree within the tolerance."""
    if not trained_outputs:
        return "", "skipped: no training sequence has two tokens"
    absolute, relative = TOLERANCES[dtype]
    tolerance = absolute + relative * max(map(abs, trained_outputs))
    pairs = list(zip(trained_outputs, saved_outputs, strict=True))
    trained, saved = max(pairs, key=lambda pair: _difference(*pair))
    difference = _difference(trained, saved)
    if not difference <= tolerance:  # also if the tolerance is NaN
        message = (
            f"the saved model is not the trained one: its {output_name} on a training sequence is {saved:.4f} when it "
            f"is loaded again, and was {trained:.4f} in training (allowed difference {tolerance:.2g})"
        )
        return message, ""
    return "", f"passed: {output_name} of {len(pairs)} training sequences within {difference:.2g}"


def _difference(trained: float, saved: float) -> float:
    """Return the absolute difference; infinity if one value is NaN."""
    difference = abs(trained - saved)
    return math.inf if math.isnan(difference) else difference


def skip_reason(num_parameters: int) -> str:
    """Return why this host can't load the model once more; "" if it can."""
    required, free = 4 * num_parameters, available_memory()
    if required > 0.8 * free:
        return f"skipped: {required / 1e9:.1f} GB to load the model again, and {free / 1e9:.1f} GB of memory are free"
    return ""


def available_memory() -> float:
    """Return the memory that is available without swapping, in bytes; infinity if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)
    return min(free, _container_memory())


def _container_memory() -> float:
    """Return the memory that is left within the container's limit (cgroup v2), in bytes; infinity without a limit."""
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        return math.inf if limit == "max" else float(int(limit) - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        return math.inf


@contextmanager
def unsharded_models() -> Iterator[None]:
    """A context in which models are loaded unsharded: under ZeRO-3 transformers (5.23) would shard them over all
    ranks."""
    from transformers.integrations import deepspeed as integration

    config_ref = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config_ref
