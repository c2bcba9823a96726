"""How fast is scoring, beside what else one would run? Perplexity of the same texts under the same model, on CPU.

    python benchmarks/scoring_speed.py [--rows 3000] [--data-juicer PYTHON] [--repeat 3]

    loop         a plain Hugging Face loop: batches of 8 in the order of the rows, padded, logits of the whole batch
    data-juicer  llm_perplexity_filter of py-data-juicer, two processes of one thread; PYTHON is the interpreter of an
                 environment of its own (pip install py-data-juicer transformers accelerate torch)
    tunery       `tunery run` with a score stage, two actors of one thread

Each is a process of its own, on two cores; the model is the quickstart's (1 M parameters, pre-trained for a moment).
Two times are told: of scoring alone, with the model loaded, and of the whole command. Prints medians, ratios to
tunery's, and the largest relative difference of a row's perplexity from the loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from tunery.store.rows import read_rows, shards

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 512
LOOP = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
texts, model, out, longest = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
begin, scores = time.time(), []
for start in range(0, len(texts), 8):
    batch = tokenizer(texts[start : start + 8], padding=True, truncation=True, max_length=longest,
                      add_special_tokens=False, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    scores += (loss.sum(1) / (labels[:, 1:] != -100).sum(1)).exp().tolist()
json.dump({"seconds": time.time() - begin, "scores": scores}, open(out, "w"))
"""
DATA_JUICER = """
import json, sys, time
from data_juicer.core.data import NestedDataset
from data_juicer.ops.filter.llm_perplexity_filter import LLMPerplexityFilter
texts, model, out, longest = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3], int(sys.argv[4])
op = LLMPerplexityFilter(hf_model=model, max_score=1e30)
rows = NestedDataset.from_list([{"text": text, "__dj__stats__": {}} for text in texts])
begin = time.time()
rows = rows.map(op.compute_stats, num_proc=2, load_from_cache_file=False)
json.dump({"seconds": time.time() - begin, "scores": [row["llm_perplexity"] for row in rows["__dj__stats__"]]},
          open(out, "w"))
"""


def tunery(experiment: dict[str, Any], folder: Path, store: Path) -> dict[str, Path]:
    """Runs it; the artifacts by stage."""
    file = folder / f"{experiment['name']}.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "tunery", "run", str(file), "--store", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    log = store / "runs" / experiment["name"] / "events/driver.jsonl"
    events = map(json.loads, log.read_text().splitlines())
    return {event["stage"]: Path(event["artifact"]) for event in events if event["event"] == "stage_finished"}


def stages(rows: int) -> dict[str, Any]:
    # A file's texts, stripped: Data-Juicer strips what it scores.
    return {
        "texts": {"kind": "dataset", "source": "builtin:python-docs", "subset": "texts", "limit": rows},
        "base": {
            "kind": "pretrain",
            "data": "texts",
            "model": {"scratch": "tiny"},
            "epochs": 0.3,
            "learning_rate": 0.002,
            "global_batch_size": 4,
            "max_length": 256,
        },
        "stripped": {"kind": "dataset", "source": "texts.jsonl"},
        "scored": {"kind": "score", "data": "stripped", "by": [{"perplexity": "base"}], "max_length": MAX_LENGTH},
    }


def prepare(rows: int, folder: Path, store: Path) -> tuple[Path, dict[str, Any]]:
    """The model's folder, and the experiment whose last stage is to be timed."""
    experiment = {"name": "prepare", "seed": 17, "compute": {"workers": 2}, "tracking": {"wandb": {"mode": "disabled"}}}
    (folder / "texts.jsonl").write_text('{"text": "nothing yet"}\n')
    first = {name: stage for name, stage in stages(rows).items() if name in ("texts", "base")}
    made = tunery({**experiment, "stages": first}, folder, store)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made["base"] / "model")
    longest = MAX_LENGTH - 2
    with (folder / "texts.jsonl").open("w") as file:
        for row in read_rows(made["texts"]):
            ids = tokenizer(row["text"].strip(), add_special_tokens=False)["input_ids"][:longest]
            text = tokenizer.decode(ids).strip()
            if len(ids) > 1 and text:
                file.write(json.dumps({"text": text}) + "\n")
    return made["base"] / "model", {**experiment, "name": "score", "stages": stages(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--data-juicer", metavar="PYTHON")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, store = Path(temporary), Path(temporary) / "store"
        model, experiment = prepare(arguments.rows, folder, store)
        end = json.loads((model / "tokenizer_config.json").read_text())["eos_token"]
        texts = [json.loads(line)["text"] + end for line in (folder / "texts.jsonl").read_text().splitlines()]
        (folder / "texts.json").write_text(json.dumps(texts))
        told: dict[str, list[tuple[float, float, list[float]]]] = {}
        for _ in range(arguments.repeat):
            told.setdefault("loop", []).append(peer(sys.executable, LOOP, folder, model, {}))
            if arguments.data_juicer:
                one_thread = {"OMP_NUM_THREADS": "1"}
                told.setdefault("data-juicer", []).append(
                    peer(arguments.data_juicer, DATA_JUICER, folder, model, one_thread)
                )
            told.setdefault("tunery", []).append(ours(experiment, folder, store))
    report(len(texts), told)


def peer(
    python: str, code: str, folder: Path, model: Path, environment: dict[str, str]
) -> tuple[float, float, list[float]]:
    """Seconds of scoring, seconds of the process, perplexities."""
    begin = time.time()
    command = [python, "-c", code, str(folder / "texts.json"), str(model), str(folder / "out.json"), str(MAX_LENGTH)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads((folder / "out.json").read_text())
    return found["seconds"], time.time() - begin, found["scores"]


def ours(experiment: dict[str, Any], folder: Path, store: Path) -> tuple[float, float, list[float]]:
    for made in [*store.glob("artifacts/score-*"), store / "scores"]:
        shutil.rmtree(made, ignore_errors=True)
    begin = time.time()
    scored = tunery(experiment, folder, store)["scored"]
    seconds = time.time() - begin
    scores = [
        score
        for path in shards(scored)
        for score in pq.read_table(scored / "scores" / path.name, columns=["perplexity"])[0].to_pylist()
    ]
    return json.loads((scored / "runtime_stats.json").read_text())["worker_seconds"] / 2, seconds, scores


def report(rows: int, told: dict[str, list[tuple[float, float, list[float]]]]) -> None:
    medians = {
        name: (statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs))
        for name, runs in told.items()
    }
    reference = told["loop"][0][2]
    print(f"{rows:,} texts, medians of {len(told['loop'])}")
    print(f"{'':12} {'scoring':>9} {'ratio':>6} {'command':>9} {'ratio':>6} {'rows/s':>8} {'largest difference':>19}")
    for name, (scoring, command) in medians.items():
        apart = max(abs(a - b) / b for a, b in zip(told[name][0][2], reference, strict=True))
        over = scoring / medians["tunery"][0], command / medians["tunery"][1]
        print(
            f"{name:12} {scoring:7.1f} s {over[0]:6.2f} {command:7.1f} s {over[1]:6.2f}"
            f" {rows / scoring:8.0f} {apart:19.1e}"
        )


if __name__ == "__main__":
    main()
