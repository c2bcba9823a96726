"""Training curves of a report: the primary metric of each kind in a chart, all others in small panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.run_state import RunState, StageState
from tunery.reporting.charts import COLOURS, Series, line_chart
from tunery.reporting.tables import Figure
from tunery.spec import TRAINERS

NOT_CURVES = frozenset({"learning_rate", "rows", "tokens", "tokens_per_second", "grad_norm", "epoch"})
"""Logged metrics without a chart: the x-axis, what is known before training, and diagnostics, which W&B has."""
METRIC_GROUPS: dict[str, dict[str, str]] = {
    "KL divergence": {
        "kl": "KL to the reference, nats",
        "kl_coefficient": "KL coefficient",
        "approximate_kl": "KL of the update, nats",
        "sampler_logprob_diff": "sampler logprob diff, nats",
    },
    "policy": {
        "loss": "loss",
        "policy_loss": "policy loss",
        "entropy": "entropy, nats per token",
        "clip_fraction": "clip fraction",
    },
    "value model": {
        "value_loss": "value loss",
        "explained_variance": "explained variance",
        "returns": "returns",
    },
    "responses": {
        "response_length": "length, tokens",
        "eos_rate": "EOS rate",
        "clipped_ratio": "clipped ratio",
        "reward_std": "reward std",
    },
    "classification": {
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
"""Rows of panels: group -> {metric: panel title}. Metrics that are not listed have panels in a last row."""
OTHER_METRICS = "other metrics"


@dataclass(frozen=True)
class Details:
    """All but the primary metric of a kind of training: panels by row, with their legend as (CSS class, label)."""

    title: str
    keys: list[tuple[str, str]]
    rows: list[tuple[str, list[Figure]]]


@dataclass(frozen=True)
class _Group:
    """The trainings of one kind. `colours`: palette index by stage, the same in all charts of the report."""

    kind: str
    stages: list[StageState]
    colours: dict[str, int]

    @property
    def by_rows(self) -> bool:
        """Whether the x-axis is training rows, comparable across batch sizes. Steps if rows were not logged."""
        return all("rows" in values for stage in self.stages for values in stage.points.values())

    @property
    def unit(self) -> str:
        return "training rows" if self.by_rows else "steps"

    @property
    def metrics(self) -> list[str]:
        """Logged metrics in order of first appearance; `eval_reward` counts as `reward`."""
        logged = (key for stage in self.stages for values in stage.points.values() for key in values)
        return [key for key in dict.fromkeys(key.removeprefix("eval_") for key in logged) if key not in NOT_CURVES]

    @property
    def primary_metric(self) -> str:
        spec, metrics = TRAINERS.get(self.kind), self.metrics
        primary_metric = "loss" if spec is None else spec.primary_metric
        return next((metric for metric in (primary_metric, "loss") if metric in metrics), "")

    def series(self, metric: str) -> list[Series]:
        """A train curve and a held-out curve of the metric for each stage that logged them."""
        return [
            Series(f"{stage.name} {split}", points, self.colours[stage.name], split)
            for stage in self.stages
            for key, split in ((metric, "train"), (f"eval_{metric}", "eval"))
            if (points := _points(stage, key, self.by_rows))
        ]


def curve_figures(state: RunState) -> list[Figure]:
    """A chart of the primary metric of each kind of training."""
    figures = []
    for group in _groups(state):
        if metric := group.primary_metric:
            series = group.series(metric)
            chart = line_chart(series, group.unit, metric, full_range=metric != "loss")
            figures.append(Figure(f"{group.kind or 'training'}: {metric}", chart, keys=_legend(series)))
    return figures


def curve_details(state: RunState) -> list[Details]:
    """Panels of the other metrics, for each kind of training that logged any."""
    details = []
    for group in _groups(state):
        rest = [metric for metric in group.metrics if metric != group.primary_metric]
        known = {metric for row in METRIC_GROUPS.values() for metric in row}
        others = {metric: metric.replace("_", " ") for metric in rest if metric not in known}
        rows = [
            (name, [_panel(group, metric, title) for metric, title in row.items() if metric in rest])
            for name, row in [*METRIC_GROUPS.items(), (OTHER_METRICS, others)]
        ]
        if rest:
            series = [one for metric in rest for one in group.series(metric)]
            stages = [(f"c{group.colours[stage.name] % COLOURS}", stage.name) for stage in group.stages]
            keys = [*(stages if len(stages) > 1 else []), *_legend(series)]
            title = f"{group.kind or 'training'} in detail, by {group.unit}"
            details.append(Details(title, keys, [(name, panels) for name, panels in rows if panels]))
    return details


def _groups(state: RunState) -> list[_Group]:
    trained = [stage for stage in state.stages.values() if stage.points]
    colours = {stage.name: index for index, stage in enumerate(trained)}
    kinds = dict.fromkeys(stage.kind for stage in trained)
    return [_Group(kind, [stage for stage in trained if stage.kind == kind], colours) for kind in kinds]


def _panel(group: _Group, metric: str, title: str) -> Figure:
    return Figure(title, line_chart(group.series(metric), group.unit, title, small=True), small=True)


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Legend of train (thin) and eval (thick) lines; empty without eval lines."""
    evaluated = any(one.style == "eval" for one in series)
    return [("train-key", "train"), ("eval-key", "eval (held out)")] if evaluated else []


def _points(stage: StageState, key: str, by_rows: bool) -> list[tuple[float, float]]:
    return [(p.values["rows"] if by_rows else p.step, p.values[key]) for p in stage.curve if key in p.values]
