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


def plain(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**GROUPED))
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**GROUPED))
    if kind == "qwen2_moe":
        more = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        more |= {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**GROUPED, **more))
    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))


def rows_of(lengths: list[tuple[int, ...]]) -> list[list[list[int]]]:
    chance = random.Random(7)
    return [[[chance.randrange(50) for _ in range(length)] for length in own] for own in lengths]


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gpt2"])
def test_packed_row_has_the_hidden_states_and_gradients_of_a_single_row(kind: str) -> None:
    model = plain(kind).double().eval()
    rows = rows_of(LENGTHS)
    weight = next(model.base_model.parameters())
    alone = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0] for own in rows for row in own]
    torch.cat(alone).pow(3).sum().backward()
    expected = weight.grad.clone()
    model.zero_grad()

    attention = install_varlen_attention(model)
    assert attention is not None
    layout = Layout.of(LENGTHS)
    attention.set_layout(layout, model.device, model.dtype)
    ids_bt = torch.tensor([([*chain(*own)] + [0] * layout.width)[: layout.width] for own in rows])
    hidden_bth = model.base_model(input_ids=ids_bt, position_ids=layout.positions_bt()).last_hidden_state
    starts = zip(layout.starts, layout.lengths, strict=True)
    beside = [hidden_bth.flatten(0, 1)[start : start + length] for start, length in starts]
    torch.testing.assert_close(torch.cat(beside), torch.cat(alone))
    torch.cat(beside).pow(3).sum().backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gpt2"])
def test_varlen_kernel_equals_grouped_attention(kind: str) -> None:
    layout = Layout.of(LENGTHS)
    ids_bt = torch.arange(layout.sequences * layout.width, device="cuda").remainder(50).view(layout.sequences, -1)
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        model = plain(kind).eval().to("cuda", dtype)
        attention = install_varlen_attention(model)
        assert attention is not None
        attention.set_layout(layout, model.device, dtype)
        positions_bt = layout.positions_bt().cuda()
        hidden_bth = model.base_model(input_ids=ids_bt, position_ids=positions_bt).last_hidden_state
        rows = zip(layout.starts, layout.lengths, strict=True)
        own = [index for start, length in rows for index in range(start, start + length)]
        result.append(hidden_bth.flatten(0, 1)[own].float())
    assert (result[0] - result[1]).norm() < 0.03 * result[0].norm()
    # In training GPT-2 drops out what it attends by, which that kernel can't.
    attention.set_layout(layout, model.device, torch.bfloat16)
    model.train()(input_ids=ids_bt, position_ids=positions_bt).logits.sum().backward()


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "qwen2_moe"])
def test_model_with_other_than_causal_attention_is_unchanged(kind: str) -> None:
    """Bloom's positions are in its attention (ALiBi), Gemma 2 caps what it attends by, and Qwen2-MoE leaves its window
    to the mask."""
    model = plain(kind)
    ids_bt = torch.arange(12).view(2, 6)
    before, by = model.eval()(input_ids=ids_bt).logits, model.config._attn_implementation
    model.train()
    assert install_varlen_attention(model) is None
    assert model.config._attn_implementation == by
    assert model.training
    torch.testing.assert_close(model.eval()(input_ids=ids_bt).logits, before)


def test_groups_have_each_token_once_and_little_padding() -> None:
    chance = random.Random(1)
    lengths = [tuple(chance.randint(1, 90) for _ in range(chance.randint(1, 9))) for _ in range(5)]
    groups = Layout.of(lengths).groups()
    own = [index for group in groups for start, length in group for index in range(start, start + length)]
    assert len(own) == len(set(own)) == sum(map(sum, lengths))
    assert sum(group[0][1] * len(group) for group in groups) < 1.25 * len(own)


def test_boundaries_include_rows_and_padding() -> None:
    edges, longest = Layout.of([(3, 2), (4,)]).boundaries()
    assert edges == [0, 3, 5, 9, 10]
    assert longest == 4


@pytest.mark.parametrize("budget", [64, 256, 1024])
def test_blocks_have_each_row_once_within_budget_and_little_padding(budget: int) -> None:
    chance = random.Random(budget)
    learned = taken = 0
    for _ in range(40):
        lengths = [
            [min(200, round(chance.lognormvariate(4, 0.6)) + 1) for _ in range(chance.choice([0, 2, 4, 16]))]
            for _ in range(chance.randint(1, 8))
        ]
        recorded: list[tuple[int, int]] = []
        below: list[tuple[int, int]] = []
        for block in padded_microbatches(lengths, budget):
            own = [*zip(block.members, block.rows, strict=True)]
            padded = sum(map(len, block.rows)) * max(lengths[member][row] for member, rows in own for row in rows)
            assert padded <= budget or (len(own) == 1 and len(block.rows[0]) == 1)
            assert len(set(map(len, block.rows))) == 1
            below += [(member, row) for member, rows in own for row in rows]
        for block in microbatches(lengths, budget, fixed_cost=50):
            own = [*zip(block.members, block.rows, strict=True)]
            totals = [sum(lengths[member][row] for row in rows) for member, rows in own]
            padded = max(totals) * len(totals)
            assert padded <= budget or (len(totals) == 1 and len(block.rows[0]) == 1)
            assert all(totals)
            recorded += [(member, row) for member, rows in own for row in rows]
            learned, taken = learned + sum(totals), taken + padded
        every = [(member, row) for member, all_ in enumerate(lengths) for row in range(len(all_))]
        assert sorted(below) == sorted(recorded) == every
    assert taken < 1.12 * learned


@pytest.mark.parametrize("beside", [True, False])
def test_packed_batch_maps_loss_tokens_to_their_predictions_and_rows(beside: bool) -> None:
    ids = rows_of(LENGTHS)
    labels = [
        [[token if index % 2 else IGNORED_LABEL for index, token in enumerate(row)] for row in own] for own in ids
    ]
    chosen = [
        (InMemorySequences(own, own_labels), list(range(len(own)))) for own, own_labels in zip(ids, labels, strict=True)
    ]
    batch = build_packed_batch(chosen, beside)
    flat_n = batch.ids_bt.flatten()
    result = sorted(
        (int(owner), int(flat_n[index]), int(target))
        for owner, index, target in zip(batch.member_indices_n, batch.state_indices_n, batch.targets_n, strict=True)
    )
    assert result == sorted(
        (member, row[index - 1], row[index])
        for member, own in enumerate(ids)
        for row in own
        for index in range(1, len(row), 2)
    )
