"""Does filtering help? Fine-tuning at equal steps on all rows, a random share, and the best share by each score.

    python benchmarks/filtering_helps.py [--shares 0.8 0.5] [--seeds 17 18 19] [--epochs 1] [--scores perplexity ..]
                                         [--device cpu] [--store DIR]

The data is the quickstart's: 1,200 questions about Python's library, a fifth of them corrupted, and a small
model that is pre-trained on the documentation. Training sets:

    all       the 1,200 rows
    intact    the 960 that were not corrupted: what a perfect filter would keep
    random    a share of them, drawn without a look
    others    the best share by one score

Each is trained on for the same number of optimizer steps, once a seed (of data order), and measured on held-out
questions. Prints mean and standard deviation of the held-out loss, and the difference to `all` and to `random` of the
same share, paired by seed. Where a score has many equal values (violated rules, duplicates) its ties at the cut go to
the rows that come first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunery.store.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
INTACT = 0.8
SCORES: dict[str, dict[str, Any]] = {
    "perplexity": {"perplexity": "base"},
    "ifd": {"ifd": "base"},
    "embedding": {"embedding": "base", "reference": "validation"},
    "length": {"length": "words"},
    "gopher": {"gopher": {"words_min": None, "stop_words_min": None}},
    "c4": {"c4": {"sentences_min": None, "line_words_min": None}},
    "language": {"language": "en"},
    "duplicates": {"duplicates": "normalised", "of": "response"},
    "near_duplicates": {"near_duplicates": {"of": "response", "threshold": 0.5, "ngram": 3}},
}
"""As in experiments/filter.yaml; `embedding` is the likeness to validation rows, which nobody is measured on."""
Arm = tuple[str, float]
"""(training set, its share of all rows)"""
Losses = dict[tuple[Arm, float, int], float]
"""By arm, epochs over all rows, and seed."""


def tunery(experiment: dict[str, Any], folder: Path, store: Path) -> Path:
    """Runs it; returns the run's folder."""
    file = folder / f"{experiment['name']}.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    subprocess.run([sys.executable, "-m", "tunery", "run", str(file), "--store", str(store)], check=True)
    return store / "runs" / experiment["name"]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events/driver.jsonl").read_text().splitlines()]


def prepare(scores: Sequence[str], shares: Sequence[float], device: str, folder: Path, store: Path) -> dict[str, Any]:
    """The quickstart's stages up to the scores, a selection by each score and share, and beside the experiment's file
    the intact rows."""
    text = (ROOT / "experiments/quickstart.yaml").read_text().replace("e-3", ".0e-3")
    quickstart: dict[str, Any] = yaml.safe_load(text)
    stages = {name: quickstart["stages"][name] for name in ("texts", "questions", "validation", "heldout", "base")}
    stages["scored"] = {"kind": "score", "data": "questions", "by": [SCORES[score] for score in scores]}
    for share in shares:
        for score in ("random", *scores):
            keep = {score: {"keep_fraction": share}}
            stages[stage_of((score, share))] = {"kind": "select", "data": "scored", "keep": keep}
    experiment = {
        "name": "prepare",
        "seed": quickstart["seed"],
        "stages": stages,
        "compute": {**quickstart["compute"], "device": device},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    run = events(tunery(experiment, folder, store))
    *_, questions = (e["artifact"] for e in run if e["event"] == "stage_finished" and e["stage"] == "questions")
    intact = [row["messages"] for row in read_rows(Path(questions)) if row["injected_corruption"] == ""]
    (folder / "intact.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in intact))
    stages["intact"] = {"kind": "dataset", "source": "intact.jsonl"}
    return experiment


def stage_of(arm: Arm) -> str:
    name, share = arm
    return {"all": "questions", "intact": "intact"}.get(name, f"{name}_{100 * share:.0f}")


def measure(
    experiment: dict[str, Any], arms: Sequence[Arm], seeds: list[int], epochs: list[float], folder: Path, store: Path
) -> Losses:
    """Arms of one share, which need as many epochs for as many steps: one grid search, its trials side by side."""
    share = arms[0][1]
    own_epochs = {e / share: e for e in epochs}
    arm_of = {stage_of(arm): arm for arm in arms}
    sft = {
        "kind": "sft",
        "data": "questions",
        "model": "base",
        "epochs": 1,
        "learning_rate": 0.003,
        "global_batch_size": 8,
    }
    space = {
        "sft.data": {"choice": list(arm_of)},
        "sft.epochs": {"choice": list(own_epochs)},
        "sft.seed": {"choice": seeds},
    }
    evaluation = {"kind": "evaluate", "models": ["sft"], "data": {"heldout": "heldout"}}
    whole = {
        **experiment,
        "name": f"share-{100 * share:.0f}-{arms[0][0]}",
        "stages": {**experiment["stages"], "sft": sft, "eval": evaluation},
        "search": {
            "metric": "eval.sft.heldout.loss",
            "mode": "min",
            "trials": len(arms) * len(epochs) * len(seeds),
            "algorithm": "grid",
            "space": space,
        },
    }
    return {
        (arm_of[o["sft.data"]], own_epochs[o["sft.epochs"]], o["sft.seed"]): event["value"]
        for event in events(tunery(whole, folder, store))
        if event["event"] == "trial_finished" and (o := event["overrides"])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    parser.add_argument("--epochs", nargs="+", type=float, default=[1], help="over all rows")
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES))
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--store", type=Path, help="kept, so that a second call goes on; default: a temporary one")
    arguments = parser.parse_args()
    seeds: list[int] = arguments.seeds
    scores: list[str] = arguments.scores
    fixed: list[list[Arm]] = [[("all", 1.0)], [("intact", INTACT)]]
    chosen: list[list[Arm]] = [[(name, share) for name in ("random", *scores)] for share in arguments.shares]
    losses: Losses = {}
    with tempfile.TemporaryDirectory() as temporary:
        store = arguments.store or Path(temporary) / "store"
        folder = store / "filtering_helps"
        folder.mkdir(parents=True, exist_ok=True)
        experiment = prepare(scores, arguments.shares, arguments.device, folder, store)
        for arms in [*fixed, *chosen]:
            losses |= measure(experiment, arms, seeds, arguments.epochs, folder, store)
    print(f"{'epochs':>6}  {'rows':22} {'held-out loss':>17}  {'less than all':>17}  {'less than random':>17}")
    for epochs in arguments.epochs:
        for arm in [arm for arms in [*fixed, *chosen] for arm in arms]:
            mine = [losses[arm, epochs, seed] for seed in seeds]
            told = [shown(mine)]
            for other in (("all", 1.0), ("random", arm[1])):
                known = (other, epochs, seeds[0]) in losses and other != arm
                less = [losses[other, epochs, seed] - losses[arm, epochs, seed] for seed in seeds] if known else []
                told.append(shown(less) if known else "")
            name = arm[0] if arm[0] == "all" else f"{arm[0]} {arm[1]:g}"
            print(f"{epochs:6g}  {name:22} {told[0]:>17}  {told[1]:>17}  {told[2]:>17}")


def shown(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
