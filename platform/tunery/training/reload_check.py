"""After every save: the model that is loaded from the files gives the outputs of the model that was trained.

Merging an adapter, tied weights, a head or a library that writes a file in another way can change a model on its way to
disk. So up to 4 training sequences of 512 tokens in all are given to the trained model, as it is in the memory of the
workers, and to the model that the loader of every later stage (models/load.py) makes of the files. Where the two differ
by more than rounding the stage fails, and there is no artifact.

The cost: rank 0 loads the model once more, in float32 on the CPU, and runs one forward pass. No GPU memory is taken; of
host memory 4 bytes a parameter, for as long as the check takes. The tokens are fewer where the model is large
(`MAX_FLOPS`). A host without the memory skips the check, and the stage's runtime stats say so.
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
"""Sequences that are looked at for those: one of a single token has no loss."""
MAX_FLOPS = 2e11
"""Of the forward pass on the CPU, 2 a parameter and token, as long as that leaves `MIN_TOKENS`: about 4 s of one core.
A model of 0.6 B parameters reads 166 tokens, one of 1.6 B or more 64."""
TOLERANCES = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.03)}
"""Absolute and relative to the largest output, by the dtype that the trained model computes in. In float32 other
kernels and another order of additions change a loss by about 1e-6; bf16 keeps 8 bits, which changes the mean loss of a
short sequence by about 0.02."""


class Probe(Protocol):
    """A few outputs of a model."""

    what: str
    """In words."""

    def trained(self, trainer: Any) -> list[float]:
        """Of the trained model, of a transformers Trainer. All ranks take part: under ZeRO-3 a forward pass gathers
        weights from all."""

    def saved(self) -> list[float]:
        """Of the model that is loaded from job.out, on the CPU. Rank 0 alone."""


class LanguageProbe:
    """The loss of each of a few token sequences, in nats per token."""

    what = "loss"

    def __init__(self, job: Job, sequences: Sequence[Sequence[int]], parameters: int) -> None:
        """`sequences`: the first `PROBED` that are trained on; `parameters`: of the model."""
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
    """The first few sequences, cut to as many tokens as may be read in all."""
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
    """All ranks take part, after the model was saved. `trained`: its outputs, `what` in words; `saved` computes those
    of the files. Returns runtime stats: reload_check, in words; reload_check_seconds.

    Raises StageError, on all ranks, where the two differ.
    """
    begin = time.perf_counter()
    error, outcome = "", ""
    if rank == 0:
        outcome = why_skipped(parameters)
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
    """What is wrong, "" where nothing is; and what was found, in words."""
    if not trained:
        return "", "skipped: no training sequence has two tokens"
    absolute, relative = TOLERANCES[dtype]
    allowed = absolute + relative * max(map(abs, trained))
    pairs = list(zip(trained, saved, strict=True))
    ours, theirs = max(pairs, key=lambda pair: _distance(*pair))
    distance = _distance(ours, theirs)
    if not distance <= allowed:
        message = (
            f"the saved model is not the trained one: its {what} on a training sequence is {theirs:.4f} when it is "
            f"loaded again, and was {ours:.4f} in training (allowed difference {allowed:.2g})"
        )
        return message, ""
    return "", f"passed: {what} of {len(pairs)} training sequences within {distance:.2g}"


def _distance(ours: float, theirs: float) -> float:
    distance = abs(ours - theirs)
    return distance if distance == distance else float("inf")  # of a number that is none


def why_skipped(parameters: int) -> str:
    """ "" where this host has the memory to load the model once more."""
    needed, free = 4 * parameters, available_memory()
    if needed > 0.8 * free:
        return f"skipped: {needed / 1e9:.1f} GB to load the model again, and {free / 1e9:.1f} GB of memory are free"
    return ""


def available_memory() -> float:
    """Bytes of this host that can be taken without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
    return min(free, _container_memory())


def _container_memory() -> float:
    """Bytes that are left of a container's limit (cgroup v2); infinite without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return float("inf") if limit == "max" else float(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return float("inf")


@contextmanager
def unsharded_models() -> Iterator[None]:
    """Models load whole meanwhile: under ZeRO-3 transformers (5.23) would share out their weights over all ranks."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept
