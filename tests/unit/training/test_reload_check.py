"""A model loaded from the saved files equals the trained one, or the stage fails."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_classifiers import write_language_model
from training_jobs import training_job
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tunery.errors import StageError
from tunery.spec import Sft
from tunery.training import reload_check
from tunery.training.job import Job
from tunery.training.reload_check import (
    LanguageProbe,
    available_memory,
    check_saved,
    compare,
    first_tokens,
    skip_reason,
)

SEQUENCES = [[7], [5, 6, 7, 8, 9, 10], [11, 12, 13], [20, 21, 22, 23]]


def job_of(base: Path, out: Path) -> Job:
    spec = {"kind": "sft", "data": "d", "model": "m", "epochs": 1.0, "learning_rate": 1.0}
    return training_job(out, Sft.model_validate(spec), base, out=out)


def saved_adapter(base: Path, out: Path, *targets: str) -> tuple[Job, list[float], LanguageProbe]:
    """Save a LoRA adapter with random weights. Return the job, the losses before saving, and the probe."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=list(targets)))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    job = job_of(base, out)
    probe = LanguageProbe(job, SEQUENCES, 1000)
    trained = probe.losses(model.eval(), "cpu")
    model.save_pretrained(out / "adapter")
    return job, trained, probe


def test_saved_adapter_with_the_trained_losses_passes(tmp_path: Path) -> None:
    job, trained, probe = saved_adapter(write_language_model(tmp_path / "base"), tmp_path, "q_proj", "down_proj")
    runtime_stats = check_saved(job, 0, "fp32", 1000, trained, probe.saved_outputs)
    assert runtime_stats["reload_check"].startswith("passed: loss of 3 training sequences within ")
    assert runtime_stats["reload_check_seconds"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_adapter_on_tied_embeddings_is_detected(tmp_path: Path, dtype: str) -> None:
    write_language_model(tmp_path / "base")  # for its tokenizer
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, intermediate_size=32, initializer_range=0.4, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    job, trained, probe = saved_adapter(tmp_path / "base", tmp_path, "embed_tokens")
    with pytest.raises(StageError, match="the saved model is not the trained one") as caught:
        check_saved(job, 0, dtype, 1000, trained, probe.saved_outputs)
    worst = max(zip(trained, probe.saved_outputs(), strict=True), key=lambda pair: abs(pair[0] - pair[1]))
    assert all(f"{loss:.4f}" in caught.value.message for loss in worst)


def test_changed_weights_of_a_full_model_are_detected(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base")
    job = job_of(base, tmp_path)
    probe = LanguageProbe(job, SEQUENCES, 1000)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    trained = probe.losses(model, "cpu")
    model.save_pretrained(tmp_path / "model")
    check_saved(job, 0, "fp32", 1000, trained, probe.saved_outputs)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 0] += 1.0
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(StageError, match="the saved model is not the trained one"):
        check_saved(job, 0, "fp32", 1000, trained, probe.saved_outputs)


def test_rounding_differences_pass_and_nan_fails() -> None:
    assert compare("loss", [2.0, 3.0], [2.0, 3.001], "fp32")[0] == ""
    assert compare("loss", [2.0, 3.0], [2.0, 3.02], "fp32")[0] != ""
    assert compare("loss", [2.0, 3.0], [2.0, 3.02], "bf16")[0] == ""
    assert "is nan when" in compare("loss", [2.0, 3.0], [2.0, math.nan], "bf16")[0]
    assert compare("loss", [], [], "fp32") == ("", "skipped: no training sequence has two tokens")


def test_large_model_gets_fewer_tokens() -> None:
    long = [list(range(2000))] * 9
    assert [len(ids) for ids in first_tokens(long, 1_000_000)] == [128] * 4
    assert [len(ids) for ids in first_tokens(long, 600_000_000)] == [41] * 4
    assert [len(ids) for ids in first_tokens(long, 8_000_000_000)] == [16] * 4


def test_check_is_skipped_without_enough_memory(tmp_path: Path) -> None:
    job, _, _ = saved_adapter(write_language_model(tmp_path / "base"), tmp_path, "q_proj")
    num_parameters = int(available_memory()) // 4
    assert skip_reason(num_parameters).startswith("skipped: ")
    assert skip_reason(1000) == ""

    def fail() -> list[float]:
        raise AssertionError("the model must not be loaded")

    runtime_stats = check_saved(dataclasses.replace(job), 0, "fp32", num_parameters, [1.0], fail)
    assert runtime_stats["reload_check"].startswith("skipped: ")
    assert reload_check.MAX_TOKENS == 512
