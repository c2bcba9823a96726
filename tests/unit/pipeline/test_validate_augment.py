"""Errors in augment stages are reported at their line, in particular possible leaks of held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText

from tunery.errors import SpecError, SpecErrors
from tunery.events.event_reducer import RunState, replay
from tunery.events.stage_summary import outcome
from tunery.pipeline.validate import validate
from tunery.pipeline.validate_augment import _shared
from tunery.reporting.report import report_html
from tunery.reporting.wandb_values import flatten
from tunery.spec import Dataset
from tunery.spec.graph import lineage
from tunery.store import Store

VALID = """\
name: x
seed: 1
stages:
  texts: {kind: dataset, source: texts.jsonl}
  questions: {kind: dataset, source: questions.jsonl}
  other: {kind: dataset, source: copy.jsonl}
  train: {kind: dataset, source: pairs.jsonl, split: train}
  val: {kind: dataset, source: pairs.jsonl, split: validation}
  held: {kind: dataset, source: pairs.jsonl, split: test}
  prompts:
    kind: augment
    data: train
    templates:
      - "{question}"
      - "Briefly: {question}"
    few_shot: {shots: [0, 2]}
    heldout: [val]
  rewritten: {kind: augment, data: held, templates: ["Say: {question}"], few_shot: {shots: 1, examples: other}}
  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  sft: {kind: sft, data: prompts, model: base, epochs: 1, learning_rate: 1e-3, eval_data: val}
  eval: {kind: evaluate, models: [sft], data: {held: held, rewritten: rewritten}}
"""
TEMPLATE, FEW_SHOT, HELDOUT, REWRITTEN, SFT = 15, 16, 17, 18, 20
"""Line numbers in `VALID`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "questions.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "copy.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    return tmp_path


def errors(load_text: LoadText, folder: Path, *replacements: tuple[str, str]) -> list[SpecError]:
    """Return the errors of the valid experiment after these replacements."""
    text = VALID
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in the valid file"
        text = text.replace(old, new)
    try:
        experiment, source = load_text(text)
        validate(experiment, source, Store(folder / "store"), 2, 1)
    except SpecErrors as caught:
        return caught.errors
    return []


def test_disjoint_splits_need_not_be_held_out(load_text: LoadText, folder: Path) -> None:
    assert errors(load_text, folder) == []
    assert errors(load_text, folder, ("    heldout: [val]\n", "")) == []


