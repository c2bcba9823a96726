"""The `win_rate` stage: how often the answers of each model beat a baseline's, by what a judge makes of them.

A model is compared with the baseline on the prompts that both have room for, whatever other models there are: their
tokenizers differ, and so does what is too long.
"""

from __future__ import annotations

import heapq
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.errors import RowsLost, StageError
from tunery.evaluation.generate_responses import (
    BatchResponses,
    Line,
    generate_responses,
    prompt_batches,
    read_responses,
)
from tunery.evaluation.win_counts import compare
from tunery.spec import WinRate
from tunery.spec.references import model_name
from tunery.store import StageContext, StageResult
from tunery.store.rows import count_rows

SHOWN = 8
"""Prompts whose answers are facts."""
CHARACTERS = 600
"""Of a prompt or an answer there."""

Answers = dict[int, Line]
"""To one prompt, by the place of who gave it: 0 is the baseline. Who had no room for the prompt is not there."""


@dataclass
class ResponsePairs:
    """The answers of one model beside the baseline's, to the prompts that both had room for."""

    rewards: list[tuple[float, float, bool]] = field(default_factory=list)
    """The model's, the baseline's, and whether they said the same."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """The model's, and the baseline's."""
    ended: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, mine: Line, theirs: Line) -> None:
        self.rewards.append((mine["reward"], theirs["reward"], mine["answer"] == theirs["answer"]))
        for side, line in enumerate((mine, theirs)):
            self.tokens[side] += line["tokens"]
            self.ended[side] += line["ended"]

    def means(self, side: int) -> dict[str, float]:
        """reward; response_length: tokens, with the one that ends an answer; eos_rate: share of the answers that ended
        by themselves."""
        rows = len(self.rewards)
        return {
            "reward": math.fsum(pair[side] for pair in self.rewards) / rows,
            "response_length": self.tokens[side] / rows,
            "eos_rate": self.ended[side] / rows,
        }


def by_prompt(part: Sequence[BatchResponses]) -> list[Answers]:
    """What all contestants said to each prompt, in the order of the rows."""
    found: dict[int, Answers] = {}
    for place, answered in enumerate(part):
        for line in answered.lines:
            found.setdefault(line["row"], {})[place] = line
    return [found[row] for row in sorted(found)]


class Gathered:
    """What is kept of all answers, which go by a part at a time."""

    def __init__(self, contestants: int) -> None:
        self.pairs = [ResponsePairs() for _ in range(1, contestants)]
        """Of each but the baseline."""
        self.read, self.unusable, self.lost = 0, 0, 0
        self._contestants = contestants
        self._shown: dict[str, Answers] = {}

    def add(self, part: Sequence[BatchResponses], prompts: Sequence[Answers]) -> None:
        """`part`: of every contestant; `prompts`: the same by prompt."""
        read = part[0].read
        self.read += read
        self.unusable += part[0].unusable
        self.lost += sum(abs(read - one.too_long - one.unusable - len(one.lines)) for one in part)
        for answers in prompts:
            for place, pairs in enumerate(self.pairs, start=1):
                if answers.keys() >= {0, place}:
                    pairs.add(answers[place], answers[0])
        self._shown |= {answers[0]["id"]: answers for answers in prompts if len(answers) == self._contestants}
        self._shown = {identifier: self._shown[identifier] for identifier in heapq.nsmallest(SHOWN, self._shown)}

    def responses(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The prompts of the smallest ids that everyone answered: a sample that has nothing to do with the order of the
        rows, nor with how answers turned out."""
        return [
            {
                "prompt": answers[0]["prompt"][-1]["content"][:CHARACTERS],
                "answers": {
                    name: {"answer": answers[place]["answer"][:CHARACTERS], "reward": answers[place]["reward"]}
                    for place, name in enumerate(names)
                },
            }
            for answers in self._shown.values()
        ]


def run_win_rate(context: StageContext) -> StageResult:
    """Facts: results, a row per model (see `_result`); responses, some prompts with the answers of all.

    Writes results.json, and answers.jsonl: every prompt that was answered, with answers and rewards by model.
    """
    stage, started = context.spec, time.time()
    assert isinstance(stage, WinRate)
    artifacts = {name: artifact.path for name, artifact in context.inputs.items()}
    names = [model_name(model) for model in stage.contestants]
    gathered = Gathered(len(names))
    with (context.out / "answers.jsonl").open("w", encoding="utf-8") as target:
        for files in generate_responses(context, artifacts, prompt_batches(artifacts[stage.data])):
            part = [read_responses(file) for file in files]
            prompts = by_prompt(part)
            gathered.add(part, prompts)
            target.writelines(json.dumps(_line(answers, names), ensure_ascii=False) + "\n" for answers in prompts)
    expected = count_rows(artifacts[stage.data])
    if gathered.read != expected or gathered.lost:
        raise RowsLost(
            context.name,
            f"{expected} rows of `data` went in, {gathered.read} were read; {gathered.lost} of these were neither "
            "answered nor left out",
        )
    results = []
    for name, pairs in zip(names[1:], gathered.pairs, strict=True):
        too_long = expected - gathered.unusable - len(pairs.rewards)
        if not pairs.rewards:
            room = stage.max_length - stage.sampling.max_new_tokens
            raise StageError(
                context.name,
                f"none of the {expected:,} rows of `{stage.data}` (data) can be answered",
                cause=f"{too_long:,} prompts are longer than {room:,} tokens, {gathered.unusable:,} rows ask nothing "
                "or can't be rendered by a chat template",
                remedy=f"raise max_length (now {stage.max_length}), lower sampling.max_new_tokens (now "
                f"{stage.sampling.max_new_tokens}), or give other rows",
            )
        left_out = {"too_long": too_long, "unusable": gathered.unusable}
        results.append({"model": name, "set": stage.data, **_result(pairs, names[0]), "left_out": left_out})
    (context.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return StageResult({"results": results, "responses": gathered.responses(names)}, {"seconds": time.time() - started})


def _result(pairs: ResponsePairs, baseline: str) -> dict[str, Any]:
    """win_rate: share of the prompts on which the model got the higher reward, ties half; interval: where it lies with
    95% certainty (wins.py); the means of the model, and under `baseline` those of the baseline on the same prompts."""
    found = compare(pairs.rewards)
    return {
        "win_rate": found.rate,
        "interval": list(found.interval),
        "outcomes": {"wins": found.wins, "ties": found.ties, "losses": found.losses},
        **pairs.means(0),
        "baseline": {"model": baseline, **pairs.means(1)},
        "rows": len(pairs.rewards),
    }


def _line(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    first = next(iter(answers.values()))
    keys = ("answer", "reward", "tokens", "ended")
    given = {names[place]: {key: answers[place][key] for key in keys} for place in sorted(answers)}
    return {"id": first["id"], "prompt": first["prompt"], "answers": given}
