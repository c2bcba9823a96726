"""One-line summary of a stage: its status and main result, in a few words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, count, measure, plain, share
from tunery.events.run_state import StageState
from tunery.spec import STAGE_KINDS, TRAINERS
from tunery.spec.plugins import load_object

Facts = Mapping[str, Any]


def note(stage: StageState) -> str:
    """Return the text at the end of a stage's line: its error, the inputs that it waits for, its progress or its
    result; "" if there is none."""
    if stage.status == "failed":
        return stage.error.message.splitlines()[0] if stage.error and stage.error.message else "failed"
    if stage.status == "pending":
        return f"after {', '.join(stage.inputs)}" if stage.inputs else ""
    if stage.status == "running":
        return ", ".join(part for part in (latest(stage), stage.detail) if part)
    if stage.status == "reused":
        return f"reused: {outcome(stage)}" if outcome(stage) else "reused"
    return outcome(stage)


def outcome(stage: StageState) -> str:
    """Return the main result of a stage that was built or reused."""
    kind = STAGE_KINDS.get(stage.kind)
    summary: Callable[[Facts], str] = training_summary if kind is None else load_object(kind.summary)
    usable = usable_rows(stage.facts) if stage.kind in TRAINERS else None
    result = summary(stage.facts) or _other(stage.facts)
    parts = (result, usable.note if usable else "", mixture_note(stage.facts))
    return ", ".join(part for part in parts if part)


def mixture_note(facts: Facts) -> str:
    """Return the share of tokens of each stage in a data mixture: 'tokens: web 70%, code 30%'; "" without a mixture."""
    mixture = facts.get("mixture")
    if not isinstance(mixture, Mapping):
        return ""
    return "tokens: " + ", ".join(f"{stage} {share(part['share'], 1)}" for stage, part in mixture.items())


@dataclass(frozen=True)
class UsableRows:
    """Numbers of input rows of a training: all, unusable, too long, and truncated ones."""

    rows: float
    unusable: float
    too_long: float
    """Prompts over the length limit. They are dropped, not truncated."""
    truncated: float

    @property
    def used(self) -> float:
        return self.rows - self.unusable - self.too_long

    @property
    def reasons(self) -> str:
        """For example '32 unusable, 27 truncated'; "" if every row is used unchanged."""
        counts = {"unusable": self.unusable, "too long": self.too_long, "truncated": self.truncated}
        return ", ".join(f"{count(number)} {reason}" for reason, number in counts.items() if number)

    @property
    def note(self) -> str:
        """For example '28 of 60 rows (32 unusable, 27 truncated)'; "" if every row is used unchanged."""
        rows = count(self.rows) if self.used == self.rows else f"{count(self.used)} of {count(self.rows)}"
        return f"{rows} rows ({self.reasons})" if self.reasons else ""


def usable_rows(facts: Facts) -> UsableRows | None:
    """Return the row counts in the facts of a training; None if they lack the number of rows."""
    rows, *counts = (as_number(facts.get(name)) for name in ("rows", "unusable", "too_long", "truncated"))
    return None if rows is None else UsableRows(rows, *(number or 0 for number in counts))


def latest(stage: StageState) -> str:
    """Return the reward and KL, or else the loss, of the latest point of the curve that has either: 'reward 4.61, KL
    11.9' or 'loss 3.210'."""
    for point in reversed(stage.curve):
        if "reward" in point.values:
            return _reward_and_kl(None, point.values["reward"], point.values.get("kl"))
        if "loss" in point.values:
            return f"loss {measure(point.values['loss'])}"
    return ""


@dataclass(frozen=True)
class Rewards:
    """Mean reward of a policy's responses before and after training, and its KL from the reference model."""

    before: float | None
    after: float
    kl: float | None
    held_out: bool
    """Whether the rewards are for held-out prompts, or else for the training prompts of the first and last steps."""


def rewards(facts: Facts) -> Rewards | None:
    """Return the rewards in the facts of a stage that trains on rewards; None if they have none."""
    held_out = as_number(facts.get("eval_reward"))
    names = ("first_reward", "reward") if held_out is None else ("eval_reward_before", "eval_reward")
    before, after = (as_number(facts.get(name)) for name in names)
    # Not every trainer computes the KL on held-out prompts.
    kls = [as_number(facts.get(name)) for name in (("kl",) if held_out is None else ("eval_kl", "kl"))]
    kl = next((value for value in kls if value is not None), None)
    return None if after is None else Rewards(before, after, kl, held_out is not None)