# Edit, line of the error, message.
MISSING_HELDOUT: dict[str, tuple[list[tuple[str, str]], int, list[str]]] = {
    "the same file without splits": (
        [("train: {kind: dataset, source: pairs.jsonl, split: train}", "train: {kind: dataset, source: pairs.jsonl}")],
        HELDOUT,
        [
            "evaluation rows of `eval.data.held` can get into `prompts`, from `train`",
            "`pairs.jsonl` (split test and all)",
        ],
    ),
    "prompts of a win rate": (
        [
            (
                "data: {held: held, rewritten: rewritten}}\n",
                "data: {rewritten: rewritten}}\n"
                "  wins: {kind: win_rate, models: [sft], baseline: base, judge: {pretrained: org/name}, data: held}\n",
            ),
            (
                "train: {kind: dataset, source: pairs.jsonl, split: train}",
                "train: {kind: dataset, source: pairs.jsonl}",
            ),
        ],
        HELDOUT,
        ["evaluation rows of `wins.data` can get into `prompts`, from `train`"],
    ),
    "rows of a larger holdout": (
        [("split: test}", "split: test, eval_fraction: 0.2}")],
        HELDOUT,
        ["(split test and train)", "name `held` in `prompts.heldout`, or give them splits that don't overlap"],
    ),
    "a file within a folder": (
        [
            (
                "train: {kind: dataset, source: pairs.jsonl, split: train}",
                "train: {kind: dataset, source: 'p*s.jsonl'}",
            ),
            ("data: train\n", "data: train\n    seed: 3\n"),
        ],
        HELDOUT + 1,
        ["`eval.data.held`"],
    ),
    "eval_data of a training": (
        [("    heldout: [val]\n", ""), ("split: validation", "split: train")],
        10,
        ["evaluation rows of `sft.eval_data`", "name `val` in `prompts.heldout`"],
    ),
    "rows of a selection": (
        [
            ("  base:", "  best: {kind: select, data: val, keep: {random: {top_k: 9}}}\n  base:"),
            ("eval_data: val", "eval_data: best"),
            ("    heldout: [val]\n", "    heldout: [held]\n"),
            ("split: validation", "split: all"),
        ],
        HELDOUT,
        ["name `best` in `prompts.heldout`"],
    ),
    "another subset of a builtin corpus": (
        [
            ("source: pairs.jsonl, split: train", "source: 'builtin:python-docs', subset: questions"),
            ("source: pairs.jsonl, split: test", "source: 'builtin:python-docs', subset: preferences, split: test"),
        ],
        HELDOUT,
        ["both read `builtin:python-docs/questions` (split test and all)"],
    ),
    "examples from held-out rows": (
        [("few_shot: {shots: [0, 2]}", "few_shot: {shots: [0, 2], examples: held}")],
        FEW_SHOT,
        ["can get into `prompts`, from `held`", "name `held` in `prompts.heldout`"],
    ),
    "examples of evaluation prompts from the same rows": (
        [("few_shot: {shots: 1, examples: other}", "few_shot: {shots: 1}")],
        REWRITTEN,
        ["can get into `rewritten`, from `held`", "name other rows in `few_shot.examples`"],
    ),
    "a loss on the augmented rows themselves": (
        [("data: {held: held, rewritten: rewritten}", "data: {train: prompts}")],
        HELDOUT,
        ["evaluation rows of `eval.data.train` can get into `prompts`", "evaluate on rows that it does not output"],
    ),
}


@pytest.mark.parametrize("case", MISSING_HELDOUT)
def test_evaluation_rows_must_be_listed_in_heldout(case: str, load_text: LoadText, folder: Path) -> None:
    replacements, line, words = MISSING_HELDOUT[case]
    (error,) = errors(load_text, folder, *replacements)
    assert (error.file, error.line) == (str(folder / "exp.yaml"), line)
    for word in words:
        assert word in str(error)


HUB = {"source": "hub:org/name"}


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ({"source": "pairs.jsonl"}, {"source": "./link.jsonl"}, True),
        ({"source": ["copy.jsonl", "pairs.jsonl"]}, {"source": "p*.jsonl"}, True),
        ({"source": "pairs.jsonl"}, {"source": "copy.jsonl"}, False),
        (HUB, {**HUB, "hub_split": "train", "revision": "v1"}, True),
        ({**HUB, "hub_split": "train"}, {**HUB, "hub_split": "test"}, False),
        ({**HUB, "config": "a"}, {**HUB, "config": "b"}, False),
        (HUB, {"source": "pairs.jsonl"}, False),
        ({"source": "pairs.jsonl", "split": "train"}, {"source": "pairs.jsonl", "split": "test"}, False),
        (
            {"source": "pairs.jsonl", "split": "train"},
            {"source": "pairs.jsonl", "split": "test", "eval_fraction": 0.2},
            True,
        ),
        (
            {"source": "pairs.jsonl", "split": "test", "eval_fraction": 0.3},
            {"source": "pairs.jsonl", "split": "train"},
            True,
        ),
        (
            {"source": "pairs.jsonl", "split": "train", "eval_fraction": 0.3},
            {"source": "pairs.jsonl", "split": "test"},
            False,
        ),
        ({"source": "pairs.jsonl", "split": "test"}, {"source": "pairs.jsonl", "split": "validation"}, False),
    ],
)
def test_datasets_share_rows_if_sources_and_splits_overlap(
    one: dict[str, Any], other: dict[str, Any], shared: bool, folder: Path
) -> None:
    (folder / "link.jsonl").symlink_to(folder / "pairs.jsonl")
    datasets = [Dataset.model_validate_json(json.dumps({"kind": "dataset", **fields})) for fields in (one, other)]
    assert bool(_shared(datasets[0], datasets[1], folder)) == shared
    assert bool(_shared(datasets[1], datasets[0], folder)) == shared


