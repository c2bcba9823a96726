"""The curves of trainings in a report: what each kind is judged by in a chart, all else in small panels. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.run_state import RunState, StageState
from tunery.reporting.charts import COLOURS, Series, line_chart
from tunery.reporting.tables import Figure

LEADS = ("reward", "loss")
"""What a kind of training is judged by: the first of them that it told. Beside a reward, the loss of a policy says
nothing about how good it is."""
NOT_CURVES = frozenset({"learning_rate", "rows", "tokens", "tokens_per_second", "grad_norm", "epoch"})
"""The axis, what is known before the training, and what matters only when something went wrong: W&B has them."""
ROWS: dict[str, dict[str, str]] = {
    "distance from the first model": {
        "kl": "KL, nats",
        "kl_coefficient": "KL coefficient",
        "approximate_kl": "KL of a step's updates, nats",
        "sampler_gap": "sampler against trainer, nats",
    },
    "policy": {
        "loss": "loss",
        "policy_loss": "policy loss",
        "entropy": "entropy, nats a token",
        "clip_fraction": "share of tokens clipped",
    },
    "value model": {
        "value_loss": "value loss",
        "explained_variance": "explained variance",
        "returns": "returns",
    },
    "answers": {
        "response_length": "length, tokens",
        "eos_rate": "share that ended",
        "cut_off": "share cut off",
        "reward_deviation": "deviation of rewards",
    },
    "held apart": {
        "accuracy": "accuracy",
        "margin": "margin",
        "auc": "AUC",
    },
    "speed and memory": {
        "rollout_tokens_per_second": "rollout, tokens/s",
        "score_tokens_per_second": "scoring, tokens/s",
        "update_tokens_per_second": "update, tokens/s",
        "memory_gb": "memory, GB",
    },
}
"""The rows of panels: what belongs together, under its name, with what each panel says it shows. A measure that is not
here has a panel in a last row."""
LAST_ROW = "more"


@dataclass(frozen=True)
class Details:
    """What a kind of training told besides what leads it: panels by row, with the legend of all of them."""

    title: str
    keys: list[tuple[str, str]]
    rows: list[tuple[str, list[Figure]]]


@dataclass(frozen=True)
class _Group:
    """The trainings of one kind. `colours`: of each stage, the same in all charts of the report."""

    kind: str
    stages: list[StageState]
    colours: dict[str, int]

    @property
    def by_rows(self) -> bool:
        """Over the rows seen, which compares other batch sizes; over steps where rows were not told."""
        return all("rows" in values for stage in self.stages for values in stage.points.values())

    @property
    def unit(self) -> str:
        return "rows seen" if self.by_rows else "steps"

    @property
    def measures(self) -> list[str]:
        """What was told, in the order in which it was; of `eval_reward` that is `reward`."""
        told = (key for stage in self.stages for values in stage.points.values() for key in values)
        return [key for key in dict.fromkeys(key.removeprefix("eval_") for key in told) if key not in NOT_CURVES]

    @property
    def lead(self) -> str:
        measures = self.measures
        return next((measure for measure in LEADS if measure in measures), "")

    def series(self, measure: str) -> list[Series]:
        """A line a stage, and another for what the same measure is on held-out data."""
        return [
            Series(f"{stage.name} {word}", points, self.colours[stage.name], word)
            for stage in self.stages
            for key, word in ((measure, "train"), (f"eval_{measure}", "eval"))
            if (points := _points(stage, key, self.by_rows))
        ]


def curve_figures(state: RunState) -> list[Figure]:
    """The chart of what each kind of training is judged by."""
    figures = []
    for group in _groups(state):
        if lead := group.lead:
            series = group.series(lead)
            drawn = line_chart(series, group.unit, lead, whole=lead != "loss")
            figures.append(Figure(f"{group.kind or 'training'}: {lead}", drawn, keys=_styles(series)))
    return figures


def curve_details(state: RunState) -> list[Details]:
    """Of each kind that told more than what leads it: the panels."""
    details = []
    for group in _groups(state):
        rest = [measure for measure in group.measures if measure != group.lead]
        known = {measure for row in ROWS.values() for measure in row}
        others = {measure: measure.replace("_", " ") for measure in rest if measure not in known}
        rows = [
            (name, [_panel(group, measure, said) for measure, said in row.items() if measure in rest])
            for name, row in [*ROWS.items(), (LAST_ROW, others)]
        ]
        if rest:
            series = [one for measure in rest for one in group.series(measure)]
            stages = [(f"c{group.colours[stage.name] % COLOURS}", stage.name) for stage in group.stages]
            keys = [*(stages if len(stages) > 1 else []), *_styles(series)]
            title = f"{group.kind or 'training'} in detail, by {group.unit}"
            details.append(Details(title, keys, [(name, panels) for name, panels in rows if panels]))
    return details


def _groups(state: RunState) -> list[_Group]:
    trained = [stage for stage in state.stages.values() if stage.points]
    colours = {stage.name: index for index, stage in enumerate(trained)}
    kinds = dict.fromkeys(stage.kind for stage in trained)
    return [_Group(kind, [stage for stage in trained if stage.kind == kind], colours) for kind in kinds]


def _panel(group: _Group, measure: str, said: str) -> Figure:
    return Figure(said, line_chart(group.series(measure), group.unit, said, small=True), small=True)


def _styles(series: Sequence[Series]) -> list[tuple[str, str]]:
    """The legend of thin and thick lines, where there are thick ones."""
    evaluated = any(one.style == "eval" for one in series)
    return [("train-key", "train"), ("eval-key", "eval (held out)")] if evaluated else []


def _points(stage: StageState, key: str, by_rows: bool) -> list[tuple[float, float]]:
    return [(p.values["rows"] if by_rows else p.step, p.values[key]) for p in stage.curve if key in p.values]
