"""How many tokens a second are drawn in a rollout? Beside transformers' own: `generate` over batches one after another,
and `generate_batch`, its continuous batching with a paged cache.

    python benchmarks/answers.py [--device cpu] [--shape small] [--prompts 64] [--prompt 48] [--new 160] [--mean 60]

Random weights, prompts of half to whole of --prompt tokens, at temperature 1; --mean tokens an answer, for so many of
the vocabulary's tokens end one. Batches of `generate` hold as many tokens as ours. Medians of --rounds, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tunery.models.generate import BATCH_TOKENS, TransformersEngine
from tunery.models.sampling import uniform_numbers
from tunery.spec import Sampling

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "heads": 4, "head_dim": 32, "vocab_size": 2_048},
    "medium": {"hidden_size": 512, "num_hidden_layers": 8, "heads": 8, "head_dim": 64, "vocab_size": 8_192},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "heads": 16, "head_dim": 128, "vocab_size": 151_936},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "heads": 16, "head_dim": 128, "vocab_size": 151_936},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--new", type=int, default=160)
    parser.add_argument("--mean", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, help="of a batch; tunery's own for the device unless said")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(17)
    model = build(options.shape, options.device)
    vocabulary = model.config.vocab_size
    lengths = torch.randint(options.prompt // 2, options.prompt + 1, (options.prompts,)).tolist()
    prompts = [torch.randint(0, vocabulary, (length,)).tolist() for length in lengths]
    end = list(range(max(1, vocabulary // options.mean)))
    budget = options.batch_tokens or BATCH_TOKENS[options.device]
    arms: dict[str, Callable[[list[list[int]], int], int]] = {
        "ours": lambda prompts, new: ours(model, prompts, end, new, budget),
        "generate": lambda prompts, new: one_after_another(model, prompts, end, new, budget),
        "generate_batch": lambda prompts, new: continuous(model, prompts, end, new),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm(prompts[:8], 8)  # what is built at first use
    for _ in range(options.rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            tokens = arm(prompts, options.new)
            if options.device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(tokens / (time.perf_counter() - start))
            print(f"{name}: {tokens:,} tokens, {rates[name][-1]:,.0f} a second", file=sys.stderr, flush=True)
    first = statistics.median(rates["ours"])
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"{options.shape:7} {name:15} {middle:10,.0f} tokens/s   ours / it {first / middle:6.2f}", flush=True)


def build(shape: str, device: str) -> Any:
    sizes = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    config = Qwen3Config(
        **sizes,
        intermediate_size=3 * sizes["hidden_size"],
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype).eval()


def ours(model: Any, prompts: list[list[int]], end: list[int], new: int, budget: int) -> int:
    numbers = uniform_numbers(17, "answers", [(row,) for row in range(len(prompts))], new)
    answers = TransformersEngine(model, end, budget)(prompts, numbers, Sampling(max_new_tokens=new))
    return sum(len(answer.tokens) for answer in answers)


def one_after_another(model: Any, prompts: list[list[int]], end: list[int], new: int, budget: int) -> int:
    ordered = sorted(prompts, key=len, reverse=True)
    size = max(1, budget // (len(ordered[0]) + new))
    tokens = 0
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        width = len(batch[0])
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=end, pad_token_id=0)
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        tokens += sum(_length(row, set(end)) for row in found)
    return tokens


def _length(row: list[int], end: set[int]) -> int:
    return next((place + 1 for place, token in enumerate(row) if token in end), len(row))


def continuous(model: Any, prompts: list[list[int]], end: list[int], new: int) -> int:
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=end, pad_token_id=0)
    found = model.generate_batch(prompts, generation_config=config)
    assert len(found) == len(prompts)
    return sum(len(answer.generated_tokens) for answer in found.values())


if __name__ == "__main__":
    main()
