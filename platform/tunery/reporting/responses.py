"""Model responses in the report and in W&B: before and after a training, or of several models, with their rewards.

The fact `responses` has two formats: {prompt, before, after, reward_before, reward_after} from a training, and {prompt,
responses: {model: {response, reward}}} from a `win_rate` stage. Entries of any other format are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, measure
from tunery.events.run_state import StageState
from tunery.events.stage_summary import mappings_in
from tunery.spec import STAGE_KINDS

RESPONSES = "responses"
"""Name of the fact."""
MAX_EXPANDED = 3
"""Prompts of a stage that are expanded when the report is opened."""


@dataclass(frozen=True)
class PreviewedResponse:
    """`label`: before, after, or the model's name. `best`: it has the best reward for the prompt, without ties."""

    label: str
    text: str
    reward: float | None
    best: bool = False

    @property
    def reward_text(self) -> str:
        return "" if self.reward is None else f"reward {measure(self.reward, 3)}"


@dataclass(frozen=True)
class PromptResponses:
    """A prompt and its responses, which the page shows side by side."""

    prompt: str
    responses: list[PreviewedResponse]

    @property
    def rewards_text(self) -> str:
        """'reward 1.00 → 4.00' for before and after, 'base 0.50, ppo 4.00' for several models."""
        known = [(one.label, measure(one.reward, 3)) for one in self.responses if one.reward is not None]
        if [label for label, _ in known] == ["before", "after"]:
            return f"reward {known[0][1]} → {known[1][1]}"
        return ", ".join(f"{label} {reward}" for label, reward in known)


def responses(stages: Iterable[StageState]) -> list[tuple[str, list[PromptResponses]]]:
    """The responses of each stage that logged some, as (stage name with its trial, if any; prompts)."""
    result = []
    for stage in stages:
        if prompts := prompt_responses(stage.facts):
            result.append((f"{stage.name}, trial {stage.trial}" if stage.trial else stage.name, prompts))
    return result


def prompt_responses(facts: Mapping[str, Any]) -> list[PromptResponses]:
    """The prompts with their responses, from either format of the fact."""
    entries = ((str(entry.get("prompt") or ""), _responses(entry)) for entry in mappings_in(facts.get(RESPONSES)))
    return [PromptResponses(prompt, responses) for prompt, responses in entries if responses]


def responses_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows): the prompt, a column for each response, and a column for each reward."""
    prompts = prompt_responses(facts)
    labels = list(dict.fromkeys(response.label for one in prompts for response in one.responses))
    rows = []
    for one in prompts:
        by_label = {response.label: response for response in one.responses}
        cells = [by_label.get(label) for label in labels]
        texts = [cell.text if cell else None for cell in cells]
        rows.append([one.prompt, *texts, *(cell.reward if cell else None for cell in cells)])
    return ["prompt", *labels, *(f"reward {label}" for label in labels)], rows


def _responses(entry: Mapping[str, Any]) -> list[PreviewedResponse]:
    models = entry.get("responses")
    if isinstance(models, Mapping):
        items = [
            (str(name), one.get("response"), one.get("reward")) for name, one in models.items() if _is_response(one)
        ]
        rewards = [reward for _, _, value in items if (reward := as_number(value)) is not None]
        ranked = sorted(rewards, key=lambda reward: STAGE_KINDS["win_rate"].cost("reward", reward))
        best = ranked[0] if len(ranked) > 1 and ranked[0] != ranked[1] else None  # None for a tie
        return [
            PreviewedResponse(name, str(text), (reward := as_number(value)), best is not None and reward == best)
            for name, text, value in items
        ]
    labels = [label for label in ("before", "after") if isinstance(entry.get(label), str)]
    return [PreviewedResponse(label, entry[label], as_number(entry.get(f"reward_{label}"))) for label in labels]


def _is_response(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("response"), str)
