"""Writes a model and its tokenizer as files that plain transformers and PEFT load, without local paths in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tunery.models.load import Source, is_adapter, load_classifier, load_model, load_original_tokenizer, load_tokenizer


def write_model(artifact: Path, folder: Path, *, classifier: bool) -> None:
    """Write the complete model to `folder`, which must not exist. Adapters are merged in full precision, in which they
    were trained and evaluated; a complete model is copied."""
    source: Source = {"artifact": str(artifact)}
    if is_adapter(source):
        import torch

        model = load_classifier(source, torch.float32)[0] if classifier else load_model(source, torch.float32)
        model.save_pretrained(folder)
    else:
        shutil.copytree(artifact / "model", folder)
    _write_tokenizer(source, folder, classifier=classifier)
    if not classifier:
        _write_generation_config(source, folder)
    _strip_local_paths(folder)


def _write_generation_config(source: Source, folder: Path) -> None:
    """Add all EOS tokens to the generation config: those of the chat template, of the tokenizer, and the model's."""
    from transformers import AutoConfig, GenerationConfig

    from tunery.models.generate import stop_token_ids

    tokenizer = load_tokenizer(source)
    try:
        config = GenerationConfig.from_pretrained(folder)
    except OSError:  # the model has none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    config.eos_token_id = stop_token_ids(config.eos_token_id, tokenizer)
    config.save_pretrained(folder)


def write_adapter(artifact: Path, folder: Path, base: str, revision: str | None, *, classifier: bool) -> None:
    """Write the adapter alone. `base`: its base model, a hub name or a folder relative to the directory in which
    the adapter is loaded."""
    shutil.copytree(artifact / "adapter", folder)
    _write_tokenizer({"artifact": str(artifact)}, folder, classifier=classifier)
    _strip_local_paths(folder)
    settings = {**adapter_settings(artifact), "base_model_name_or_path": base, "revision": revision}
    _write(folder / "adapter_config.json", settings)


def adapter_settings(artifact: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter; empty for a complete model."""
    path = artifact / "adapter" / "adapter_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings


def _write_tokenizer(source: Source, folder: Path, *, classifier: bool) -> None:
    """A classifier keeps its original tokenizer: without a chat template its rows are encoded as a pair of texts."""
    tokenizer = load_original_tokenizer(source) if classifier else load_tokenizer(source)
    tokenizer.save_pretrained(folder)


def _strip_local_paths(folder: Path) -> None:
    """Remove the paths that transformers (before 5) and PEFT store in the configs; copied models may have them too."""
    for path in folder.glob("*config.json"):
        _write(path, json.loads(path.read_text(), object_hook=_without_paths))


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.endswith("name_or_path")}


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
