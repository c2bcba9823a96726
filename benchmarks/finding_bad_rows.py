"""Which score finds which kind of bad row? Runs experiments/filter.yaml and prints the table of docs/benchmarks.md.

    python benchmarks/finding_bad_rows.py [--store .tunery] [--seeds 17 18 19]

A fifth of 1,200 question rows is corrupted in four ways. For each score: AUC against all corrupted rows and
against each kind (0.5 is chance), and recall when exactly the worst fifth is dropped. Beside them a random order, and
two ways to combine scores: `mean rank` (of those whose AUC is above 0.55 on the first seed), and `rules` (the filter
`together` of the experiment: rules that must all pass), whose recall is at the share that it drops. Several seeds:
other corruption and another base model; means are printed, and the spread of the AUC.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from tunery.ingest.corruption_metrics import auc, auc_by_kind
from tunery.scoring.score_stats import as_badness
from tunery.selection.thresholds import random_scores
from tunery.store.rows import read_rows, shards

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("shuffled", "swapped", "cut", "repeated")


def run(seed: int, store: Path) -> dict[str, Path]:
    """The artifacts of experiments/filter.yaml under this seed, by stage."""
    experiment = yaml.safe_load((ROOT / "experiments/filter.yaml").read_text().replace("2e-3", "0.002"))
    experiment |= {"name": f"filter-{seed}", "seed": seed, "tracking": {"wandb": {"mode": "disabled"}}}
    file = store / f"filter-{seed}.yaml"
    store.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    subprocess.run([sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)], check=True)
    log = store / "runs" / experiment["name"] / "events/driver.jsonl"
    events = map(json.loads, log.read_text().splitlines())
    return {event["stage"]: Path(event["artifact"]) for event in events if event["event"] == "stage_finished"}


def badness_of(scored: Path) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Each score with high for bad, the planted kinds, the ids."""
    goods = json.loads((scored / "manifest.json").read_text())["facts"]["scores"]
    table = [pq.read_table(scored / "scores" / path.name) for path in shards(scored)]
    scores = {
        name: as_badness(np.concatenate([piece[name].to_numpy() for piece in table]).astype(float), told["good"])
        for name, told in goods.items()
    }
    rows = list(read_rows(scored, ["id", "injected_corruption"]))
    return scores, [row["injected_corruption"] for row in rows], [row["id"] for row in rows]


def line(badness: np.ndarray, planted: list[str], dropped: np.ndarray | None = None) -> list[float]:
    """AUC of all, AUC by kind, recall, recall by kind, share dropped."""
    kinds = np.array(planted)
    bad = kinds != ""
    if dropped is None:
        dropped = np.zeros(len(bad), bool)
        dropped[np.argsort(-badness, kind="stable")[: int(bad.sum())]] = True
    by_kind = auc_by_kind(badness, planted)
    recall = [float(dropped[kinds == kind].mean()) for kind in KINDS]
    overall = auc(badness, bad)
    assert overall is not None
    return [overall, *(by_kind[kind] for kind in KINDS), float(dropped[bad].mean()), *recall, float(dropped.mean())]


def mean_rank(scores: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """Ties share a rank."""
    ranks = []
    for name in names:
        _, inverse, counts = np.unique(scores[name], return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    return np.asarray(np.mean(ranks, axis=0))


def measure(seed: int, store: Path, combined: list[str]) -> dict[str, list[float]]:
    made = run(seed, store)
    scores, planted, ids = badness_of(made["scored"])
    told = {name: line(badness, planted) for name, badness in scores.items()}
    if not combined:
        combined += [name for name, values in told.items() if values[0] > 0.55]
    told["mean rank"] = line(mean_rank(scores, combined), planted)
    kept = {row["id"] for row in read_rows(made["together"], ["id"])}
    dropped = np.array([row not in kept for row in ids])
    told["rules"] = line(dropped.astype(float), planted, dropped)
    told["random"] = line(random_scores(ids, 0), planted)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path(".tunery"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    arguments = parser.parse_args()
    combined: list[str] = []
    runs = [measure(seed, arguments.store, combined) for seed in arguments.seeds]
    print(f"\n{len(runs)} seeds; mean rank of: {', '.join(combined)}\n")
    kinds = " | ".join(KINDS)
    print(f"| score | AUC | sd | {kinds} | recall | {kinds} | dropped |")
    print("|---|" + "---|" * 12)
    for name in sorted(runs[0], key=lambda name: -statistics.mean(run[name][0] for run in runs)):
        values = [statistics.mean(run[name][place] for run in runs) for place in range(11)]
        spread = statistics.stdev(run[name][0] for run in runs) if len(runs) > 1 else float("nan")
        shown = [f"{value:.2f}" for value in values]
        print(f"| {name} | {shown[0]} | {spread:.3f} | " + " | ".join(shown[1:]) + " |")


if __name__ == "__main__":
    main()
