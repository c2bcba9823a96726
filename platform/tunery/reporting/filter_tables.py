"""Summary tables of filters: corrupted rows caught, diversity of the selected rows, agreement with a reviewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.reporting.tables import SummaryTable
from tunery.spec import Experiment, Review, Select
from tunery.store import Artifact


def filter_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
    """Precision and recall of each selection on injected corruption, next to an equally strict random filter."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        metrics = artifacts[name].facts.get("injected_corruption") if isinstance(stage, Select | Review) else None
        if not metrics:
            continue
        facts = artifacts[name].facts
        caught = f"{metrics['dropped']:,} of {metrics['total']:,}"
        rows.append([name, f"{facts['dropped']:,}", caught, metrics["precision"], metrics["recall"], metrics["auc"]])
        expected = metrics["random_recall"] * metrics["total"]
        rows.append(
            [
                "random filter",
                f"{facts['dropped']:,}",
                f"{expected:,.0f} of {metrics['total']:,}",
                metrics["random_precision"],
                metrics["random_recall"],
                0.5,
            ]
        )
        kinds = ", ".join(f"{kind} {recall:.0%}" for kind, recall in metrics["recall_by_kind"].items())
        notes.append(f"recall of {name} by kind of corruption: {kinds}")
    if not rows:
        return None
    columns = ["filter", "dropped", "corrupted rows caught", "precision", "recall", "AUC"]
    return {"title": "Injected corruption", "columns": columns, "rows": rows, "notes": notes}


def diversity_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
    """Coverage of the candidates by each selection's rows, next to a random subset of the same size."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        stats = artifacts[name].facts.get("diverse") if isinstance(stage, Select) else None
        if not stats:
            continue
        kept = f"{stats['kept']:,} of {stats['candidates']:,}"
        for label, coverage in ((f"{name} ({stats['method']})", stats["coverage"]), ("random subset", stats["random"])):
            rows.append([label, kept, coverage["radius"], coverage["similarity"]])
        if stats["kept"] < stats["requested"]:
            notes.append(f"{name}: fewer than the requested {stats['requested']:,} rows: {_shortfall_reason(stats)}")
    if not rows:
        return None
    notes.append(
        "radius: largest distance from a row to its nearest kept row; similarity: mean cosine to the nearest kept row"
    )
    columns = ["subset", "kept", "radius", "similarity"]
    return {"title": "Diversity", "columns": columns, "rows": rows, "notes": notes}


def _shortfall_reason(stats: Mapping[str, Any]) -> str:
    """Why fewer rows were selected than requested."""
    if stats["method"] == "k_center":
        return "all other rows have the same embedding as a kept row"
    chance = stats["chance_similarity"]
    median = "" if chance is None else f" (median of random pairs: {chance['median']:.2f})"
    return f"all other rows have a similarity above {stats['max_similarity']:g} to a kept row{median}"


def review_table(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> SummaryTable | None:
    """Agreement of each reviewed filter with the reviewer, and the threshold with the highest agreement."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Review):
            continue
        facts = artifacts[name].facts
        agreement = facts["agreement"]
        for threshold in facts["thresholds"]:
            rows.append(
                [
                    f"{stage.data} in {name}",
                    f"{agreement['reviewed']:,}",
                    agreement["share"],
                    agreement["kappa"],
                    threshold["score"],
                    threshold["current_threshold"],
                    threshold["threshold"],
                    threshold["agreement"],
                ]
            )
            if threshold["beyond_reviewed"]:
                notes.append(
                    f"{name}: the best {threshold['score']} threshold is at the edge of the reviewed range; "
                    "one outside it may agree better"
                )
        pending = facts["sampled"] - facts["sampled_decided"]
        notes.append(
            f"{name}: the review restored {facts['restored']:,} dropped rows and removed {facts['removed']:,} kept rows"
            + (f"; {pending:,} rows are not reviewed yet" if pending > 0 else "")
        )
    if not rows:
        return None
    columns = ["filter", "reviewed", "agreement", "kappa", "score", "threshold", "best threshold", "best agreement"]
    notes.append("measured near the threshold only; far from it filter and reviewer agree more often")
    title = "Agreement of filter and reviewer"
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}
