"""KL, advantages, losses and sanity checks of PPO, against values computed by hand and by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunery.errors import StageError
from tunery.training.divergence import check_finite
from tunery.training.ppo.advantages import explained_variance, generalized_advantages, masked_mean, whiten
from tunery.training.ppo.kl import adapt_kl_coef, apply_eos_penalty, kl_per_token, token_rewards
from tunery.training.ppo.losses import policy_loss, value_loss
from tunery.training.ppo.sanity_checks import MIN_REWARD_SAMPLES, check_kl, check_rewards_differ

MASK = torch.tensor([[True, True, True], [True, False, False]])


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


# KL.


def test_kl_estimators_by_hand() -> None:
    log_probs, reference = tensor([math.log(0.5), math.log(0.2)]), tensor([math.log(0.25), math.log(0.4)])
    torch.testing.assert_close(kl_per_token(log_probs, reference, "k1"), tensor([math.log(2), -math.log(2)]))
    expected = tensor([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])  # (r - 1) - log r, r = reference / policy
    torch.testing.assert_close(kl_per_token(log_probs, reference, "k3"), expected)


def test_both_kl_estimators_are_unbiased_and_k3_has_less_variance() -> None:
    torch.manual_seed(0)
    policy = torch.randn(8).log_softmax(0)
    reference = (policy + 0.2 * torch.randn(8)).log_softmax(0)
    exact = float((policy.exp() * (policy - reference)).sum())
    samples = torch.multinomial(policy.exp(), 200_000, replacement=True)
    k1, k3 = (kl_per_token(policy[samples], reference[samples], name) for name in ("k1", "k3"))
    assert float(k1.mean()) == pytest.approx(exact, abs=0.002)
    assert float(k3.mean()) == pytest.approx(exact, abs=0.002)
    assert k3.min() >= 0
    assert k3.std() < k1.std()


def test_score_is_on_the_last_token_and_the_kl_penalty_on_all() -> None:
    kl = tensor([1.0, 2.0, 3.0], [4.0, 9.0, 9.0])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, MASK, 0.1)
    torch.testing.assert_close(rewards, tensor([-0.1, -0.2, 9.7], [19.6, 0.0, 0.0]))


def test_eos_penalty_applies_to_truncated_responses_only() -> None:
    scores = apply_eos_penalty(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), 0.25)
    assert scores.tolist() == [1.0, 0.75]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * math.exp(0.1 * 0.1)), (60.0, 0.1 * math.exp(0.02)), (0.0, 0.1 * math.exp(-0.02))],
)
def test_kl_coefficient_changes_by_at_most_a_fifth_per_horizon(kl: float, expected: float) -> None:
    assert adapt_kl_coef(0.1, kl, target=6.0, horizon=1000, num_responses=100) == pytest.approx(expected)


# Advantages.


def test_advantages_by_hand() -> None:
    rewards, values = tensor([0.0, 0.0, 1.0], [2.0, 7.0, 7.0]), tensor([0.5, 0.25, 0.75], [1.0, 7.0, 7.0])
    advantages, returns = generalized_advantages(rewards, values, MASK, gamma=0.9, gae_lambda=0.5)
    last = 1.0 - 0.75
    middle = 0.9 * 0.75 - 0.25 + 0.45 * last
    first = 0.9 * 0.25 - 0.5 + 0.45 * middle
    torch.testing.assert_close(advantages, tensor([first, middle, last], [1.0, 0.0, 0.0]))
    torch.testing.assert_close(returns, tensor([first + 0.5, middle + 0.25, 1.0], [2.0, 0.0, 0.0]))


@given(st.integers(0, 10_000))
def test_returns_with_lambda_1_are_discounted_sums_of_rewards(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(5)[None, :] < torch.randint(1, 6, (3, 1), generator=generator)
    _, returns = generalized_advantages(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    for row in range(3):
        length = int(mask[row].sum())
        expected = [sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length)) for t in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(expected)


def test_padding_does_not_change_advantages() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    padded_mask = torch.cat([MASK, torch.zeros(2, 2, dtype=torch.bool)], 1)
    padding = torch.full((2, 2), torch.nan)
    unpadded = generalized_advantages(rewards, values, MASK, 0.9, 0.8)
    padded = generalized_advantages(
        torch.cat([rewards, padding], 1), torch.cat([values, padding], 1), padded_mask, 0.9, 0.8
    )
    for expected, actual in zip(unpadded, padded, strict=True):
        torch.testing.assert_close(expected, actual[:, :3])
        assert not actual[:, 3:].any()


def test_whitened_values_have_mean_0_and_standard_deviation_1_over_the_mask() -> None:
    values = tensor([1.0, 2.0, 6.0], [3.0, 1e9, -1e9])
    whitened = whiten(values, MASK)
    assert float(whitened[MASK].mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened[MASK].std()) == pytest.approx(1, abs=1e-5)
    assert whitened[1, 1:].tolist() == [0, 0]
    unshifted = whiten(values, MASK, shift=False)
    assert float(unshifted[MASK].mean()) == pytest.approx(3, abs=1e-5)


def test_one_token_can_be_whitened() -> None:
    assert whiten(tensor([4.0]), torch.tensor([[True]])).tolist() == [[0.0]]


def test_explained_variance_is_1_for_perfect_and_0_for_constant_predictions() -> None:
    returns = tensor([1.0, 2.0, 4.0], [8.0, 0.0, 0.0])
    assert explained_variance(returns + 0.5, returns, MASK) == pytest.approx(1)
    assert explained_variance(torch.full((2, 3), 3.0), returns, MASK) == pytest.approx(0)
    assert explained_variance(returns, torch.ones(2, 3), MASK) == 0


# Losses.


def test_policy_loss_by_hand() -> None:
    old_log_probs = torch.zeros(4)
    log_probs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    result = policy_loss(log_probs, old_log_probs, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.2)
    torch.testing.assert_close(result.loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    assert result.clipped.tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(result.approximate_kl, 0.5 * log_probs**2)


def test_gradient_of_the_policy_loss_is_the_policy_gradient_or_0_where_clipped() -> None:
    log_probs = torch.tensor([0.0, math.log(1.5), math.log(1.5)], requires_grad=True)
    advantages = torch.tensor([2.0, 2.0, -2.0])
    (gradient,) = torch.autograd.grad(policy_loss(log_probs, torch.zeros(3), advantages, 0.2).loss.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0, 3.0]))


def test_value_loss_by_hand() -> None:
    values, old_values, returns = (
        torch.tensor([1.0, 1.0, 0.1]),
        torch.tensor([0.0, 0.0, 0.0]),
        torch.tensor([2.0, 1.0, 1.0]),
    )
    # Clipped to 0.2, 0.2 and 0.1: errors of 1.8, 0.8 and 0.9, against 1, 0 and 0.9.
    torch.testing.assert_close(value_loss(values, old_values, returns, 0.2), torch.tensor([1.62, 0.32, 0.405]))
    torch.testing.assert_close(value_loss(values, old_values, returns, None), torch.tensor([0.5, 0.0, 0.405]))


def test_masked_mean_ignores_masked_values_even_nan() -> None:
    assert float(masked_mean(tensor([1.0, 2.0, 3.0], [6.0, torch.nan, torch.inf]), MASK)) == 3


# Sanity checks.


def test_nan_ends_the_training_with_an_error_that_names_the_value() -> None:
    check_finite("ppo", 3, reward=1.0)
    with pytest.raises(StageError, match="diverged at step 3: value loss nan"):
        check_finite("ppo", 3, policy_loss=1.0, value_loss=math.nan)


def test_kl_above_max_kl_ends_the_training() -> None:
    check_kl("ppo", 3, 9.0, 10.0)
    with pytest.raises(StageError, match=r"KL to the reference is 11.0 nats per response at step 3, above max_kl = 10"):
        check_kl("ppo", 3, 11.0, 10.0)


def test_constant_rewards_end_the_training() -> None:
    check_rewards_differ("ppo", 1.0, 1.0, MIN_REWARD_SAMPLES - 1, is_last_step=False)
    with pytest.raises(StageError, match="all 512 responses so far got the same reward, 1"):
        check_rewards_differ("ppo", 1.0, 1.0, MIN_REWARD_SAMPLES, is_last_step=False)
    with pytest.raises(StageError, match="all 16 responses"):
        check_rewards_differ("ppo", 1.0, 1.0, 16, is_last_step=True)
    check_rewards_differ("ppo", 1.0, 2.0, MIN_REWARD_SAMPLES, is_last_step=True)
