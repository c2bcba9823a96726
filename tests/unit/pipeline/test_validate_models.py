"""Requests that a model cannot fulfill are rejected before a run: more tokens than positions, adapters on layers that
do not exist or have tied weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_text import LoadText
from small_classifiers import TEXT, write_encoder, write_language_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJModel,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
)

from tunery.errors import SpecErrors, StageError
from tunery.models.meta_model import (
    PositionLimit,
    check_target_modules,
    declared_positions,
    position_limit,
    weightless_model,
)
from tunery.models.model_folder import BadModel
from tunery.models.scratch import train_tokenizer
from tunery.pipeline.validate import notes, validate
from tunery.pipeline.validate_models import validate_models_at_start
from tunery.spec import ADAPTERS
from tunery.store import Store

DIMENSIONS = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2}
TRAINING = "model: MODEL, epochs: 1, learning_rate: 1e-4, max_length: 64"
SAMPLING = "sampling: {max_new_tokens: 8}"
STAGES = {
    "pretrain": f"data: texts, {TRAINING}",
    "sft": f"data: questions, {TRAINING}",
    "classifier": f"data: {{good: questions, bad: texts}}, {TRAINING}",
    "reward": f"data: pairs, {TRAINING}",
    "dpo": f"data: pairs, {TRAINING}",
    "kto": f"data: pairs, {TRAINING}",
    "grpo": f"data: prompts, reward: {{pretrained: ./judge}}, {TRAINING}, {SAMPLING}",
    "rloo": f"data: prompts, reward: {{pretrained: ./judge}}, {TRAINING}, {SAMPLING}",
    "ppo": f"data: prompts, reward: {{pretrained: ./judge}}, {TRAINING}, {SAMPLING}",
    "evaluate": "models: [MODEL], data: {set: questions}, max_length: 64",
    "win_rate": f"models: [MODEL], baseline: {{pretrained: ./llama}}, judge: {{pretrained: ./judge}}, data: prompts, "
    f"max_length: 64, {SAMPLING}",
}
SUBSETS = {"texts": "texts", "questions": "questions", "pairs": "corrupted", "prompts": "prompts"}
TUNED = "{kind: sft, data: questions, epochs: 1, learning_rate: 1e-4, model: "
SCORERS = ["{perplexity: MODEL}", "{ifd: MODEL}", "{embedding: MODEL}", "{reward: {pretrained: ./head}}"]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A GPT-2 with 32 positions, one with a head, and Llamas with 256."""
    GPT2LMHeadModel(GPT2Config(**GPT2, n_positions=32)).save_pretrained(tmp_path / "gpt2")
    for name, positions in (("head", 32), ("judge", 256)):
        config = GPT2Config(**GPT2, n_positions=positions, num_labels=1, pad_token_id=0)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path / name)
    for name in ("gpt2", "head", "judge"):
        train_tokenizer([TEXT], 300).save_pretrained(tmp_path / name)
    write_language_model(tmp_path / "llama")
    return tmp_path


def text_of(stages: str) -> str:
    data = "".join(
        f"  {name}: {{kind: dataset, source: 'builtin:python-docs', subset: {subset}, limit: 20}}\n"
        for name, subset in SUBSETS.items()
    )
    return f"name: x\nseed: 1\nstages:\n{data}{stages}"


def errors_of(load_text: LoadText, models: Path, stages: str) -> list[str]:
    """Return the error messages."""
    experiment, source = load_text(text_of(stages))
    try:
        validate(experiment, source, Store(models / "store"), 1, 1)
    except SpecErrors as error:
        return [str(item) for item in error.errors]
    return []


# Positions.


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("through_a_stage", [False, True])
def test_max_length_above_the_positions_is_rejected_in_every_stage(
    load_text: LoadText, models: Path, kind: str, through_a_stage: bool
) -> None:
    base = f"  base: {TUNED}{{pretrained: ./gpt2}}, max_length: 32}}\n"
    model = "base" if through_a_stage else "{pretrained: ./gpt2}"
    stages = (base if through_a_stage else "") + f"  s: {{kind: {kind}, {STAGES[kind].replace('MODEL', model)}}}\n"
    (error,) = errors_of(load_text, models, stages)
    line = 8 + through_a_stage
    name = "base" if through_a_stage else "gpt2"
    assert f"exp.yaml:{line}: s: `max_length` is 64, and `{name}` has positions for 32 tokens" in error
    assert "set `max_length: 32` or less" in error
    assert errors_of(load_text, models, stages.replace("max_length: 64", "max_length: 32")) == []


