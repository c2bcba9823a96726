"""Attention over several rows packed into one sequence, and packing of rows into blocks."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tunery.models.packed_attention import Layout, install_varlen_attention
from tunery.training.packed.microbatches import microbatches, padded_microbatches
from tunery.training.packed.packed_batch import IGNORED_LABEL, build_packed_batch
from tunery.training.sequences import InMemorySequences

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LENGTHS = [(3, 9, 1), (12,), (2, 2, 2, 5)]


def small_model(architecture: str) -> Any:
    torch.manual_seed(3)
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**GROUPED))
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4))
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40))
    if architecture == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**GROUPED))
    if architecture == "qwen2_moe":
        moe_fields = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        moe_fields |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**GROUPED, **moe_fields))
    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))


def random_rows(lengths: list[tuple[int, ...]]) -> list[list[list[int]]]:
    rng = random.Random(7)
    return [[[rng.randrange(50) for _ in range(length)] for length in member] for member in lengths]


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gpt2"])
def test_packed_row_has_the_hidden_states_and_gradients_of_a_single_row(architecture: str) -> None:
    model = small_model(architecture).double().eval()
    rows = random_rows(LENGTHS)
    weight = next(model.base_model.parameters())
    expected_states = [
        model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for member in rows for row in member
    ]
    torch.cat(expected_states).pow(3).sum().backward()
    expected_grad = weight.grad.clone()
    model.zero_grad()

    attention = install_varlen_attention(model)
    assert attention is not None
    layout = Layout.of(LENGTHS)
    attention.set_layout(layout, model.device, model.dtype)
    ids_bt = torch.tensor([([*chain(*member)] + [0] * layout.width)[: layout.width] for member in rows])
    hidden_bth = model.base_model(input_ids=ids_bt, position_ids=layout.positions_bt()).last_hidden_state
    starts = zip(layout.starts, layout.lengths, strict=True)
    packed_states = [hidden_bth.flatten(0, 1)[start : start + length] for start, length in starts]
    torch.testing.assert_close(torch.cat(packed_states), torch.cat(expected_states))
    torch.cat(packed_states).pow(3).sum().backward()
    torch.testing.assert_close(weight.grad, expected_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gpt2"])
def test_varlen_kernel_equals_grouped_attention(architecture: str) -> None:
    layout = Layout.of(LENGTHS)
    ids_bt = torch.arange(layout.sequences * layout.width, device="cuda").remainder(50).view(layout.sequences, -1)
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(architecture).eval().to("cuda", dtype)
        attention = install_varlen_attention(model)
        assert attention is not None
        attention.set_layout(layout, model.device, dtype)
        positions_bt = layout.positions_bt().cuda()
        hidden_bth = model.base_model(input_ids=ids_bt, position_ids=positions_bt).last_hidden_state
        rows = zip(layout.starts, layout.lengths, strict=True)
        token_indices = [index for start, length in rows for index in range(start, start + length)]
        states.append(hidden_bth.flatten(0, 1)[token_indices].float())
    assert (states[0] - states[1]).norm() < 0.03 * states[0].norm()
    # GPT-2 has attention dropout in training mode, which the varlen kernel does not support.
    attention.set_layout(layout, model.device, torch.bfloat16)
    model.train()(input_ids=ids_bt, position_ids=positions_bt).logits.sum().backward()


@pytest.mark.parametrize("architecture", ["bloom", "gemma2", "qwen2_moe"])
def test_model_with_unsupported_attention_is_unchanged(architecture: str) -> None:
    """Bloom adds ALiBi to the scores, Gemma 2 soft-caps them, and Qwen2-MoE applies its sliding window through the
    mask."""
    model = small_model(architecture)
    ids_bt = torch.arange(12).view(2, 6)
    expected_logits, implementation = model.eval()(input_ids=ids_bt).logits, model.config._attn_implementation
    model.train()
    assert install_varlen_attention(model) is None
    assert model.config._attn_implementation == implementation
    assert model.training
    torch.testing.assert_close(model.eval()(input_ids=ids_bt).logits, expected_logits)


def test_groups_contain_each_token_once_and_little_padding() -> None:
    rng = random.Random(1)
    lengths = [tuple(rng.randint(1, 90) for _ in range(rng.randint(1, 9))) for _ in range(5)]
    groups = Layout.of(lengths).groups()
    token_indices = [index for group in groups for start, length in group for index in range(start, start + length)]
    assert len(token_indices) == len(set(token_indices)) == sum(map(sum, lengths))
    assert sum(group[0][1] * len(group) for group in groups) < 1.25 * len(token_indices)


def test_boundaries_include_rows_and_padding() -> None:
    boundaries, max_length = Layout.of([(3, 2), (4,)]).boundaries()
    assert boundaries == [0, 3, 5, 9, 10]
    assert max_length == 4


@pytest.mark.parametrize("budget", [64, 256, 1024])
def test_microbatches_contain_each_row_once_within_budget_and_little_padding(budget: int) -> None:
    rng = random.Random(budget)
    tokens = padded_tokens = 0
    for _ in range(40):
        lengths = [
            [min(200, round(rng.lognormvariate(4, 0.6)) + 1) for _ in range(rng.choice([0, 2, 4, 16]))]
            for _ in range(rng.randint(1, 8))
        ]
        packed_rows: list[tuple[int, int]] = []
        padded_rows: list[tuple[int, int]] = []
        for batch in padded_microbatches(lengths, budget):
            members = [*zip(batch.members, batch.rows, strict=True)]
            padded = sum(map(len, batch.rows)) * max(lengths[member][row] for member, rows in members for row in rows)
            assert padded <= budget or (len(members) == 1 and len(batch.rows[0]) == 1)
            assert len(set(map(len, batch.rows))) == 1
            padded_rows += [(member, row) for member, rows in members for row in rows]
        for batch in microbatches(lengths, budget, fixed_cost=50):
            members = [*zip(batch.members, batch.rows, strict=True)]
            totals = [sum(lengths[member][row] for row in rows) for member, rows in members]
            padded = max(totals) * len(totals)
            assert padded <= budget or (len(totals) == 1 and len(batch.rows[0]) == 1)
            assert all(totals)
            packed_rows += [(member, row) for member, rows in members for row in rows]
            tokens, padded_tokens = tokens + sum(totals), padded_tokens + padded
        expected = [(member, row) for member, rows in enumerate(lengths) for row in range(len(rows))]
        assert sorted(padded_rows) == sorted(packed_rows) == expected
    assert padded_tokens < 1.12 * tokens


@pytest.mark.parametrize("concatenate", [True, False])
def test_packed_batch_maps_loss_tokens_to_their_predictions_and_rows(concatenate: bool) -> None:
    ids = random_rows(LENGTHS)
    labels = [
        [[token if index % 2 else IGNORED_LABEL for index, token in enumerate(row)] for row in member] for member in ids
    ]
    selected = [
        (InMemorySequences(member, member_labels), list(range(len(member))))
        for member, member_labels in zip(ids, labels, strict=True)
    ]
    batch = build_packed_batch(selected, concatenate)
    flat_n = batch.ids_bt.flatten()
    predictions = sorted(
        (int(member), int(flat_n[index]), int(target))
        for member, index, target in zip(batch.member_indices_n, batch.state_indices_n, batch.targets_n, strict=True)
    )
    assert predictions == sorted(
        (member, row[index - 1], row[index])
        for member, member_rows in enumerate(ids)
        for row in member_rows
        for index in range(1, len(row), 2)
    )
