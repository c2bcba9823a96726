"""Answers in a report and in W&B: what a model said to a prompt before it was trained and after, or what several models
said to it, with their rewards. Pure.

Two forms of the fact `responses` are known: of a training {prompt, before, after, reward_before, reward_after}, of a
`win_rate` stage {prompt, answers: {model: {answer, reward}}}. An entry of another form is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, measure
from tunery.events.run_state import StageState
from tunery.events.stage_summary import listed

RESPONSES = "responses"
"""The fact's name."""
OPEN = 3
"""Prompts of a stage whose answers are shown without being asked for."""


@dataclass(frozen=True)
class Answer:
    """`by`: before, after, or the model's name. `best`: no other answer to the prompt has as high a reward."""

    by: str
    text: str
    reward: float | None
    best: bool = False

    @property
    def said_reward(self) -> str:
        return "" if self.reward is None else f"reward {measure(self.reward, 3)}"


@dataclass(frozen=True)
class Asked:
    """A prompt and the answers to it, which are to be read side by side."""

    prompt: str
    answers: list[Answer]

    @property
    def said_rewards(self) -> str:
        """In the order of the answers: 'reward 1.00 → 4.00' of one model, 'base 0.50, ppo 4.00' of several."""
        known = [(answer.by, measure(answer.reward, 3)) for answer in self.answers if answer.reward is not None]
        if [by for by, _ in known] == ["before", "after"]:
            return f"reward {known[0][1]} → {known[1][1]}"
        return ", ".join(f"{by} {reward}" for by, reward in known)


def responses(stages: Iterable[StageState]) -> list[tuple[str, list[Asked]]]:
    """The answers of each stage that told some, under its name; of a trial's stage with the trial's."""
    found = []
    for stage in stages:
        if told := asked(stage.facts):
            found.append((f"{stage.name}, trial {stage.trial}" if stage.trial else stage.name, told))
    return found


def asked(facts: Mapping[str, Any]) -> list[Asked]:
    """The prompts with their answers, whichever form the fact has."""
    told = ((str(entry.get("prompt") or ""), _answers(entry)) for entry in listed(facts.get(RESPONSES)))
    return [Asked(prompt, answers) for prompt, answers in told if answers]


def responses_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): the prompt, an answer a column, and their rewards. Without answers no row."""
    told = asked(facts)
    names = list(dict.fromkeys(answer.by for one in told for answer in one.answers))
    rows = []
    for one in told:
        by = {answer.by: answer for answer in one.answers}
        answers = [by.get(name) for name in names]
        texts = [answer.text if answer else None for answer in answers]
        rows.append([one.prompt, *texts, *(answer.reward if answer else None for answer in answers)])
    return ["prompt", *names, *(f"reward {name}" for name in names)], rows


def _answers(entry: Mapping[str, Any]) -> list[Answer]:
    models = entry.get("answers")
    if isinstance(models, Mapping):
        told = [(str(name), one.get("answer"), one.get("reward")) for name, one in models.items() if _is_answer(one)]
        rewards = [reward for _, _, value in told if (reward := as_number(value)) is not None]
        # Of two that are as good neither is the best.
        best = max(rewards) if len(rewards) > 1 and rewards.count(max(rewards)) == 1 else None
        return [
            Answer(by, str(text), (reward := as_number(value)), best is not None and reward == best)
            for by, text, value in told
        ]
    sides = [side for side in ("before", "after") if isinstance(entry.get(side), str)]
    return [Answer(side, entry[side], as_number(entry.get(f"reward_{side}"))) for side in sides]


def _is_answer(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("answer"), str)