def test_search_that_makes_splits_overlap_is_rejected(load_text: LoadText, folder: Path) -> None:
    search = "search:\n  metric: sft.eval_loss\n  mode: min\n  trials: 1\n  space:\n    val.split: {choice: [%s]}\n"
    end = ("rewritten: rewritten}}\n", "rewritten: rewritten}}\n" + search)
    no_heldout = ("    heldout: [val]\n", "")
    assert errors(load_text, folder, no_heldout, (end[0], end[1] % "validation, test")) == []
    (error,) = errors(load_text, folder, no_heldout, (end[0], end[1] % "validation, all"))
    assert "a trial is not valid: evaluation rows of `sft.eval_data` can get into `prompts`" in error.message


def test_held_out_stage_covers_its_downstream_stages(load_text: LoadText, folder: Path) -> None:
    replacement = (
        "train: {kind: dataset, source: pairs.jsonl, split: train}",
        "train: {kind: dataset, source: pairs.jsonl}",
    )
    assert len(errors(load_text, folder, replacement)) == 1
    # `rewritten` is derived from `held`.
    assert errors(load_text, folder, replacement, ("heldout: [val]", "heldout: [val, held]")) == []


def test_review_can_restore_rows_that_its_filter_dropped(load_text: LoadText, folder: Path) -> None:
    reviewed = (
        "  base:",
        "  few: {kind: select, data: val, keep: {random: {top_k: 9}}}\n"
        "  reviewed: {kind: review, data: few, decisions: reviewed.jsonl}\n  base:",
    )
    replacements = [reviewed, ("eval_data: val", "eval_data: reviewed"), ("split: validation", "split: all")]
    (error,) = errors(load_text, folder, *replacements, ("heldout: [val]", "heldout: [few, held]"))
    assert "name `reviewed` in `prompts.heldout`" in error.remedy
    assert errors(load_text, folder, *replacements, ("heldout: [val]", "heldout: [reviewed, held]")) == []


def test_different_files_are_assumed_to_have_different_rows(load_text: LoadText, folder: Path) -> None:
    replacement = (
        "train: {kind: dataset, source: pairs.jsonl, split: train}",
        "train: {kind: dataset, source: copy.jsonl}",
    )
    assert errors(load_text, folder, replacement) == []


