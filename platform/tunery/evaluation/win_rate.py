"""The `win_rate` stage: win rate of each model against a baseline, by the rewards of a judge.

Each model is compared with the baseline on the prompts that are short enough for both of them, whatever the other
models, because the length of a prompt depends on the tokenizer.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.errors import RowCountError, StageError
from tunery.evaluation.generate_responses import (
    BatchResponses,
    Response,
    generate_responses,
    prompt_batches,
    read_responses,
)
from tunery.evaluation.win_counts import compare
from tunery.spec import WinRate
from tunery.spec.references import model_name
from tunery.store import StageContext, StageResult
from tunery.store.rows import count_rows

NUM_SAMPLES = 8
"""Number of prompts whose responses are in the facts."""
MAX_SAMPLE_CHARS = 600
"""Maximum number of characters of a prompt or response in the facts."""

PromptResponses = dict[int, Response]
"""The responses to one prompt, by model index; 0 is the baseline. Models for which the prompt is too long are
missing."""


@dataclass
class ResponsePairs:
    """Statistics of the responses of one model and of the baseline to the prompts that are short enough for both."""

    rewards: list[tuple[float, float, bool]] = field(default_factory=list)
    """For each prompt, reward of the model, reward of the baseline, and whether the responses are equal."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Total number of tokens of the model, and of the baseline."""
    ended: list[int] = field(default_factory=lambda: [0, 0])
    """Number of responses that ended with EOS, of the model and of the baseline."""

    def add(self, response: Response, baseline_response: Response) -> None:
        """Add the responses to one prompt."""
        is_equal = response["response"] == baseline_response["response"]
        self.rewards.append((response["reward"], baseline_response["reward"], is_equal))
        for side, side_response in enumerate((response, baseline_response)):
            self.tokens[side] += side_response["tokens"]
            self.ended[side] += side_response["ended"]

    def means(self, side: int) -> dict[str, float]:
        """Return the means of the model (side 0) or the baseline (side 1): reward, response_length (tokens, including
        EOS) and eos_rate (fraction of responses that ended with EOS)."""
        rows = len(self.rewards)
        return {
            "reward": math.fsum(pair[side] for pair in self.rewards) / rows,
            "response_length": self.tokens[side] / rows,
            "eos_rate": self.ended[side] / rows,
        }


def group_by_prompt(batch: Sequence[BatchResponses]) -> list[PromptResponses]:
    """Group the responses of all models to a batch by prompt, in row order."""
    by_row: dict[int, PromptResponses] = {}
    for model_index, model_responses in enumerate(batch):
        for response in model_responses.responses:
            by_row.setdefault(response["row"], {})[model_index] = response
    return [by_row[row] for row in sorted(by_row)]


