"""Log-probabilities, entropies and their gradients equal those of plain logits, whichever way the head is applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tunery.models import token_log_probs
from tunery.models.token_log_probs import Entropy, TokenLogProbs, frozen_head_log_probs, log_probs_of

GROUPED: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def test_log_probabilities_and_entropy_are_those_of_the_distribution_at_the_temperature() -> None:
    torch.manual_seed(0)
    logits_nv, targets_n = torch.randn(4, 7), torch.tensor([0, 6, 3, 3])
    log_probs_n, entropy_n = log_probs_of(logits_nv, targets_n, 0.7, "value")
    distribution = torch.distributions.Categorical(logits=logits_nv / 0.7)
    torch.testing.assert_close(log_probs_n, distribution.log_prob(targets_n))
    torch.testing.assert_close(entropy_n, distribution.entropy())


def test_entropy_has_a_gradient_only_if_requested() -> None:
    logits_nv, targets_n = torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])
    assert log_probs_of(logits_nv, targets_n)[1] is None
    value = log_probs_of(logits_nv, targets_n, entropy="value")[1]
    assert value is not None
    assert not value.requires_grad
    entropy_n = log_probs_of(logits_nv, targets_n, entropy="gradient")[1]
    assert entropy_n is not None
    (gradient,) = torch.autograd.grad(entropy_n.sum(), logits_nv)
    (expected,) = torch.autograd.grad(torch.distributions.Categorical(logits=logits_nv).entropy().sum(), logits_nv)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", ["none", "value", "gradient"])
def test_a_frozen_head_gives_the_values_and_gradients_of_autograd(
    bias: bool, temperature: float, entropy: Entropy
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 5000, bias=bias).requires_grad_(False)
    targets_n, weights_n, entropy_weights_n = torch.randint(5000, (700,)), torch.rand(700), torch.rand(700)
    hidden_nh = torch.randn(700, 16).mul_(20)
    results = []
    for fused in (True, False):
        expected_states_nh = hidden_nh.clone().requires_grad_()
        if fused:
            log_probs_n, entropy_n = frozen_head_log_probs(expected_states_nh, head, targets_n, temperature, entropy)
        else:
            log_probs_n, entropy_n = log_probs_of(head(expected_states_nh), targets_n, temperature, entropy)
        loss = (log_probs_n * weights_n).sum()
        if entropy_n is not None:
            assert entropy_n.requires_grad == (entropy == "gradient")
            loss = loss + (entropy_n * entropy_weights_n).sum()
        loss.backward()
        results.append(
            [log_probs_n.detach(), expected_states_nh.grad, *([] if entropy_n is None else [entropy_n.detach()])]
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain head", "capped logits"])
@pytest.mark.parametrize("trained", [True, False])
def test_any_model_and_head_gives_the_log_probabilities_of_its_own_logits(
    kind: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_log_probs, "LOGIT_BYTES", 4 * 50 * 3)  # three tokens per chunk
    monkeypatch.setattr(token_log_probs, "FROZEN_HEAD_LOGIT_BYTES", {"cpu": 4 * 50 * 3})
    torch.manual_seed(3)
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**GROUPED))
        if kind == "plain head"
        else Gemma2ForCausalLM(Gemma2Config(**GROUPED, final_logit_softcapping=2.0, query_pre_attn_scalar=8))
    )
    model.eval().requires_grad_(trained)
    compute = TokenLogProbs(model)
    assert compute.has_plain_head == (kind == "plain head")
    ids_bt = torch.randint(50, (2, 9))
    state_indices_n = torch.tensor([0, 3, 4, 5, 9, 15, 16])
    targets_n = ids_bt.flatten()[state_indices_n + 1]
    log_probs_n, entropy_n = compute({"input_ids": ids_bt}, state_indices_n, targets_n, 0.8, "value")
    with torch.no_grad():
        logits_nv = model(ids_bt).logits.flatten(0, 1)[state_indices_n] / 0.8
    distribution = torch.distributions.Categorical(logits=logits_nv)
    assert log_probs_n.requires_grad == trained
    torch.testing.assert_close(log_probs_n.detach(), distribution.log_prob(targets_n))
    torch.testing.assert_close(entropy_n, distribution.entropy())