@pytest.mark.parametrize("scorer", SCORERS)
def test_scorer_with_too_few_positions_is_rejected(load_text: LoadText, models: Path, scorer: str) -> None:
    def stages(length: int) -> str:
        scorers = f"    by:\n    - {{length: words}}\n    - {scorer.replace('MODEL', '{pretrained: ./gpt2}')}\n"
        return f"  s:\n    kind: score\n    data: questions\n{scorers}    max_length: {length}\n"

    (error,) = errors_of(load_text, models, stages(64))
    assert "exp.yaml:14: s: `max_length` is 64, and" in error
    assert errors_of(load_text, models, stages(32)) == []


def test_classifier_truncates_to_its_positions_by_default(load_text: LoadText, models: Path) -> None:
    start = "  s:\n    kind: score\n    data: questions\n    by:\n"
    assert errors_of(load_text, models, f"{start}    - {{reward: {{pretrained: ./head}}}}\n") == []
    (error,) = errors_of(load_text, models, f"{start}    - {{perplexity: {{pretrained: ./gpt2}}}}\n")
    assert (
        "exp.yaml:12: s: `max_length` is 512, and" in error
    )  # max_length is not in the file: the line is that of the model


def test_searched_max_length_above_the_positions_is_rejected(load_text: LoadText, models: Path) -> None:
    stages = (
        f"  s: {TUNED}{{pretrained: ./gpt2}}, max_length: 31, eval_data: questions}}\n"
        "search: {metric: s.eval_loss, mode: min, trials: 2, space: {s.max_length: {choice: [32, 48]}}}\n"
    )
    (error,) = errors_of(load_text, models, stages)
    assert "`max_length` is 48, and `gpt2` has positions for 32 tokens" in error


def test_rope_beyond_the_trained_positions_is_noted_but_allowed(load_text: LoadText, models: Path) -> None:
    stages = (
        "  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}\n"
        f"  a: {TUNED}base, max_length: 1025}}\n"
        f"  b: {TUNED}{{pretrained: ./llama}}, max_length: 300}}\n"
        f"  c: {TUNED}{{pretrained: ./llama}}, max_length: 256}}\n"
    )
    assert errors_of(load_text, models, stages) == []
    first, second = notes(*load_text(text_of(stages)))
    assert first.startswith("`a` reads up to 1,025 tokens (max_length), and `base` was trained on 1,024 positions")
    assert second.startswith("`b` reads up to 300 tokens (max_length), and `llama` was trained on 256 positions")


def test_stage_with_too_few_positions_fails_before_its_workers_start(load_text: LoadText, models: Path) -> None:
    stages = f"  s: {{kind: sft, {STAGES['sft'].replace('MODEL', '{pretrained: ./gpt2}')}}}\n"
    experiment, _ = load_text(text_of(stages))
    with pytest.raises(StageError, match="stage s: `max_length` is 64"):
        validate_models_at_start("s", experiment.stages["s"], experiment, models)


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, n_positions=32)), (32, True)),
        (
            lambda: OPTModel(OPTConfig(**DIMENSIONS, ffn_dim=32, max_position_embeddings=40, word_embed_proj_dim=16)),
            (40, True),
        ),
        (lambda: RobertaModel(RobertaConfig(**DIMENSIONS, max_position_embeddings=66, pad_token_id=1)), (64, True)),
        (lambda: GPTJModel(GPTJConfig(**GPT2, n_positions=48, rotary_dim=4)), (48, True)),
        (lambda: LlamaModel(LlamaConfig(**DIMENSIONS, max_position_embeddings=48)), (48, False)),
    ],
    ids=["gpt2", "opt", "roberta", "gptj", "llama"],
)
def test_positions_of_architectures(model: Any, limit: tuple[int, bool]) -> None:
    with torch.device("meta"):
        meta_model = model()
    assert position_limit(meta_model) == PositionLimit(*limit)
    # Beyond the limit, an embedding table has no row, while RoPE computes positions.
    initialized = model().eval()
    initialized(input_ids=torch.full((1, limit[0]), 7))
    if limit[1]:
        with pytest.raises((IndexError, RuntimeError)):
            initialized(input_ids=torch.full((1, limit[0] + 1), 7))
    else:
        initialized(input_ids=torch.full((1, limit[0] + 1), 7))


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            64,
        ),
    ],
)
def test_scaled_rope_has_more_positions(scaling: dict[str, Any], tokens: int) -> None:
    rope = {"rope_theta": 10000.0, **scaling}
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**DIMENSIONS, max_position_embeddings=64, rope_parameters=rope))
    assert position_limit(model) == PositionLimit(tokens, False)