class ResponseStats:
    """Statistics of all responses, accumulated batch by batch."""

    def __init__(self, num_models: int) -> None:
        """num_models: including the baseline."""
        self.pairs = [ResponsePairs() for _ in range(1, num_models)]
        """One entry per model except the baseline."""
        self.read, self.unusable = 0, 0
        """Number of rows that were read, and of those that are no usable prompt."""
        self.unaccounted = 0
        """Number of rows that have neither a response nor a reason to be skipped, summed over models; should be 0."""
        self._num_models = num_models
        self._samples: dict[str, PromptResponses] = {}

    def add(self, batch: Sequence[BatchResponses], prompts: Sequence[PromptResponses]) -> None:
        """Add a batch of prompts. `batch`: the responses of each model; `prompts`: the same responses by prompt."""
        read = batch[0].read
        self.read += read
        self.unusable += batch[0].unusable
        self.unaccounted += sum(abs(read - model.too_long - model.unusable - len(model.responses)) for model in batch)
        for responses in prompts:
            for model_index, pairs in enumerate(self.pairs, start=1):
                if responses.keys() >= {0, model_index}:
                    pairs.add(responses[model_index], responses[0])
        self._samples |= {responses[0]["id"]: responses for responses in prompts if len(responses) == self._num_models}
        self._samples = {id: self._samples[id] for id in heapq.nsmallest(NUM_SAMPLES, self._samples)}

    def samples(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the prompts with the smallest ids that all models responded to, with all responses. The sample does
        not depend on the order of rows or on the responses. `names`: of the models."""
        return [
            {
                "prompt": responses[0]["prompt"][-1]["content"][:MAX_SAMPLE_CHARS],
                "responses": {
                    name: {
                        "response": responses[model_index]["response"][:MAX_SAMPLE_CHARS],
                        "reward": responses[model_index]["reward"],
                    }
                    for model_index, name in enumerate(names)
                },
            }
            for responses in self._samples.values()
        ]


def run_win_rate(context: StageContext) -> StageResult:
    """Compute the win rates. Write results.json, and responses.jsonl with the responses and rewards of all models to
    every prompt.

    Facts: `results`, one entry per model (see `_result`); `responses`, a sample of prompts with all responses. Raises
    RowCountError if a row was lost, and StageError if no prompt is usable.
    """
    stage, start_time = context.spec, time.time()
    assert isinstance(stage, WinRate)
    artifacts = {name: artifact.path for name, artifact in context.inputs.items()}
    names = [model_name(model) for model in stage.evaluated_models]
    stats = ResponseStats(len(names))
    with (context.out / "responses.jsonl").open("w", encoding="utf-8") as target:
        for files in generate_responses(context, artifacts, prompt_batches(artifacts[stage.data])):
            batch = [read_responses(file) for file in files]
            prompts = group_by_prompt(batch)
            stats.add(batch, prompts)
            target.writelines(
                json.dumps(_output_entry(responses, names), ensure_ascii=False) + "\n" for responses in prompts
            )
    expected = count_rows(artifacts[stage.data])
    if stats.read != expected or stats.unaccounted:
        raise RowCountError(
            context.name,
            f"`data` has {expected} rows, {stats.read} were read; {stats.unaccounted} of these have neither "
            "a response nor a reason to be skipped",
        )
    results = []
    for name, pairs in zip(names[1:], stats.pairs, strict=True):
        too_long = expected - stats.unusable - len(pairs.rewards)
        if not pairs.rewards:
            max_prompt_tokens = stage.max_length - stage.sampling.max_new_tokens
            raise StageError(
                context.name,
                f"none of the {expected:,} rows of `{stage.data}` (data) is a usable prompt",
                cause=f"{too_long:,} prompts are longer than {max_prompt_tokens:,} tokens, {stats.unusable:,} rows "
                "have no prompt or can't be rendered by a chat template",
                remedy=f"raise max_length (now {stage.max_length}), lower sampling.max_new_tokens (now "
                f"{stage.sampling.max_new_tokens}), or use other rows",
            )
        left_out = {"too_long": too_long, "unusable": stats.unusable}
        results.append({"model": name, "set": stage.data, **_result(pairs, names[0]), "left_out": left_out})
    (context.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return StageResult({"results": results, "responses": stats.samples(names)}, {"seconds": time.time() - start_time})


def _result(pairs: ResponsePairs, baseline: str) -> dict[str, Any]:
    """Return the result of one model.

    win_rate: fraction of the prompts on which the model has the higher reward, where ties count half; interval: its 95%
    confidence interval (win_counts.py); the means of the model (ResponsePairs.means), and under `baseline` those of the
    baseline on the same prompts.
    """
    counts = compare(pairs.rewards)
    return {
        "win_rate": counts.rate,
        "interval": list(counts.interval),
        "outcomes": {"wins": counts.wins, "ties": counts.ties, "losses": counts.losses},
        **pairs.means(0),
        "baseline": {"model": baseline, **pairs.means(1)},
        "rows": len(pairs.rewards),
    }


def _output_entry(responses: PromptResponses, names: Sequence[str]) -> dict[str, Any]:
    """Return the line of a prompt in responses.jsonl."""
    first = next(iter(responses.values()))
    keys = ("response", "reward", "tokens", "ended")
    by_model = {names[index]: {key: responses[index][key] for key in keys} for index in sorted(responses)}
    return {"id": first["id"], "prompt": first["prompt"], "responses": by_model}
