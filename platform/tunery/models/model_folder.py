"""Check that a model folder is complete, and count its parameters, without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a file with all weights."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of an index of weights in several files."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")
"""Names of tokenizer files; a model folder has at least one."""


class BadModel(ValueError):
    """A model that can't be loaded, with cause and remedy."""

    def __init__(self, message: str, cause: str, remedy: str) -> None:
        super().__init__(message, cause, remedy)  # pickle reconstructs the exception from these
        self.message, self.cause, self.remedy = message, cause, remedy

    def __str__(self) -> str:
        return self.message


def check_model_folder(folder: Path) -> None:
    """Raise BadModel if the folder lacks config, weights or tokenizer."""
    if not folder.is_dir():
        raise BadModel(
            f"there is no model folder `{folder}`",
            "a path that starts with / ./ ../ or ~ is a folder; paths are relative to the experiment's folder",
            "correct the path, or give a hub name such as Qwen/Qwen3-0.6B",
        )
    contents = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    remedy = "save the model with `save_pretrained`, weights, config and tokenizer in one folder"
    if not (folder / "config.json").is_file():
        raise BadModel(f"`{folder}` is not a model: it has no config.json", f"it contains: {contents}", remedy)
    if missing := missing_weights(folder):
        raise BadModel(
            f"the model folder `{folder}` has no weights: {missing} is missing", f"it contains: {contents}", remedy
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadModel(f"the model folder `{folder}` has no tokenizer", f"it contains: {contents}", remedy)


def missing_weights(folder: Path) -> str:
    """Return the name of a missing weight file; "" if there is none."""
    if any((folder / name).is_file() for name in WEIGHTS):
        return ""
    for name in INDEXES:
        if (folder / name).is_file():
            weight_files = set(json.loads((folder / name).read_text())["weight_map"].values())
            return next((file for file in sorted(weight_files) if not (folder / file).is_file()), "")
    return WEIGHTS[0]


def count_parameters(folder: Path) -> int | None:
    """Return the number of parameters, from the headers of the safetensors files; None without such files."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total if files else None
