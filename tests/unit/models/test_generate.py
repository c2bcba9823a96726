"""Sampling of tokens and generation of responses: equal to transformers, and independent of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_classifiers import write_language_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from tunery.models.generate import Response, TransformersEngine
from tunery.models.sampling import sample, top_p_filter, uniform_numbers
from tunery.spec import Sampling

END = 1
PROMPTS = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(write_language_model(tmp_path_factory.mktemp("model"))).eval()


def numbers(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return uniform_numbers(seed, "test", [(row,) for row in range(rows)], tokens)


# Token sampling


def test_sampling_frequencies_match_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).log_softmax(0)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, log_probs = sample(logits.expand(100_000, -1).clone(), uniform, Sampling())
    shares = torch.bincount(tokens, minlength=4) / 100_000
    torch.testing.assert_close(shares, logits.exp(), atol=0.006, rtol=0)
    torch.testing.assert_close(log_probs, logits[tokens])


def test_every_uniform_number_samples_a_possible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.4999999, 0.5, 1 - 2**-53):
        token, _ = sample(logits.clone(), torch.tensor([uniform], dtype=torch.float64), Sampling())
        assert int(token) == (1 if uniform < 0.5 else 3)


def test_temperature_0_takes_the_most_likely_token() -> None:
    tokens, log_probs = sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), Sampling(temperature=0))
    assert (tokens.tolist(), log_probs.tolist()) == ([1], [0.0])


def test_top_p_keeps_the_most_likely_tokens() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    for top_p, kept in [(0.4, [1]), (0.5, [1]), (0.51, [1, 2]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        assert top_p_filter(log_probs, top_p).isfinite().nonzero()[:, 1].tolist() == kept, top_p


def test_log_probability_is_that_of_the_sampling_distribution() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    token, log_prob = sample(logits.clone(), torch.tensor([0.9]), Sampling(top_p=0.6))
    assert int(token) == 2
    assert float(log_prob) == pytest.approx(torch.tensor(0.25 / 0.75).log())


def test_uniform_numbers_depend_only_on_their_row() -> None:
    expected = uniform_numbers(1, "step", [(3, 0), (4, 0), (4, 1)], 6)
    assert torch.equal(uniform_numbers(1, "step", [(4, 0)], 6)[0], expected[1])
    assert len({tuple(row.tolist()) for row in expected}) == 3
    for other in (uniform_numbers(2, "step", [(3, 0)], 6), uniform_numbers(1, "other", [(3, 0)], 6)):
        assert not torch.equal(other[0], expected[0])


# Responses


def test_greedy_responses_equal_those_of_transformers(model: torch.nn.Module) -> None:
    responses = TransformersEngine(model, [END])(PROMPTS, numbers(5, 12), Sampling(temperature=0, max_new_tokens=12))
    for prompt, response in zip(PROMPTS, responses, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        assert response.tokens == expected[0, len(prompt) :].tolist()


def test_responses_do_not_depend_on_the_batch(model: torch.nn.Module) -> None:
    sampling, uniform = Sampling(max_new_tokens=40), numbers(5, 40)
    batched = TransformersEngine(model, [END, 7, 8, 9, 11, 12])(PROMPTS, uniform, sampling)
    assert len({len(response.tokens) for response in batched}) > 2, "otherwise no row finishes before the others"
    for budget in (1, 100):
        assert _tokens(
            TransformersEngine(model, [END, 7, 8, 9, 11, 12], budget)(PROMPTS, uniform, sampling)
        ) == _tokens(batched)


def test_log_probabilities_equal_a_forward_pass_over_the_sequence(model: torch.nn.Module) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=0.8)
    responses = TransformersEngine(model, [END])(PROMPTS, numbers(5, 20), sampling)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.tokens])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = logits.log_softmax(1)[range(len(response.tokens)), response.tokens]
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=1e-5)


def test_response_ends_with_eos_or_is_truncated(model: torch.nn.Module) -> None:
    all_tokens = list(range(300))
    (response,) = TransformersEngine(model, all_tokens)([[5]], numbers(1, 8), Sampling(max_new_tokens=8))
    assert (len(response.tokens), response.ended) == (1, True)
    (response,) = TransformersEngine(model, [])([[5]], numbers(1, 8), Sampling(max_new_tokens=8))
    assert (len(response.tokens), response.ended) == (8, False)


def test_eos_is_not_sampled_before_min_new_tokens(model: torch.nn.Module) -> None:
    end_tokens = list(range(0, 300, 2))
    responses = TransformersEngine(model, end_tokens)(
        PROMPTS, numbers(5, 30), Sampling(max_new_tokens=30, min_new_tokens=6)
    )
    assert all(len(response.tokens) >= 7 for response in responses)
    assert all(token % 2 for response in responses for token in response.tokens[:6])


def test_pending_prompts_replace_finished_rows(model: torch.nn.Module) -> None:
    """The responses are those of single prompts, in fewer forward passes than consecutive batches need."""
    end_tokens, sampling = list(range(0, 300, 12)), Sampling(max_new_tokens=40)
    prompts = [[5 + row] * (1 + row % 7) for row in range(30)]
    uniform = numbers(30, 40)
    counting_model = CountingModel(model)
    batched = TransformersEngine(counting_model, end_tokens, batch_tokens=10 * 47)(prompts, uniform, sampling)
    expected = [
        TransformersEngine(model, end_tokens)([prompt], uniform[[row]], sampling)[0]
        for row, prompt in enumerate(prompts)
    ]
    assert _tokens(batched) == _tokens(expected)
    for response, expected_response in zip(batched, expected, strict=True):
        torch.testing.assert_close(response.log_probs, expected_response.log_probs, atol=1e-5, rtol=1e-5)
    lengths = sorted((len(response.tokens) for response in expected), reverse=True)
    assert max(counting_model.batch_sizes) == 10
    assert len(counting_model.batch_sizes) < sum(lengths[:3]), (
        "three consecutive batches of ten need at least the lengths of the three longest responses"
    )
    assert sum(counting_model.batch_sizes) < 1.35 * sum(lengths), "at most 35 % of the computed rows are idle"


def test_batch_with_unsupported_caches_is_not_merged() -> None:
    """A sliding-window cache holds only the last positions, so rows of another width can't be added to it."""
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=60,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=6,
        )
    ).eval()
    prompts, uniform, sampling = (
        [[3 + row] * (1 + row % 5) for row in range(12)],
        numbers(12, 20),
        Sampling(max_new_tokens=20),
    )
    batched = TransformersEngine(model, list(range(4)), batch_tokens=4 * 25)(prompts, uniform, sampling)
    expected = [
        TransformersEngine(model, list(range(4)))([prompt], uniform[[row]], sampling)[0]
        for row, prompt in enumerate(prompts)
    ]
    assert _tokens(batched) == _tokens(expected)


def test_positions_stay_within_the_model_maximum() -> None:
    """GPT-2 has no embedding beyond `n_positions`, so the positions of finished rows must not advance."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=24, n_embd=16, n_layer=1, n_head=2)).eval()
    prompts = [[7 + row] * 4 for row in range(24)]
    responses = TransformersEngine(model, list(range(3)), batch_tokens=12 * 24)(
        prompts, numbers(24, 20), Sampling(max_new_tokens=20)
    )
    assert {len(response.tokens) for response in responses} >= {20}
    assert len({len(response.tokens) for response in responses}) > 4


class CountingModel(torch.nn.Module):
    """Records the batch size of each forward pass in `batch_sizes`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.batch_sizes = model, model.config, list[int]()

    def forward(self, **inputs: Any) -> Any:
        self.batch_sizes.append(len(inputs["input_ids"]))
        return self.model(**inputs)


def _tokens(responses: list[Response]) -> list[list[int]]:
    return [response.tokens for response in responses]
