"""Precision of models in training and in scoring, by `compute.precision` and the device."""

from __future__ import annotations

from typing import Any

from tunery.spec import Compute


def pick_dtype(precision: str, device: str) -> str:
    """Return the precision of a training: "bf16" or "fp32"."""
    if precision != "auto":
        return precision
    if device == "gpu":
        import torch

        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "fp32"


def score_dtype(compute: Compute) -> Any:
    """Return the torch dtype for scoring and evaluation: bf16 if the GPU supports it, unless `precision` is fp32."""
    import torch

    bf16 = compute.device == "gpu" and compute.precision != "fp32" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32