# Edit, line of the error, message.
INVALID: dict[str, tuple[list[tuple[str, str]], int, list[str]]] = {
    "template without the question": (
        [('"Briefly: {question}"', '"Briefly."')],
        TEMPLATE,
        ["missing placeholder {question}"],
    ),
    "template with an unknown name": (
        [("Briefly: {question}", "{questoin}: {question}")],
        TEMPLATE,
        ["unknown placeholder {questoin}; known: {question}"],
    ),
    "template with an attribute": (
        [("Briefly: {question}", "{question.x}")],
        TEMPLATE,
        ["unknown placeholder {question.x}"],
    ),
    "template with a format": ([("Briefly: {question}", "{question:>9}")], TEMPLATE, ["a placeholder has only a name"]),
    "template with an open brace": ([("Briefly: {question}", "{question} {")], TEMPLATE, ["brace twice: {{ or }}"]),
    "template twice": ([("Briefly: {question}", "{question}")], 13, ["'{question}' occurs more than once"]),
    "example without its answer": (
        [("few_shot: {shots: [0, 2]}", "few_shot: {shots: 1, example: '{question}'}")],
        FEW_SHOT,
        ["missing placeholder {answer}"],
    ),
    "example with its answer first": (
        [("few_shot: {shots: [0, 2]}", "few_shot: {shots: 1, example: '{answer} {question}'}")],
        FEW_SHOT,
        ["{answer} must occur once, after {question}"],
    ),
    "descending range": ([("[0, 2]", "[2, 0]")], FEW_SHOT, ["the lower bound 2 is above the upper bound 0"]),
    "range of one value": ([("[0, 2]", "[2]")], FEW_SHOT, ["`stages.prompts.few_shot.shots` can't be [2]"]),
    "more copies than can differ": (
        [("few_shot: {shots: [0, 2]}", "copies: 3")],
        10,
        ["3 copies can't all differ with 2 templates and without examples"],
    ),
    "no effect": (
        [('templates: ["Say: {question}"], few_shot: {shots: 1, examples: other}', "copies: 1")],
        REWRITTEN,
        ["it has no effect"],
    ),
    "texts": (
        [("data: held, templates", "data: texts, templates")],
        REWRITTEN,
        ["`rewritten.data` needs conversations or prompts, but `texts.jsonl` has texts"],
    ),
    "prompts as examples": (
        [("few_shot: {shots: [0, 2]}", "few_shot: {shots: 2, examples: questions}")],
        FEW_SHOT,
        ["`prompts.few_shot` needs examples with responses, but `questions.jsonl` has prompts"],
    ),
    "examples that are a model": (
        [("few_shot: {shots: [0, 2]}", "few_shot: {shots: 2, examples: base}")],
        FEW_SHOT,
        ["`prompts.few_shot.examples` needs rows", "a pretrain stage outputs a model"],
    ),
    "unknown held-out stage": (
        [("heldout: [val]", "heldout: [vla]")],
        HELDOUT,
        ["`prompts.heldout.0` refers to the stage `vla`", "did you mean `val`?"],
    ),
    "sft on augmented prompts": (
        [("    data: train\n", "    data: questions\n"), ("few_shot: {shots: [0, 2]}", "copies: 2")],
        SFT,
        ["`sft.data` needs conversations with answers, but `questions.jsonl` holds prompts"],
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_error_is_reported_at_its_line(case: str, load_text: LoadText, folder: Path) -> None:
    replacements, line, words = INVALID[case]
    (error,) = errors(load_text, folder, *replacements)
    assert error.line == line
    for word in words:
        assert word in str(error)


def test_lineage_ends_at_the_dataset(load_text: LoadText, folder: Path) -> None:
    experiment, _ = load_text(VALID)
    assert lineage(experiment.stages, "rewritten") == ("rewritten", "held")
    assert lineage(experiment.stages, "held") == ("held",)


# The report.

HOSTILE = '<script>alert("x")</script>'
FACTS: dict[str, Any] = {
    "rows": 190,
    "rows_in": 100,
    "heldout": 4,
    "repeated": 2,
    "unchanged": {"no question": 1},
    "templates": [{"template": "{question}", "variants": 94}, {"template": HOSTILE + "{question}", "variants": 95}],
    "response_forms": {"direct": 90, "reasoned": 99},
    "shots": {"0": 80, "2": 109},
    "fewer_examples": {"several turns": 7},
    "samples": {"rows": [{"before": HOSTILE, "after": f"user: {HOSTILE}\n\nassistant: 4"}]},
}


def state(facts: dict[str, Any]) -> RunState:
    stages = [{"name": "prompts", "kind": "augment", "inputs": []}]
    return replay(
        [
            {"t": 1.0, "event": "run_started", "run": "x", "stages": stages},
            {"t": 2.0, "event": "stage_finished", "stage": "prompts", "kind": "augment", "facts": facts},
        ]
    )


def test_report_has_rows_before_and_after_augmentation_and_escapes_them() -> None:
    page = report_html(state(FACTS))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") == 4, "two in the sample, a template here and among the facts"
    for words in ("7 variants have fewer: several turns", "4 held-out rows were", "1 rows are unchanged: no question"):
        assert words in page
    assert outcome(state(FACTS).stages["prompts"]) == "190 rows of 100, 4 held out"
    assert "Augmented rows" not in report_html(state({"rows": 3}))


def test_texts_of_augmented_rows_are_not_uploaded() -> None:
    assert "alert" not in str(flatten({"samples": FACTS["samples"]}))
