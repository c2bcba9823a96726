"""Validation before a run: errors have the right line, and nothing is written. Resolving `auto` in `compute`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText
from tokenizers import Tokenizer, models

from tunery.errors import RequestError, SpecErrors, StoreError
from tunery.pipeline.compute import (
    Hardware,
    concurrent_trials,
    local_hardware,
    parse_hardware,
    resolve_compute,
    visible_gpus,
)
from tunery.pipeline.plan import make_plan
from tunery.pipeline.validate import validate
from tunery.spec import Compute
from tunery.store import Store
from tunery.workers.cluster_resources import NodeResources

VALID = """\
name: x
seed: 1
stages:
  texts: {kind: dataset, source: texts.jsonl}
  docs:
    kind: dataset
    source: pairs.jsonl
  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 2, learning_rate: 2e-3}
  other: {kind: pretrain, data: texts, model: {pretrained: ./model}, epochs: 2, learning_rate: 2e-3}
  scored: {kind: score, data: docs, by: [{perplexity: base}]}
  clean: {kind: select, data: scored, keep: {perplexity: {keep_fraction: 0.8}}}
  sft:
    kind: sft
    data: clean
    model: base
    epochs: 1
    learning_rate: 1e-5
    eval_data: docs
    global_batch_size: 8
search:
  metric: sft.eval_loss
  mode: min
  trials: 3
  space:
    sft.epochs: {choice: [1, 2]}
    sft.global_batch_size: {choice: [8, 16]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]")).save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    return tmp_path


