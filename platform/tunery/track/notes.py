"""The one fact of a stage that its line shows: what came out of it, in a few words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tunery.track.snapshot import StageState
from tunery.track.wording import as_number, count, measure, plain, share

Facts = Mapping[str, Any]


def note(stage: StageState) -> str:
    """What a stage's line ends with; empty when there is nothing worth saying yet."""
    if stage.status == "failed":
        return stage.error.message.splitlines()[0] if stage.error and stage.error.message else "failed"
    if stage.status == "waiting":
        return f"after {', '.join(stage.inputs)}" if stage.inputs else ""
    if stage.status == "running":
        latest = latest_loss(stage)
        return ", ".join(part for part in (latest, stage.detail) if part)
    if stage.status == "reused":
        return f"reused: {outcome(stage)}" if outcome(stage) else "reused"
    return outcome(stage)


def outcome(stage: StageState) -> str:
    """The main fact of a stage that has ended, whether it was made now or found in the store."""
    return _KINDS.get(stage.kind, _training)(stage.facts) or _other(stage.facts)


def latest_loss(stage: StageState) -> str:
    """The loss of the newest point that has one: 'loss 3.210'; or its reward, which says more where there is one."""
    for point in reversed(stage.curve):
        for name in ("reward", "loss"):
            if name in point.values:
                return f"{name} {measure(point.values[name])}"
    return ""


def listed(value: object) -> list[Mapping[str, Any]]:
    """The mappings of a list of mappings; a fact of another shape gives none."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def _dataset(facts: Facts) -> str:
    rows, quarantined = as_number(facts.get("rows")), as_number(facts.get("quarantined"))
    if rows is None:
        return ""
    return f"{count(rows)} rows" + (f", {count(quarantined)} quarantined" if quarantined else "")


def _score(facts: Facts) -> str:
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


def _select(facts: Facts) -> str:
    rows, kept = as_number(facts.get("rows_in")), as_number(facts.get("kept"))
    if rows is None or kept is None:
        return ""
    return f"kept {share(kept, rows)}: {count(kept)} of {count(rows)}"


def _review(facts: Facts) -> str:
    kept, agreed = as_number(facts.get("kept")), facts.get("agreement")
    told = agreed if isinstance(agreed, Mapping) else {}
    reviewed, agreeing = as_number(told.get("reviewed")), as_number(told.get("agreed"))
    if kept is None or reviewed is None or agreeing is None:
        return ""
    return f"agrees on {share(agreeing, reviewed)} of {count(reviewed)} reviewed, kept {count(kept)} rows"


def _augment(facts: Facts) -> str:
    rows, given, heldout = (as_number(facts.get(key)) for key in ("rows", "rows_in", "heldout"))
    if rows is None or given is None:
        return ""
    return f"{count(rows)} rows of {count(given)}" + (f", {count(heldout)} held out" if heldout else "")


def _training(facts: Facts) -> str:
    loss, held_out = as_number(facts.get("loss")), as_number(facts.get("eval_loss"))
    if loss is None:
        return f"eval {measure(held_out)}" if held_out is not None else ""
    return f"loss {measure(loss)}" + (f" → eval {measure(held_out)}" if held_out is not None else "")


def _classifier(facts: Facts) -> str:
    area = as_number(facts.get("eval_auc"))
    return _training(facts) + (f", AUC {area:.2f}" if area is not None else "")


def _preference(facts: Facts) -> str:
    accuracy = as_number(facts.get("eval_accuracy"))
    return _training(facts) + (f", {accuracy:.0%} preferred" if accuracy is not None else "")


def _rated(facts: Facts) -> str:
    margin = as_number(facts.get("eval_margin"))
    return _training(facts) + (f", margin {measure(margin, 3)}" if margin is not None else "")


def _groups(facts: Facts) -> str:
    reward, held_out, kl = (as_number(facts.get(key)) for key in ("reward", "eval_reward", "kl"))
    if reward is None:
        return ""
    told = f"reward {measure(reward, 3)}" + (f" → eval {measure(held_out, 3)}" if held_out is not None else "")
    return told + (f", KL {measure(kl, 3)}" if kl is not None else "")


def _evaluate(facts: Facts) -> str:
    results = [result for result in listed(facts.get("results")) if as_number(result.get("loss")) is not None]
    if not results:
        return ""
    first = [result for result in results if result.get("set") == results[0].get("set")]
    best = min(first, key=lambda result: as_number(result.get("loss")) or 0.0)
    lead = f"best {best.get('model', '')}: " if len(first) > 1 else f"{best.get('model', '')}: "
    return f"{lead}loss {measure(best['loss'])} on {best.get('set', '')}"


def _other(facts: Facts) -> str:
    """Of a stage kind that is not known here: its first few plain facts."""
    simple = [(key, value) for key, value in facts.items() if isinstance(value, int | float | str) and value != ""]
    return ", ".join(f"{key.replace('_', ' ')} {plain(value, key)}" for key, value in simple[:3])


_KINDS: dict[str, Callable[[Facts], str]] = {
    "dataset": _dataset,
    "score": _score,
    "select": _select,
    "review": _review,
    "augment": _augment,
    "pretrain": _training,
    "sft": _training,
    "classifier": _classifier,
    "dpo": _preference,
    "kto": _rated,
    "grpo": _groups,
    "rloo": _groups,
    "evaluate": _evaluate,
}