def mappings_in(value: object) -> list[Mapping[str, Any]]:
    """Return the mappings in a list; [] if `value` is not a list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def dataset_summary(facts: Facts) -> str:
    rows, quarantined = as_number(facts.get("rows")), as_number(facts.get("quarantined"))
    if rows is None:
        return ""
    ignored = facts.get("ignored_columns")
    names = list(ignored) if isinstance(ignored, Mapping) else []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{count(rows)} rows"
        + (f", {count(quarantined)} quarantined" if quarantined else "")
        + (f", not read: {', '.join(map(str, names[:3]))}{more}" if names else "")
    )


def score_summary(facts: Facts) -> str:
    rows = as_number(facts.get("rows_out")) or as_number(facts.get("rows_in"))
    parts = [f"{count(rows)} rows"] if rows else []
    scores = facts.get("scores")
    for name, score in scores.items() if isinstance(scores, Mapping) else ():
        auc, median = (as_number(score.get(key)) if isinstance(score, Mapping) else None for key in ("auc", "median"))
        if auc is not None:
            parts.append(f"{name} AUC {auc:.2f}")
        elif median is not None:
            parts.append(f"{name} median {measure(median, 3)}")
    return ", ".join(parts[:3])


def select_summary(facts: Facts) -> str:
    rows, kept = as_number(facts.get("rows_in")), as_number(facts.get("kept"))
    if rows is None or kept is None:
        return ""
    return f"kept {share(kept, rows)}: {count(kept)} of {count(rows)}"


def review_summary(facts: Facts) -> str:
    kept, agreement = as_number(facts.get("kept")), as_mapping(facts.get("agreement"))
    reviewed, agreeing = as_number(agreement.get("reviewed")), as_number(agreement.get("agreed"))
    if kept is None or reviewed is None or agreeing is None:
        return ""
    return f"agrees on {share(agreeing, reviewed)} of {count(reviewed)} reviewed, kept {count(kept)} rows"


def augment_summary(facts: Facts) -> str:
    rows, given, heldout = (as_number(facts.get(key)) for key in ("rows", "rows_in", "heldout"))
    if rows is None or given is None:
        return ""
    return f"{count(rows)} rows of {count(given)}" + (f", {count(heldout)} held out" if heldout else "")


def training_summary(facts: Facts) -> str:
    loss, held_out = as_number(facts.get("loss")), as_number(facts.get("eval_loss"))
    if loss is None:
        return f"eval {measure(held_out)}" if held_out is not None else ""
    return f"loss {measure(loss)}" + (f" → eval {measure(held_out)}" if held_out is not None else "")


def classifier_summary(facts: Facts) -> str:
    area = as_number(facts.get("eval_auc"))
    return training_summary(facts) + (f", AUC {area:.2f}" if area is not None else "")


def preference_summary(facts: Facts) -> str:
    accuracy = as_number(facts.get("eval_accuracy"))
    return training_summary(facts) + (f", accuracy {accuracy:.2f}" if accuracy is not None else "")


def policy_summary(facts: Facts) -> str:
    change = rewards(facts)
    return training_summary(facts) if change is None else _reward_and_kl(change.before, change.after, change.kl)


def _reward_and_kl(before: float | None, after: float, kl: float | None) -> str:
    was = f"{measure(before, 3)} → " if before is not None else ""
    return f"reward {was}{measure(after, 3)}" + (f", KL {measure(kl, 3)}" if kl is not None else "")


def margin_summary(facts: Facts) -> str:
    margin = as_number(facts.get("eval_margin"))
    return training_summary(facts) + (f", margin {measure(margin, 3)}" if margin is not None else "")


def evaluate_summary(facts: Facts) -> str:
    results = [result for result in mappings_in(facts.get("results")) if as_number(result.get("loss")) is not None]
    if not results:
        return ""
    first = [result for result in results if result.get("set") == results[0].get("set")]
    best = min(first, key=lambda result: STAGE_KINDS["evaluate"].cost("loss", result["loss"]))
    lead = f"best {best.get('model', '')}: " if len(first) > 1 else f"{best.get('model', '')}: "
    return f"{lead}loss {measure(best['loss'])} on {best.get('set', '')}"


def win_rate_summary(facts: Facts) -> str:
    results = [result for result in mappings_in(facts.get("results")) if as_number(result.get("win_rate")) is not None]
    if not results:
        return ""
    best = min(results, key=lambda result: STAGE_KINDS["win_rate"].cost("win_rate", result["win_rate"]))
    against = best.get("baseline")
    baseline = against.get("model", "") if isinstance(against, Mapping) else ""
    lead = "best " if len(results) > 1 else ""
    return f"{lead}{best.get('model', '')}: wins {share(best['win_rate'], 1)} against {baseline}"


def _other(facts: Facts) -> str:
    """Summarize a stage of unknown kind by its first three facts with plain values."""
    simple = [(key, value) for key, value in facts.items() if isinstance(value, int | float | str) and value != ""]
    return ", ".join(f"{key.replace('_', ' ')} {plain(value, key)}" for key, value in simple[:3])