def edited(*replacements: tuple[str, str]) -> str:
    text = VALID
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in the valid file"
        text = text.replace(old, new)
    return text


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return [
        (str(path.relative_to(folder)), path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    ]


def validate_text(
    load_text: LoadText, folder: Path, text: str = VALID, workers: int = 2, trial_workers: int = 1
) -> None:
    """Validate the experiment, and check that validation writes nothing."""
    experiment, source = load_text(text)
    before = listing(folder)
    try:
        validate(experiment, source, Store(folder / "store"), workers, trial_workers)
    finally:
        assert listing(folder) == before


def test_valid_experiment_passes_and_nothing_is_written(load_text: LoadText, folder: Path) -> None:
    validate_text(load_text, folder)


def shard(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model" / "model.safetensors").rename(folder / "model" / "one.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def no_change(folder: Path) -> None:
    pass


# Change of the files, edit of the experiment, workers, workers per trial, line of the error, message.
InvalidCase = tuple[Callable[[Path], Any], list[tuple[str, str]], tuple[int, int], int, list[str]]
INVALID: dict[str, InvalidCase] = {
    "missing file": (
        lambda folder: (folder / "pairs.jsonl").unlink(),
        [],
        (2, 1),
        7,
        ["docs: there is no file `pairs.jsonl`", "nothing matches", "paths are relative to the experiment's folder"],
    ),
    "empty dataset": (
        lambda folder: (folder / "pairs.jsonl").write_text("\n"),
        [],
        (2, 1),
        7,
        ["docs: `pairs.jsonl` has no valid row", "at least one valid row"],
    ),
    "columns that match no format": (
        lambda folder: (folder / "pairs.jsonl").write_text('{"q": "q", "a": "a"}\n'),
        [],
        (2, 1),
        7,
        [
            "the columns of `pairs.jsonl` match no row format",
            "columns: `q`, `a`",
            "columns: {prompt: q, completion: a}",
        ],
    ),
    "missing column": (
        no_change,
        [
            (
                "    source: pairs.jsonl\n",
                "    source: pairs.jsonl\n    columns: {prompt: question, completion: anser}\n",
            )
        ],
        (2, 1),
        8,
        ["there is no column `anser`", "columns: `question`, `answer`"],
    ),
    "subset of files": (
        no_change,
        [("    source: pairs.jsonl\n", "    source: pairs.jsonl\n    subset: questions\n")],
        (2, 1),
        8,
        ["`subset` applies to builtin sources only"],
    ),
    "missing model folder": (
        no_change,
        [("./model", "./modle")],
        (2, 1),
        9,
        ["other: there is no model folder", "modle", "hub name such as"],
    ),
    "model without config": (
        lambda folder: (folder / "model" / "config.json").unlink(),
        [],
        (2, 1),
        9,
        ["has no config.json", "it contains: model.safetensors, tokenizer.json", "save_pretrained"],
    ),
    "model without weights": (
        lambda folder: (folder / "model" / "model.safetensors").unlink(),
        [],
        (2, 1),
        9,
        ["has no weights: model.safetensors is missing", "it contains: config.json, tokenizer.json"],
    ),
    "model with one shard missing": (
        shard,
        [],
        (2, 1),
        9,
        ["has no weights: two.safetensors is missing", "one.safetensors"],
    ),
    "model without tokenizer": (
        lambda folder: [path.unlink() for path in (folder / "model").glob("tokenizer*")],
        [],
        (2, 1),
        9,
        ["has no tokenizer", "it contains: config.json, model.safetensors"],
    ),
    "global batch that can't be split": (
        no_change,
        [],
        (16, 1),
        19,
        ["sft: global_batch_size 8 can't be split over 16 workers", "a multiple of 16, or fewer workers"],
    ),
    "micro batch that does not divide": (
        no_change,
        [
            ("seed: 1", "seed: 1\ncompute: {micro_batch_size: 3}"),
            ("model: {scratch: tiny}", "model: {scratch: tiny}, global_batch_size: 6"),
            ("model: {pretrained: ./model}", "model: {pretrained: ./model}, global_batch_size: 6"),
        ],
        (2, 1),
        20,
        ["micro_batch_size 3 does not divide a worker's share of 4", "global_batch_size 8 over 2 workers"],
    ),
    "global batch of a trial": (
        no_change,
        [("{choice: [8, 16]}", "{choice: [8, 9]}")],
        (2, 2),
        26,
        ["a trial with {'sft.epochs': 1, 'sft.global_batch_size': 9}", "global_batch_size 9 can't be split over 2"],
    ),
    "global batch within a range of a trial": (
        no_change,
        [("{choice: [8, 16]}", "{int: [8, 16]}")],
        (2, 2),
        26,
        ["global_batch_size 9 can't be split over 2"],
    ),
    "workers of a trial for a batch that is not searched": (
        no_change,
        [
            (
                "    sft.epochs: {choice: [1, 2]}\n    sft.global",
                "    clean.keep.perplexity.keep_fraction: {choice: [0.5]}\n    #",
            ),
            ("model: {scratch: tiny}", "model: {scratch: tiny}, global_batch_size: 6"),
        ],
        (2, 3),
        19,
        ["a trial is not valid: sft: global_batch_size 8 can't be split over 3 workers"],
    ),
    "file that only a trial reads": (
        no_change,
        [("    sft.epochs: {choice: [1, 2]}", "    docs.source: {choice: [pairs.jsonl, paris.jsonl]}")],
        (2, 1),
        25,
        ["a trial with {'docs.source': 'paris.jsonl'}", "there is no file `paris.jsonl`"],
    ),
    "values that are not valid together": (
        no_change,
        [
            ("search:", "  eval: {kind: evaluate, models: [base, sft], data: {d: docs}}\nsearch:"),
            ("metric: sft.eval_loss", "metric: eval.sft.d.loss"),
            ("    sft.epochs: {choice: [1, 2]}", "    eval.models.0: {choice: [base, other]}"),
            ("    sft.global_batch_size: {choice: [8, 16]}", "    eval.models.1: {choice: [sft, other]}"),
        ],
        (2, 1),
        25,
        ["no trial can have {'eval.models.0': 'other', 'eval.models.1': 'other'} together", "other occurs twice"],
    ),
    "sft on texts": (
        no_change,
        [("    data: clean\n", "    data: texts\n")],
        (2, 1),
        14,
        ["`sft.data` needs conversations with answers, but `texts.jsonl` holds texts", "`kind: pretrain`"],
    ),
    "evaluation of sft on texts": (
        no_change,
        [("eval_data: docs", "eval_data: texts")],
        (2, 1),
        18,
        ["`sft.eval_data` needs conversations with answers, but `texts.jsonl` holds texts"],
    ),
    "sft on prompts, through score and select": (
        lambda folder: (folder / "prompts.jsonl").write_text('{"prompt": "q"}\n'),
        [
            ("data: docs, by:", "data: prompts, by:"),
            ("  scored:", "  prompts: {kind: dataset, source: prompts.jsonl}\n  scored:"),
        ],
        (2, 1),
        15,
        ["`sft.data` needs conversations with answers, but `prompts.jsonl` holds prompts"],
    ),
    "sft on a builtin subset of texts": (
        no_change,
        [
            ("source: texts.jsonl", "source: 'builtin:python-docs', subset: texts"),
            ("eval_data: docs", "eval_data: texts"),
        ],
        (2, 1),
        18,
        ["`sft.eval_data` needs conversations with answers, but subset `texts` holds texts"],
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_error_has_its_line_and_nothing_is_written(case: str, load_text: LoadText, folder: Path) -> None:
    change_files, replacements, (workers, trial_workers), line, words = INVALID[case]
    change_files(folder)
    with pytest.raises(SpecErrors) as caught:
        validate_text(load_text, folder, edited(*replacements), workers, trial_workers)
    (error,) = caught.value.errors
    assert str(error).startswith(f"{folder / 'exp.yaml'}:{line}: ")
    for word in words:
        assert word in str(error)


def test_complete_sharded_model_passes(load_text: LoadText, folder: Path) -> None:
    shard(folder)
    (folder / "model" / "two.safetensors").write_bytes(b"")
    validate_text(load_text, folder)


def test_hub_names_are_not_searched_on_disk(load_text: LoadText, folder: Path) -> None:
    validate_text(load_text, folder, edited(("./model", "org/name")))


def test_auto_batch_size_is_rejected_only_if_no_value_fits(load_text: LoadText, folder: Path) -> None:
    auto = edited(("    global_batch_size: 8\n", ""), ("    sft.global_batch_size: {choice: [8, 16]}\n", ""))
    for workers in (1, 2, 8, 64):
        validate_text(load_text, folder, auto, workers)
    with pytest.raises(SpecErrors) as caught:
        validate_text(load_text, folder, auto, workers=3)
    assert [error.line for error in caught.value.errors] == [8, 9, 12]


def test_all_errors_are_reported_together(load_text: LoadText, folder: Path) -> None:
    for name in ("pairs.jsonl", "texts.jsonl", "model/tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(SpecErrors) as caught:
        validate_text(load_text, folder)
    assert [error.line for error in caught.value.errors] == [4, 7, 9]


def test_trial_omits_stages_that_the_metric_does_not_need(load_text: LoadText, folder: Path) -> None:
    unused_stage = (
        "  unused: {kind: sft, data: docs, model: base, epochs: 1, learning_rate: 1, global_batch_size: 9}\nsearch:\n"
    )
    text = edited(("search:\n", unused_stage))
    validate_text(load_text, folder, text, workers=1, trial_workers=2)


def test_unwritable_store_is_rejected_by_name(load_text: LoadText, folder: Path) -> None:
    experiment, source = load_text(VALID)
    before = listing(folder)
    with pytest.raises(StoreError) as caught:
        validate(experiment, source, Store(folder / "texts.jsonl" / "store"), 1, 1)
    assert str(folder / "texts.jsonl") in str(caught.value)
    assert "--store" in caught.value.remedy
    assert listing(folder) == before


# Compute.


def hardware(cpus: int, gpus: int = 0) -> Hardware:
    return Hardware([NodeResources(cpus, gpus)], "this machine")


def cluster(*cpus: int) -> Hardware:
    return Hardware([NodeResources(count) for count in cpus], "the cluster")


@pytest.mark.parametrize(
    ("fields", "machine", "device", "workers", "per_trial"),
    [
        ({}, hardware(16), "cpu", 2, 1),
        ({}, hardware(1), "cpu", 1, 1),
        ({}, hardware(16, 4), "gpu", 4, 1),
        ({"device": "cpu"}, hardware(16, 4), "cpu", 2, 1),
        ({"cpus_per_worker": 8}, hardware(8), "cpu", 1, 1),
        ({"workers": 5}, hardware(8), "cpu", 5, 1),
        ({"workers_per_trial": 2}, hardware(16, 4), "gpu", 4, 2),
    ],
)
def test_auto_resolves_to_the_available_hardware(
    fields: dict[str, Any], machine: Hardware, device: str, workers: int, per_trial: int
) -> None:
    resolved, rules = resolve_compute(Compute(**fields), machine)
    assert (resolved.device, resolved.workers, resolved.workers_per_trial) == (device, workers, per_trial)
    assert rules.keys() == {"device", "workers", "workers_per_trial"} - fields.keys()
    assert all(rules.values())
    assert resolve_compute(resolved, machine) == (resolved, {})


@pytest.mark.parametrize(
    ("fields", "machine", "words"),
    [
        ({"workers": 4}, hardware(2), ["needs 4 workers with 1 CPU each; this machine has 2 CPUs", "{workers: 2}"]),
        ({"workers": 8}, hardware(64, 4), ["needs 8 workers with 1 CPU and a GPU each", "{workers: 4}"]),
        ({"workers": 2, "cpus_per_worker": 3}, hardware(4), ["2 workers with 3 CPUs each", "{workers: 1}"]),
        ({"workers_per_trial": 3}, hardware(2), ["needs 3 workers", "{workers_per_trial: 2}"]),
        ({"device": "gpu", "workers": 1}, hardware(8), ["has 8 CPUs and 0 GPUs", "device: cpu", "RAY_ADDRESS"]),
        ({"device": "gpu"}, hardware(8), ["needs 1 worker with 1 CPU and a GPU", "device: cpu"]),
        ({"cpus_per_worker": 9}, hardware(8), ["1 worker with 9 CPUs", "{cpus_per_worker: 8}"]),
        ({"device": "gpu", "cpus_per_worker": 9}, hardware(8, 4), ["8 CPUs and 4 GPUs", "{cpus_per_worker: 8}"]),
        ({"workers": 3, "cpus_per_worker": 2}, cluster(3, 3), ["has 2 nodes with 3 CPUs each", "{workers: 2}"]),
        (
            {"cpus_per_worker": 5},
            cluster(4, 2, 4),
            ["2 nodes with 4 CPUs each + 1 node with 2", "{cpus_per_worker: 4}"],
        ),
    ],
)
def test_excessive_workers_are_rejected_with_a_number_that_fits(
    fields: dict[str, Any], machine: Hardware, words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_compute(Compute(**fields), machine)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "machine", "trials"),
    [
        ({}, hardware(8), 8),
        ({"cpus_per_worker": 3}, hardware(8), 2),
        ({"workers_per_trial": 2, "cpus_per_worker": 2}, hardware(8), 2),
        ({}, hardware(64, 8), 8),
        ({"workers_per_trial": 3}, hardware(64, 8), 2),
        ({"cpus_per_worker": 2}, cluster(3, 3, 1), 2),
    ],
)
def test_concurrent_trials_fit_the_machine(fields: dict[str, Any], machine: Hardware, trials: int) -> None:
    resolved, _ = resolve_compute(Compute(**fields), machine)
    count, reason = concurrent_trials(resolved, machine)
    assert count == trials
    assert "per trial" in reason


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, 4), ("", 0), ("0", 1), ("0,2", 2), ("-1", 0), ("1,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_gpus_hidden_by_cuda_visible_devices_are_not_counted(visible: str | None, gpus: int) -> None:
    assert visible_gpus(4, visible) == gpus


def test_local_cpus_are_those_available_to_the_process() -> None:
    assert local_hardware().cpus == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x8xH100-80GB", (512, 32, 80.0)),
        ("8xA100-40GB", (128, 8, 40.0)),
        ("1xL4-24GB", (16, 1, 24.0)),
        ("4x16cpu", (64, 0, None)),
        ("2cpu", (2, 0, None)),
    ],
)
def test_described_hardware(text: str, expected: tuple[int, int, float | None]) -> None:
    hardware = parse_hardware(text)
    assert (hardware.cpus, hardware.gpus, hardware.gpu_gb) == expected
    assert hardware.host == text


@pytest.mark.parametrize("text", ["", "H100", "8xH100", "0x8xH100-80GB", "4 x 8", "8gpu"])
def test_other_descriptions_of_hardware_are_rejected_with_examples(text: str) -> None:
    with pytest.raises(RequestError, match="does not describe hardware") as rejected:
        parse_hardware(text)
    assert "4x8xH100-80GB" in rejected.value.remedy


def test_plan_for_other_hardware_resolves_auto_and_notes_what_does_not_fit(load_text: LoadText, folder: Path) -> None:
    experiment, source = load_text(
        "name: x\nseed: 1\nstages:\n  docs: {kind: dataset, source: texts.jsonl}\n  base: {kind: pretrain, data: docs, "
        "model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3, global_batch_size: 8}\n"
    )
    planned = make_plan(experiment, source, Store(folder / "store"), hardware=parse_hardware("2x1xTiny-0GB"))
    assert planned.compute["device"] == "gpu"
    assert planned.rules["device"] == "2x1xTiny-0GB has 2 GPUs"
    assert [note for note in planned.notes if "per GPU for weights" in note]
    large = make_plan(experiment, source, Store(folder / "store"), hardware=parse_hardware("2x1xH100-80GB"))
    assert not [note for note in large.notes if "per GPU for weights" in note]
