"""Fingerprints: they change with everything that changes the result of a stage or of its inputs, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.pipeline import cache_keys as identity_module
from tunery.pipeline.cache_keys import IGNORED_FIELDS, cache_keys, difference, fingerprints, identity, stage_seed
from tunery.spec import ADAPTERS, STAGE_KINDS, Compute, Evaluate, Experiment, Training, WinRate
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.scorers import SCORERS
from tunery.store.fingerprint import HEX_DIGITS, file_digest, fingerprint, folder_digest

STAGES_OF_FILE: dict[str, dict[str, Any]] = {
    "docs": {"kind": "dataset", "source": "a.jsonl"},
    "more": {"kind": "dataset", "source": "b.jsonl", "corrupt_fraction": 0.2},
    "base": {"kind": "pretrain", "data": "docs", "model": {"scratch": "tiny"}, "epochs": 2, "learning_rate": 1e-3},
    "other": {"kind": "pretrain", "data": "docs", "model": {"pretrained": "./model"}, "epochs": 1, "learning_rate": 1},
    "scored": {"kind": "score", "data": "docs", "by": [{"perplexity": "base"}]},
    "again": {
        "kind": "score",
        "data": "more",
        "by": [{"perplexity": "base"}, {"reward": {"pretrained": "./model"}}],
    },
    "clean": {
        "kind": "select",
        "data": "scored",
        "keep": {"perplexity": {"keep_fraction": 0.8}, "random": {"top_k": 9}},
    },
    "strict": {"kind": "select", "data": "scored", "keep": {"perplexity": {"keep_fraction": 0.4}}},
    "checked": {"kind": "review", "data": "clean", "decisions": "checked.jsonl"},
    "prompts": {"kind": "augment", "data": "clean", "templates": ["Q {question}", "{question}"], "heldout": ["more"]},
    "sft": {"kind": "sft", "data": "clean", "model": "base", "epochs": 1, "learning_rate": 1e-4, "seed": 3},
    "judge": {
        "kind": "classifier",
        "data": "docs",
        "model": "base",
        "epochs": 1,
        "learning_rate": 1e-4,
        "eval_data": {"good": "docs", "bad": "more"},
        "seed": 3,
    },
    **{
        name: {"kind": name, "data": "docs", "model": "base", "epochs": 1, "learning_rate": 1e-4, "seed": 3, **fields}
        for name, fields in {
            "dpo": {},
            "kto": {},
            "grpo": {"reward": {"python": "reward.py"}, "group_size": 4},
            "rloo": {"reward": {"pretrained": "./model"}, "group_size": 4},
            "ppo": {"reward": {"python": "reward.py"}, "global_batch_size": 4, "ptx": {"data": "docs"}},
        }.items()
    },
    "rm": {"kind": "reward", "data": "docs", "model": "base", "epochs": 1, "learning_rate": 1e-4, "seed": 3},
    "eval": {"kind": "evaluate", "models": ["base", "sft"], "data": {"one": "docs", "two": "more"}},
    "wins": {"kind": "win_rate", "models": ["base"], "baseline": "other", "judge": "judge", "data": "clean"},
}

MIXTURES = ("base", "sft", "dpo", "kto")
LABELLED = [{"good": "more", "bad": "docs"}, {"good": "more", "bad": "scored"}, {"review": "checked"}]

# By stage kind: fields and other valid values, each of which must give a distinct fingerprint.
OTHER_VALUES: dict[tuple[str, str], list[Any]] = {
    ("docs", "source"): ["b.jsonl", "*.jsonl", "builtin:python-docs", ["b.jsonl", "a.jsonl"], ["a.jsonl", "b.jsonl"]],
    ("docs", "format"): ["json", "text"],
    ("docs", "sample_by"): ["line", "paragraph", "document"],
    ("docs", "sheet"): ["a", "b"],
    ("docs", "config"): ["main"],
    ("docs", "hub_split"): ["train"],
    ("docs", "revision"): ["v1"],
    ("docs", "subset"): ["texts", "questions", "preferences", "prompts"],
    ("docs", "split"): ["train", "validation", "test"],
    ("docs", "eval_fraction"): [0.2, 0.3],
    ("docs", "limit"): [10, 20],
    ("docs", "corrupt_fraction"): [0.1, 1.0],
    ("docs", "columns"): [{"text": "a"}, {"text": "b"}, {"prompt": "a"}],
    ("docs", "roles"): [{"bob": "user"}, {"bob": "assistant"}],
    ("docs", "message_keys"): [{"role": "speaker"}, {"content": "speaker"}],
    ("scored", "data"): ["more"],
    ("scored", "by"): [
        [{"perplexity": "other"}],
        [{"perplexity": {"pretrained": "./model"}}],
        [{"perplexity": "base", "of": "all"}],
        [{"perplexity": "base", "name": "ppl"}],
        [{"perplexity": "base"}, {"ifd": "base"}],
        [{"embedding": "base", "reference": "more"}],
        [{"embedding": "base", "reference": "docs"}],
        [{"embedding": {"pretrained": "./model"}, "reference": "docs"}],
        [{"embedding": {"pretrained": "./model"}}],
        [{"embedding": "base"}],
        [{"reward": {"pretrained": "./model"}}],
        [{"reward": {"pretrained": "org/name"}}],
        [{"reward": {"pretrained": "org/name", "revision": "abc"}}],
        [{"classifier": {"pretrained": "./model"}, "label": "good"}],
        [{"classifier": {"pretrained": "./model"}, "label": 1}],
        [{"classifier": {"pretrained": "./model"}, "label": 1, "temperature": 2.0}],
        [{"classifier": "judge", "label": "good"}],
        [{"classifier": "judge", "label": "good", "temperature": "auto"}],
    ],
    ("scored", "max_length"): [64],
    ("clean", "data"): ["again"],
    ("clean", "keep"): [
        {score: rule}
        for score in ("perplexity", "random")
        for rule in (
            {"keep_fraction": 0.5},
            {"threshold": 0.8},
            {"top_k": 9},
            {"keep_fraction_of_rest": 0.5},
            {"match_count_of": "docs"},
            {"range": [0.8, None]},
        )
    ],
    ("clean", "combine"): ["any"],
    ("clean", "quota"): [
        {"group_by": "source", "rows": 5},
        {"group_by": "group", "rows": 5},
        {"group_by": "group", "rows": 5, "sort_by": "random"},
    ],
    ("clean", "diverse"): [
        {"embedding": "embedding", "method": "k_center", "rows": 5},
        {"embedding": "other", "method": "k_center", "rows": 5},
        {"embedding": "embedding", "method": "k_center", "keep_fraction": 0.5},
        {"embedding": "embedding", "method": "score_first", "score": "random", "rows": 5},
        {"embedding": "embedding", "method": "score_first", "score": "random", "rows": 5, "prefer": "high"},
        {"embedding": "embedding", "method": "score_first", "score": "random", "rows": 5, "max_similarity": 0.5},
    ],
    ("clean", "seed"): [4, 5],
    ("checked", "data"): ["strict"],
    ("checked", "decisions"): ["other.jsonl", "checked.xlsx"],
    ("checked", "rows"): [1, 50],
    ("prompts", "data"): ["again"],
    ("prompts", "templates"): [["{question}?"], ["{question}?", "{question}"]],
    ("prompts", "few_shot"): [
        {"shots": 1, **values}
        for values in (
            {},
            {"shots": [0, 1]},
            {"examples": "docs"},
            {"examples": "strict"},
            {"layout": "prompt"},
            {"example": "{question}: {answer}"},
            {"max_chars": 100},
        )
    ],
    ("prompts", "chain_of_thought"): [
        {"separator": "#", **values} for values in ({}, {"separator": "##"}, {"cue": "Think."}, {"direct": 0.5})
    ],
    ("prompts", "copies"): [2],
    ("prompts", "originals"): [True],
    ("prompts", "heldout"): [[], ["strict"], ["strict", "more"]],
    ("prompts", "seed"): [4, 5],
    ("base", "model"): [
        {"scratch": "small"},
        {"pretrained": "./model"},
        {"pretrained": "org/name"},
        {"pretrained": "org/name", "revision": "abc"},
    ],
    ("sft", "model"): ["other", {"pretrained": "./model"}],
    ("sft", "tuner"): [
        {"lora": values}
        for values in ({}, {"rank": 4}, {"alpha": 4.0}, {"dropout": 0.1}, {"target_modules": ["q_proj"]})
    ],
    ("judge", "model"): ["other", {"pretrained": "./model"}],
    ("judge", "tuner"): [{"lora": {}}, {"lora": {"rank": 4}}],
    ("judge", "balanced"): [False],
    **{
        (name, field): values
        for name in ("dpo", "kto", "grpo", "rloo", "ppo")
        for field, values in {
            "model": ["other", {"pretrained": "./model"}],
            "tuner": [{"lora": {}}, {"lora": {"rank": 4}}],
            **({"beta": [0.5]} if name != "ppo" else {}),
        }.items()
    },
    ("sft", "train_on"): ["last_turn"],
    ("sft", "truncate"): ["left", "drop", "split"],
    **{
        (name, field): values
        for name in ("sft", "dpo", "kto")
        for field, values in {
            "empty_thinking": ["train"],
            **({"truncate": ["right", "drop"]} if name != "sft" else {}),
        }.items()
    },
    ("dpo", "loss"): ["hinge", "ipo"],
    ("dpo", "label_smoothing"): [0.1],
    ("dpo", "reference_free"): [True],
    ("kto", "desirable_weight"): [2.0],
    ("kto", "undesirable_weight"): [2.0],
    **{
        (name, field): values
        for name in ("grpo", "rloo", "ppo")
        for field, values in {
            "reward": [{"python": "reward.py", "function": "other"}, {"pretrained": "org/name"}],
            "sampling": [{"temperature": 0.7}, {"top_p": 0.9}, {"min_new_tokens": 2}, {"max_new_tokens": 16}],
            "clip": [0.1],
            **({"group_size": [2], "iterations": [2]} if name != "ppo" else {}),
        }.items()
    },
    **{
        ("ppo", field): values
        for field, values in {
            "value_init": ["reward", "policy"],
            "allow_retokenize": [True],
            "minibatches": [2],
            "ppo_epochs": [1],
            "gamma": [0.9],
            "gae_lambda": [0.5],
            "value_clip": [None, 0.1],
            "value_coefficient": [0.5],
            "entropy_coefficient": [0.5],
            "whiten_rewards": [True],
            "whiten_advantages": [False],
            "missing_eos_penalty": [0.5],
            "kl": [{"estimator": "k3"}, {"coefficient": 0.5}, {"target": 1.0}, {"horizon": 1.0}, {"max_kl": 1.0}],
            "ptx": [None, {"data": "more"}, {"data": "docs", "coefficient": 0.5}],
        }.items()
    },
    ("grpo", "loss"): ["grpo", "dr_grpo"],
    ("grpo", "scale"): ["batch", "none"],
    ("rm", "model"): ["other", {"pretrained": "./model"}],
    ("rm", "tuner"): [{"lora": {}}, {"lora": {"rank": 4}}],
    ("rm", "center"): [0.01, 0.1],
    ("eval", "models"): [["sft", "base"], ["base"], ["base", "other"]],
    ("eval", "data"): [{"one": "docs"}, {"one": "more", "two": "docs"}, {"one": "docs", "three": "more"}],
    ("eval", "baseline"): ["base", "sft"],
    ("eval", "max_length"): [64],
    ("wins", "models"): [["sft"], ["base", "sft"], ["sft", "base"], [{"pretrained": "./model"}]],
    ("wins", "baseline"): ["sft", {"pretrained": "./model"}, {"pretrained": "org/name"}],
    ("wins", "judge"): [
        {"pretrained": "./model"},
        {"pretrained": "org/name"},
        {"python": "reward.py"},
        {"python": "reward.py", "function": "other"},
        {"python": "other.py"},
    ],
    ("wins", "data"): ["more", "strict"],
    ("wins", "sampling"): [
        {field: value}
        for field, value in {"temperature": 0.5, "top_p": 0.9, "min_new_tokens": 1, "max_new_tokens": 64}.items()
    ],
    ("wins", "max_length"): [256],
    ("wins", "seed"): [4, 5],
    **{
        (name, field): values
        for name in ("base", "sft", "judge", "rm", "dpo", "kto", "grpo", "rloo", "ppo")
        for field, values in {
            "data": [
                "more",
                *(LABELLED if name == "judge" else []),
                *([{"docs": 1.0, "more": 2.0}, {"docs": 1.0, "more": 3.0}] if name in MIXTURES else []),
            ],
            "epochs": [3, 0.5, "auto"],
            "learning_rate": [0.5, "auto"],
            "global_batch_size": [8, 16],
            "max_length": [256],
            "schedule": ["linear", "constant"],
            "warmup": [0.0],
            "weight_decay": [0.1],
            "max_grad_norm": [0.5],
            "schedule_overrides": [[{"after": 0.5, "learning_rate": 1e-5}], [{"after": 0.5, "weight_decay": 0.1}]],
            "eval_data": ["more", *LABELLED] if name == "judge" else ["more"],
            "num_evals": [2],
            "seed": [4, 5],
        }.items()
    },
}
ONE_OF_EACH_KIND = ("docs", "base", "scored", "clean", "checked", "prompts", "sft", "judge", "eval", "wins")
ONE_OF_EACH_KIND += ("rm", "dpo", "kto", "grpo", "rloo", "ppo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "checked.jsonl").write_text('{"id": "a", "decision": "keep"}\n')
    for name in ("reward.py", "other.py"):
        (tmp_path / name).write_text("def reward(prompts, responses): ...\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def experiment_of(stages: dict[str, dict[str, Any]], **values: Any) -> Experiment:
    return Experiment.model_validate_json(json.dumps({"name": "x", "seed": 17, "stages": stages} | values))


EXPERIMENT = experiment_of(STAGES_OF_FILE)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def with_downstream(experiment: Experiment, *names: str) -> set[str]:
    """Return `names` and all stages downstream of them."""
    return {user for user in experiment.stages if with_upstream(experiment.stages, [user]).keys() & set(names)}


def test_cases_cover_every_field_of_every_stage_kind() -> None:
    assert {EXPERIMENT.stages[name].kind for name in ONE_OF_EACH_KIND} == STAGE_KINDS.keys()
    fields = {
        (name, field)
        for name in ONE_OF_EACH_KIND
        for field in type(EXPERIMENT.stages[name]).model_fields
        if field not in ("kind", *IGNORED_FIELDS)
    }
    assert fields == OTHER_VALUES.keys()


@pytest.mark.parametrize(("stage", "field"), OTHER_VALUES)
def test_changed_field_changes_the_fingerprints_of_its_stage_and_downstream_stages_only(
    stage: str, field: str, folder: Path
) -> None:
    before = fingerprints(EXPERIMENT, folder)
    distinct = {before[stage]}
    for value in OTHER_VALUES[stage, field]:
        trial = with_overrides(EXPERIMENT, {f"{stage}.{field}": value})
        after = fingerprints(trial, folder)
        assert changed(before, after) == with_downstream(trial, stage)
        assert after[stage] not in distinct, "two values have the same fingerprint"
        distinct.add(after[stage])


def test_fields_added_later_do_not_change_fingerprints_if_unset(folder: Path) -> None:
    clean = EXPERIMENT.stages["clean"]
    assert identity(clean, EXPERIMENT, folder) == {
        "version": STAGE_KINDS["select"].version,
        "seed": 17,
        "data": None,
        "combine": "all",
        "quota": None,
        "keep": {
            score: dict.fromkeys(("top_k", "match_count_of", "threshold", "range", "prefer"))
            | {"keep_fraction": None}
            | rule
            for score, rule in (("perplexity", {"keep_fraction": 0.8}), ("random", {"top_k": 9}))
        },
    }


def test_fingerprint_depends_on_the_stage_kind(folder: Path) -> None:
    # Same fields, another trainer.
    sft = {"kind": "sft", "data": "docs", "model": "base", "epochs": 1, "learning_rate": 1e-4}
    stages = {name: STAGES_OF_FILE[name] for name in ("docs", "base")}
    actual = fingerprints(experiment_of(stages | {"a": sft, "b": {**sft, "kind": "pretrain"}}), folder)
    assert actual["a"] != actual["b"]


COMPUTE: dict[str, list[Any]] = {
    "workers": [2, 4],
    "workers_per_trial": [2],
    "device": ["cpu", "gpu"],
    "cpus_per_worker": [2],
    "zero_stage": [0, 1, 3],
    "offload": ["optimizer", "all"],
    "micro_batch_size": [1, 8],
    "precision": ["fp32", "bf16"],
    "gradient_checkpointing": [True],
    "save_steps": [5],
    "max_failures": [3],
    "object_store_gb": [2.0],
    "max_packed_trials": [1, 4],
}


def test_compute_settings_do_not_change_fingerprints(folder: Path) -> None:
    assert COMPUTE.keys() == Compute.model_fields.keys()
    before = fingerprints(EXPERIMENT, folder)
    for field, values in COMPUTE.items():
        for value in values:
            other = experiment_of(STAGES_OF_FILE, compute={field: value})
            assert getattr(other.compute, field) != getattr(EXPERIMENT.compute, field)
            assert fingerprints(other, folder) == before, field


@pytest.mark.parametrize(
    "values",
    [
        {"name": "y"},
        {"tracking": {"wandb": {"project": "p", "mode": "disabled"}}},
        {"search": {"metric": "m", "mode": "min", "trials": 2, "space": {"sft.epochs": {"choice": [1]}}}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_name_tracking_and_search_do_not_change_fingerprints(values: dict[str, Any], folder: Path) -> None:
    assert fingerprints(experiment_of(STAGES_OF_FILE, **values), folder) == fingerprints(EXPERIMENT, folder)


def renamed(old: str, new: str) -> Experiment:
    """Return the experiment with a stage renamed, also in the stages that refer to it."""
    data = EXPERIMENT.model_dump(mode="json")
    for name, stage in EXPERIMENT.stages.items():
        for item in stage.inputs():
            if item.stage == old:
                *parents, last = item.path
                parent = data["stages"][name]
                for key in parents:
                    parent = parent[key]
                parent[last] = new
    data["stages"] = {new if name == old else name: stage for name, stage in data["stages"].items()}
    return Experiment.model_validate_json(json.dumps(data))


@pytest.mark.parametrize("old", STAGES_OF_FILE)
def test_renaming_a_stage_changes_only_evaluations_that_list_its_name(old: str, folder: Path) -> None:
    other = renamed(old, "renamed")
    after = fingerprints(other, folder)
    after[old] = after.pop("renamed")
    expected = {
        name
        for name, stage in EXPERIMENT.stages.items()
        if (isinstance(stage, Evaluate) and old in stage.models)
        or (isinstance(stage, WinRate) and old in (*stage.evaluated_models, stage.data))
    }
    assert changed(fingerprints(EXPERIMENT, folder), after) == expected


@pytest.mark.parametrize("names", [sorted(STAGES_OF_FILE), list(reversed(STAGES_OF_FILE))], ids=["sorted", "reversed"])
def test_stage_order_does_not_change_fingerprints(names: list[str], folder: Path) -> None:
    reordered = experiment_of({name: STAGES_OF_FILE[name] for name in names})
    assert fingerprints(reordered, folder) == fingerprints(EXPERIMENT, folder)


def test_same_experiment_in_another_folder_has_the_same_fingerprints(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("a.jsonl", "b.jsonl", "checked.jsonl", "reward.py"):
        shutil.copy(folder / name, elsewhere)
    shutil.copytree(folder / "model", elsewhere / "model")
    assert fingerprints(EXPERIMENT, elsewhere) == fingerprints(EXPERIMENT, folder)


@pytest.mark.parametrize(
    ("file", "readers"),
    [
        ("a.jsonl", ["docs"]),
        ("b.jsonl", ["more"]),
        ("reward.py", ["grpo", "ppo"]),
        ("model/model.safetensors", ["other", "again", "rloo"]),
    ],
)
def test_file_content_changes_the_fingerprints_of_stages_that_read_it(
    file: str, readers: list[str], folder: Path
) -> None:
    before = fingerprints(EXPERIMENT, folder)
    text = (folder / file).read_bytes()
    (folder / file).write_bytes(text.swapcase())
    assert changed(before, fingerprints(EXPERIMENT, folder)) == with_downstream(EXPERIMENT, *readers)
    (folder / file).write_bytes(text)
    assert fingerprints(EXPERIMENT, folder) == before


def test_review_fingerprint_depends_on_decisions_but_not_on_their_file_format(folder: Path) -> None:
    def with_lines(*lines: str) -> dict[str, str]:
        (folder / "checked.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return fingerprints(EXPERIMENT, folder)

    keep, drop = '{"id": "a", "decision": "keep", "t": 1}', '{"id": "a", "decision": "drop"}'
    other, none = '{"id": "b", "decision": "keep"}', '{"id": "b", "decision": null, "undo": true}'
    before = with_lines(keep)
    assert changed(before, with_lines(drop)) == with_downstream(EXPERIMENT, "checked")
    assert changed(before, with_lines(keep, other)) == {"checked"}
    assert with_lines(drop, other, none, keep) == before, "the last decision on each row is the same"
    (folder / "checked.jsonl").unlink()
    assert fingerprints(EXPERIMENT, folder) == with_lines(), "no file, no decisions"


def test_new_file_that_matches_a_glob_changes_the_dataset(folder: Path) -> None:
    pattern = experiment_of({"docs": {"kind": "dataset", "source": "*.jsonl"}})
    before = fingerprints(pattern, folder)
    (folder / "c.jsonl").write_text('{"text": "three"}\n')
    assert changed(before, fingerprints(pattern, folder)) == {"docs"}


def test_experiment_seed_changes_only_random_stages(folder: Path) -> None:
    other = experiment_of(STAGES_OF_FILE, seed=18)
    # Injected corruption, trainings without their own seed, `random`, review samples, prompts.
    random_stages = {"more", "base", "other", "clean", "checked", "prompts", "wins"}
    assert changed(fingerprints(EXPERIMENT, folder), fingerprints(other, folder)) == with_downstream(
        EXPERIMENT, *random_stages
    )
    for name in ("docs", "scored", "eval"):
        assert "seed" not in identity(EXPERIMENT.stages[name], EXPERIMENT, folder)


def test_seed_of_a_training_overrides_the_experiment_seed(folder: Path) -> None:
    assert [stage_seed(EXPERIMENT.stages[name], EXPERIMENT) for name in ("base", "sft", "judge")] == [17, 3, 3]
    explicit = with_overrides(EXPERIMENT, {"base.seed": 17})
    assert fingerprints(explicit, folder) == fingerprints(EXPERIMENT, folder), "the same seed, given explicitly"


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_new_stage_version_changes_the_stage_and_downstream_stages(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprints(EXPERIMENT, folder)
    newer = dataclasses.replace(STAGE_KINDS[kind], version=STAGE_KINDS[kind].version + 1)
    monkeypatch.setattr(identity_module, "STAGE_KINDS", {**STAGE_KINDS, kind: newer})
    of_kind = [name for name, stage in EXPERIMENT.stages.items() if stage.kind == kind]
    assert changed(before, fingerprints(EXPERIMENT, folder)) == with_downstream(EXPERIMENT, *of_kind)


def test_new_version_of_a_scorer_rebuilds_the_scores_and_downstream_stages(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprints(EXPERIMENT, folder)
    newer = dataclasses.replace(SCORERS["reward"], version=SCORERS["reward"].version + 1)
    monkeypatch.setattr(SCORERS, "_entries", {**SCORERS, "reward": newer})
    assert changed(before, fingerprints(EXPERIMENT, folder)) == with_downstream(EXPERIMENT, "again")


def test_new_version_of_a_tuner_changes_the_fingerprints_of_its_trainings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = experiment_of({**STAGES_OF_FILE, "sft": {**STAGES_OF_FILE["sft"], "tuner": {"lora": {}}}})
    before = fingerprints(lora, folder)
    newer = dataclasses.replace(ADAPTERS["lora"], version=2)
    monkeypatch.setattr(ADAPTERS, "_entries", {**ADAPTERS, "lora": newer})
    assert changed(before, fingerprints(lora, folder)) == with_downstream(lora, "sft")


PINNED = {
    "docs": "4ae9d63a2bd78dae",
    "more": "b1323a11fe2448a3",
    "base": "ca0aa89dd6d5365d",
    "other": "4310871dd3dbcfb6",
    "scored": "4d40ca2d80a6fa23",
    "again": "477bd6d764726527",
    "clean": "a7d491b57c17a85b",
    "strict": "f9a09d571918eda6",
    "checked": "bef2de086eda1c0c",
    "prompts": "85379ffd8085fe75",
    "sft": "07b87ddf09efa317",
    "judge": "d35602b0a8a2434f",
    "dpo": "2639087291ef56f2",
    "kto": "3e461946f509f8bb",
    "grpo": "d0555088610a69f7",
    "rloo": "adae5fe4de30f92e",
    "ppo": "59bd73f59c3a355a",
    "rm": "4e99044b8dd6b658",
    "eval": "76cf103be1287b9c",
    "wins": "cc2c2b426dd8d7b3",
}
"""Change a value only with the version of its kind: another fingerprint rebuilds artifacts of the same result."""


def test_fingerprints_are_those_of_earlier_versions(folder: Path) -> None:
    assert fingerprints(EXPERIMENT, folder) == PINNED


def test_identity_survives_a_json_round_trip(folder: Path) -> None:
    for name, key in cache_keys(EXPERIMENT, folder).items():
        loaded = json.loads(json.dumps(key.identity))
        assert fingerprint(EXPERIMENT.stages[name].kind, loaded, key.inputs) == key.fingerprint


@pytest.mark.parametrize("name", [name for name, stage in EXPERIMENT.stages.items() if isinstance(stage, Training)])
def test_difference_lists_changed_fields(name: str, folder: Path) -> None:
    before = identity(EXPERIMENT.stages[name], EXPERIMENT, folder)
    after = identity(with_overrides(EXPERIMENT, {f"{name}.learning_rate": 0.002}).stages[name], EXPERIMENT, folder)
    assert difference(before, after) == [f"learning_rate {before['learning_rate']} -> 0.002"]
    assert difference(before, before) == []
    assert difference({"a": 1}, {"b": 2}) == ["a 1 -> absent", "b absent -> 2"]


# Hashing.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.randoms())
def test_order_of_keys_does_not_matter(values: dict[str, Any], random: Any) -> None:
    items = list(values.items())
    random.shuffle(items)
    actual = fingerprint("sft", values, {})
    assert actual == fingerprint("sft", dict(items), {})
    assert len(actual) == HEX_DIGITS
    assert int(actual, 16) >= 0


def test_fingerprint_depends_on_kind_identity_and_each_input_by_field() -> None:
    actual = [
        fingerprint("sft", {"a": 1}, {"data": "1", "model": "2"}),
        fingerprint("pretrain", {"a": 1}, {"data": "1", "model": "2"}),
        fingerprint("sft", {"a": 2}, {"data": "1", "model": "2"}),
        fingerprint("sft", {"a": "1"}, {"data": "1", "model": "2"}),
        fingerprint("sft", {"a": 1}, {"data": "2", "model": "1"}),
        fingerprint("sft", {"a": 1}, {"data": "1"}),
        fingerprint("sft", {}, {"a": "1", "data": "1", "model": "2"}),
    ]
    assert len(set(actual)) == len(actual)


def test_fingerprints_are_unchanged_since_earlier_releases() -> None:
    # A change here would invalidate every artifact in existing stores.
    assert fingerprint("sft", {"version": 1, "epochs": 1.0, "ü": None}, {"data": "ab"}) == "27bf2994485b0a26"


def test_folder_digest_depends_on_content_names_and_depth_but_not_on_times(tmp_path: Path) -> None:
    def write_folder(name: str, files: dict[str, bytes]) -> Path:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / name

    base = {"config.json": b"{}", "model.safetensors": b"w"}
    same = folder_digest(write_folder("a", base))
    assert folder_digest(write_folder("b", base)) == same
    for number, other in enumerate(
        [
            {**base, "model.safetensors": b"x"},
            {**base, "more.json": b""},
            {"config.json": b"{}", "deep/model.safetensors": b"w"},
            {"config.json": b"{}w", "model.safetensors": b""},
        ]
    ):
        assert folder_digest(write_folder(f"other{number}", other)) != same


@pytest.mark.parametrize("at", [0, 1 << 20, (1 << 21) - 1, (3 << 20) - 1])
def test_folder_digest_depends_on_both_ends_of_large_files(at: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = bytearray(3 << 20 if at > 1 << 21 or at == 0 else 1 << 21)
    path.write_bytes(content)
    before = folder_digest(tmp_path)
    content[at] = 1
    path.write_bytes(content)
    assert folder_digest(tmp_path) != before


def test_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "large").write_bytes(b"a" * 1_000_000)
    assert file_digest(tmp_path / "large") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **named: opened.append(self) or real(self, *args, **named))
    first = file_digest(path)
    assert file_digest(path) == first
    assert opened == [path]
    path.write_text("two")
    assert file_digest(path) != first