def test_config_without_positions_has_no_limit() -> None:
    assert declared_positions({"model_type": "bloom", "seq_length": 2048}) is None
    assert declared_positions({"text_config": {"max_position_embeddings": 99}}) == 99


# Layers for LoRA.


def sft(targets: str, model: str = "{pretrained: ./llama}", kind: str = "sft", data: str = "questions") -> str:
    return (
        f"  s:\n    kind: {kind}\n    data: {data}\n    model: {model}\n    epochs: 1\n    learning_rate: 1e-4\n"
        f"    max_length: 32\n    tuner:\n      lora:\n        target_modules: {targets}\n"
    )


@pytest.mark.parametrize("model", ["{pretrained: ./llama}", "base"])
def test_unknown_layer_name_is_rejected_with_the_valid_names(load_text: LoadText, models: Path, model: str) -> None:
    base = "  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}\n"
    base = base if model == "base" else ""
    (error,) = errors_of(load_text, models, base + sft("[q_proj, nosuch]", model))
    assert f"exp.yaml:{17 + bool(base)}: s: `nosuch` matches no layer of the model" in error
    assert "valid names: " in error
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in error
    assert errors_of(load_text, models, base + sft("[q_proj, layers.1.mlp.up_proj]", model)) == []


def test_adapter_that_cannot_be_merged_is_rejected(
    load_text: LoadText, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmergeable = dataclasses.replace(ADAPTERS["lora"], mergeable=False)
    monkeypatch.setattr(ADAPTERS, "_entries", {**ADAPTERS, "lora": unmergeable})
    (error,) = errors_of(load_text, models, sft("auto"))
    assert "the adapter of LoRA can't be merged into its base" in error


@pytest.mark.parametrize("name", ["input_layernorm", "mlp", "proj"])
def test_layer_that_lora_cannot_adapt_is_rejected(load_text: LoadText, models: Path, name: str) -> None:
    (error,) = errors_of(load_text, models, sft(f"[q_proj, {name}]"))
    assert f"`{name}` matches no layer of the model that LoRA can adapt" in error


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "model.embed_tokens"])
def test_embedding_of_a_tied_model_is_rejected(load_text: LoadText, models: Path, name: str) -> None:
    base = "  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}\n"
    (error,) = errors_of(load_text, models, base + sft(f"[q_proj, {name}]", "base"))
    assert f"`{name}` is the" in error
    assert "tie_word_embeddings" in error
    assert "embed_tokens" not in error.rpartition("valid names:")[2]


def test_untied_embedding_can_be_adapted_and_the_head_cannot(load_text: LoadText, models: Path) -> None:
    assert errors_of(load_text, models, sft("[q_proj, embed_tokens]")) == []
    (error,) = errors_of(load_text, models, sft("[q_proj, lm_head]"))
    assert "`lm_head` is the output head, and an adapter on it would not be trained" in error


def test_classifier_heads_are_not_tied(load_text: LoadText, models: Path) -> None:
    write_encoder(models / "bert", ["one"])
    stages = sft("[query, word_embeddings]", "{pretrained: ./bert}", "reward", "pairs")
    assert errors_of(load_text, models, stages) == []
    (error,) = errors_of(load_text, models, sft("[q_proj]", "{pretrained: ./bert}", "reward", "pairs"))
    assert "`q_proj` matches no layer" in error
    assert "query" in error.rpartition("valid names:")[2]


def test_conv1d_layers_of_gpt2_accept_lora(models: Path) -> None:
    model = weightless_model(str(models / "gpt2"), "causal")
    assert model is not None
    check_target_modules(model, ["c_attn", "h.0.mlp.c_fc"], "causal")
    with pytest.raises(BadModel, match="`wte` is the embedding, whose weight is the output head's too"):
        check_target_modules(model, ["wte"], "causal")


def test_model_that_transformers_cannot_build_is_reported_at_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    assert weightless_model(str(tmp_path), "causal") is None
