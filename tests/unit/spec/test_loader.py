"""Invalid experiment files: every error has file, line, value, cause and remedy."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from experiment_text import LoadText

from tunery.errors import (
    Interrupted,
    RequestError,
    RowCountError,
    SpecError,
    SpecErrors,
    StageError,
    Stopped,
    StoreError,
    TuneryError,
)
from tunery.ingest.formats.hub import AmbiguousDataset
from tunery.ingest.sources import BadSource
from tunery.models.model_folder import BadModel
from tunery.spec import Dataset, Gopher, Pretrain, Score, Sft, load

VALID = """\
name: x
seed: 1
stages:
  docs: {kind: dataset, source: a.jsonl}
  more: {kind: dataset, source: b.jsonl}
  base:
    kind: pretrain
    data: docs
    model: {scratch: tiny}
    epochs: 2
    learning_rate: 2e-3
  scored: {kind: score, data: docs, by: [{perplexity: base}]}
  clean: {kind: select, data: scored, keep: {perplexity: {keep_fraction: 0.8}}}
  sft: {kind: sft, data: clean, model: base, epochs: 1, learning_rate: 1e-5, eval_data: more}
  eval: {kind: evaluate, models: [base, sft], data: {held: more}}
search:
  metric: sft.eval_loss
  mode: min
  trials: 3
  space:
    sft.learning_rate: {loguniform: [1e-5, 1e-3]}
"""
EVALUATE = "eval: {kind: evaluate, models: [base, sft], data: {held: more}}"
WIN_RATE = "eval: {kind: win_rate, models: [base], baseline: sft, judge: {pretrained: org/name}, data: more}"


def edited(*replacements: tuple[str, str]) -> str:
    text = VALID
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in the valid file"
        text = text.replace(old, new)
    return text


def errors_of(load_text: LoadText, text: str) -> list[SpecError]:
    with pytest.raises(RequestError) as caught:
        load_text(text)
    assert isinstance(caught.value, SpecErrors | SpecError)
    return caught.value.errors if isinstance(caught.value, SpecErrors) else [caught.value]


def test_valid_file_is_loaded(load_text: LoadText) -> None:
    experiment, source = load_text(edited(("name: x", "name: no")))
    assert experiment.name == "no"
    sft, base = experiment.stages["sft"], experiment.stages["base"]
    assert isinstance(sft, Sft)
    assert isinstance(base, Pretrain)
    assert (sft.learning_rate, base.learning_rate, base.epochs) == (1e-5, 2e-3, 2)
    assert source.file.endswith("exp.yaml")


def test_number_as_a_name_requires_quotes(load_text: LoadText) -> None:
    (error,) = errors_of(load_text, edited(("name: x", "name: 2024")))
    assert "`name` can't be 2024" in error.message
    assert load_text(edited(("name: x", "name: '2024'")))[0].name == "2024"


# (replacements, line of the error, parts of its message)
INVALID: dict[str, tuple[list[tuple[str, str]], int, list[str]]] = {
    "unknown key": (
        [("    epochs: 2\n", "    epochs: 2\n    epoch: 3\n")],
        11,
        ["`stages.base` has no key `epoch`", "did you mean `epochs`?"],
    ),
    "misspelled required key is reported once": (
        [("    epochs: 2", "    epoch: 2")],
        10,
        ["`stages.base` has no key `epoch`", "did you mean `epochs`?"],
    ),
    "unknown key without a similar one": (
        [("seed: 1", "seed: 1\nzzz: 1")],
        3,
        ["`an experiment` has no key `zzz`", "known: name, seed, stages"],
    ),
    "unknown key deep in a tuner": (
        [("learning_rate: 1e-5", "learning_rate: 1e-5, tuner: {lora: {rnk: 8}}")],
        14,
        ["`stages.sft.tuner.lora` has no key `rnk`", "did you mean `rank`?"],
    ),
    "unknown tuner": (
        [("learning_rate: 1e-5", "learning_rate: 1e-5, tuner: {lore: {}}")],
        14,
        ["`stages.sft.tuner` has no key `lore`", "did you mean `lora`?"],
    ),
    "tuner with settings as a name": (
        [("learning_rate: 1e-5", "learning_rate: 1e-5, tuner: lora")],
        14,
        ['`stages.sft.tuner` can\'t be "lora"', "write `{lora: {}}`"],
    ),
    "misspelled tuner without settings": (
        [("learning_rate: 1e-5", "learning_rate: 1e-5, tuner: ful")],
        14,
        ['`stages.sft.tuner` can\'t be "ful"', "did you mean `full`?"],
    ),
    "tuner near none": (
        [("learning_rate: 1e-5", "learning_rate: 1e-5, tuner: {zzz: {}}")],
        14,
        ['`stages.sft.tuner` can\'t be {"zzz": {}}', "known: full, lora"],
    ),
    "misspelled form of a model": (
        [("{scratch: tiny}", "{scrach: tiny}")],
        9,
        ["has no key `scrach`", "did you mean `scratch`?"],
    ),
    "unknown scorer": (
        [("by: [{perplexity: base}]", "by: [{perplexty: base}]")],
        12,
        ["`stages.scored.by.0` has no key `perplexty`", "did you mean `perplexity`?"],
    ),
    "unknown scorer without a similar one": (
        [("by: [{perplexity: base}]", "by: [{zzz: base}]")],
        12,
        ['`stages.scored.by.0` can\'t be {"zzz": "base"}', "first key is its kind", "known: perplexity, ifd, reward"],
    ),
    **{
        f"scorer {invalid}": ([("by: [{perplexity: base}]", f"by: [{{perplexity: base}}, {invalid}]")], 12, words)
        for invalid, words in {
            "{reward: base}": [
                "`scored.by.1.reward` needs a reward model or classifier, but `base` is a pretrain stage",
                "none; use {pretrained: <folder or hub name>}",
            ],
            "{reward: bsae}": ["`scored.by.1.reward` refers to the stage `bsae`", "did you mean `base`?"],
            "{reward: {scratch: tiny}}": ['`stages.scored.by.1.reward` can\'t be {"scratch": "tiny"}'],
            "{rewrad: {pretrained: a/b}}": ["`stages.scored.by.1` has no key `rewrad`", "did you mean `reward`?"],
            "{classifier: base, label: good}": ["`scored.by.1.classifier` needs a reward model or classifier"],
            "{classifier: {pretrained: a/b}}": ["`stages.scored.by.1` has no `label`"],
            "{classifier: {pretrained: a/b}, label: -1}": ["`stages.scored.by.1.label` can't be -1", "or equal to 0"],
            "{classifier: {pretrained: a/b}, label: x, temperature: 0}": ["temperature` can't be 0", "greater than 0"],
            "{embedding: base, reference: mroe}": [
                "`scored.by.1.reference` refers to the stage `mroe`",
                "did you mean `more`?",
            ],
            "{embedding: more, reference: more}": [
                "`scored.by.1.embedding` needs a model, but `more` is a dataset stage"
            ],
            "{embedding: base, reference: base}": ["`scored.by.1.reference` needs rows or scored rows, but `base`"],
            "{lenght: words}": ["`stages.scored.by.1` has no key `lenght`", "did you mean `length`?"],
            "{length: word}": ['`stages.scored.by.1.length` can\'t be "word"', "'words', 'chars' or 'lines'"],
            "{length: words, off: response}": ["`stages.scored.by.1` has no key `off`", "did you mean `of`?"],
            "{gopher: {words_mn: 3}}": ["`stages.scored.by.1.gopher` has no key `words_mn`", "mean `words_min`?"],
            "{gopher: {words_min: few}}": ["`stages.scored.by.1.gopher.words_min` can't be", "valid integer"],
            "{gopher: {top_2gram_max: 2}}": ["gopher.top_2gram_max` can't be 2", "less than or equal to 1"],
            "{gopher: null}": ["`stages.scored.by.1.gopher` can't be null"],
            "{c4: {braces: 1}}": ["`stages.scored.by.1.c4.braces` can't be 1", "valid boolean"],
            "{language: EN}": ['`stages.scored.by.1.language` can\'t be "EN"', "did you mean `en`?"],
            "{language: klingon}": ['can\'t be "klingon"', "not a known ISO 639 code"],
            "{duplicates: near}": ['`stages.scored.by.1.duplicates` can\'t be "near"', "'exact' or 'normalised'"],
            "{duplicates: exact, of: all}": ['`stages.scored.by.1.of` can\'t be "all"', "'row', 'prompt'"],
            "{near_duplicates: {treshold: 0.5}}": ["has no key `treshold`", "did you mean `threshold`?"],
            "{near_duplicates: {threshold: 0}}": ["near_duplicates.threshold` can't be 0", "greater than 0"],
            "{contamination: {}}": ["`stages.scored.by.1.contamination` has no `sets`"],
            "{contamination: {sets: []}}": ["contamination.sets` can't be []", "at least 1"],
            "{contamination: {sets: more}}": ['contamination.sets` can\'t be "more"', "valid array"],
            "{contamination: {sets: [more, more]}}": ["more occurs twice"],
            "{contamination: {sets: [mroe]}}": [
                "`scored.by.1.contamination.sets.0` refers to the stage `mroe`",
                "did you mean `more`?",
            ],
            "{contamination: {sets: [base]}}": ["needs rows or scored rows, but `base` is a pretrain stage"],
            "{contamination: {sets: [clean]}}": ["cycle: scored -> clean -> scored"],
        }.items()
    },
    "two scores with the same name": (
        [("by: [{perplexity: base}]", "by: [{length: words}, {length: chars}]")],
        12,
        ["two scores have the name length: set `name` of one of them"],
    ),
    "score with the name of a column": (
        [("by: [{perplexity: base}]", "by: [{perplexity: base}, {length: words, name: random}]")],
        12,
        ["a score can't have the name random"],
    ),
    "no scorer": ([("by: [{perplexity: base}]", "by: []")], 12, ["`stages.scored.by` can't be []", "at least 1"]),
    "missing key": ([("    data: docs\n", "")], 6, ["`stages.base` has no `data`", "add `data: ...`"]),
    "missing kind": ([("{kind: select, ", "{")], 13, ["`stages.clean` has no `kind`", "dataset, score, select"]),
    "unknown kind": ([("kind: sft,", "kind: stf,")], 14, ["no stage kind `stf`", "did you mean `sft`?"]),
    "wrong type": ([("epochs: 2", "epochs: soon")], 10, ['`stages.base.epochs` can\'t be "soon"', "number, or 'auto'"]),
    "boolean instead of a number": ([("epochs: 2", "epochs: true")], 10, ["can't be true", "valid number"]),
    "no is a string": ([("epochs: 2", "epochs: no")], 10, ['can\'t be "no"', "valid number"]),
    "quoted number is a string": ([("epochs: 2", "epochs: '2'")], 10, ['can\'t be "2"', "valid number"]),
    "infinite epochs": ([("epochs: 2", "epochs: .inf")], 10, ["can't be Infinity", "finite number"]),
    "not a number": ([("epochs: 2", "epochs: .nan")], 10, ["can't be NaN"]),
    "out of bounds": ([("epochs: 2", "epochs: 0")], 10, ["can't be 0", "greater than 0"]),
    "stage that is a number": ([("{kind: dataset, source: b.jsonl}", "5")], 5, ["`stages.more` can't be 5"]),
    "stage that is empty": ([("{kind: dataset, source: b.jsonl}", "")], 5, ["`stages.more` can't be null"]),
    "invalid stage name": (
        [("  eval:", "  my-eval:")],
        15,
        ["`my-eval` is not a valid stage name", "letters, digits and _"],
    ),
    "long stage name": (
        [("  eval:", f"  {'e' * 65}:")],
        15,
        ["`eeeeeeeeeeeeeeeeeeee...` is too long", "65 char", "64"],
    ),
    "number of many digits": ([("epochs: 2", "epochs: " + "9" * 30)], 10, ["can't be \"999", "valid number"]),
    "negative seed": ([("seed: 1", "seed: -1")], 2, ["`seed` can't be -1", "greater than or equal to 0"]),
    "name of the experiment": ([("name: x", "name: a/b")], 1, ['`name` can\'t be "a/b"', "pattern"]),
    "cycle": (
        [("data: docs, by: [{perplexity: base}]", "data: clean, by: [{perplexity: base}]")],
        12,
        ["cycle: scored -> clean -> scored", "each of them depends", "use an earlier stage"],
    ),
    "stage that reads itself": (
        [("model: base, epochs", "model: sft, epochs")],
        14,
        ["cycle: sft -> sft"],
    ),
    "reference to an unknown stage": (
        [("    data: docs\n", "    data: dosc\n")],
        8,
        ["`base.data` refers to the stage `dosc`, which does not exist", "did you mean `docs`?"],
    ),
    "reference in a list": (
        [("models: [base, sft]", "models: [base, unknown]")],
        15,
        ["`eval.models.1` refers to the stage `unknown`", "known: docs, more, base, scored, clean, sft"],
    ),
    "stage with the wrong output type": (
        [("data: clean, model", "data: base, model")],
        14,
        ["`sft.data` needs rows or scored rows, but `base` is a pretrain stage", "outputs a model", "docs, more"],
    ),
    "rows instead of scored rows": (
        [("data: scored, keep", "data: docs, keep")],
        13,
        ["`clean.keep` uses the score `perplexity`, which `docs` does not compute", "`docs` is a dataset stage"],
    ),
    "new model instead of a trained one": (
        [("model: base, epochs", "model: {scratch: tiny}, epochs")],
        14,
        ['`stages.sft.model` can\'t be {"scratch": "tiny"}', "{pretrained: <folder or hub name>}"],
    ),
    "folder with a revision": (
        [("{scratch: tiny}", "{pretrained: ./m, revision: abc}")],
        9,
        ["a folder (./m) has no revision"],
    ),
    "duplicate stage": (
        [("  more:", "  docs:")],
        5,
        ["`stages.docs` is given twice", "line 4", "rename one of the two"],
    ),
    "model that is evaluated twice": (
        [("models: [base, sft]", "models: [base, base]")],
        15,
        ["base occurs twice"],
    ),
    "model that is compared with itself": (
        [(EVALUATE, WIN_RATE.replace("[base]", "[base, sft]"))],
        15,
        ["`sft` would be compared with itself: remove it from `models`"],
    ),
    "compared models with the same name": (
        [(EVALUATE, WIN_RATE.replace("[base]", "[{pretrained: ./a/sft}]"))],
        15,
        ["sft occurs twice"],
    ),
    "responses as long as max_length": (
        [(EVALUATE, WIN_RATE.replace("data: more", "data: more, max_length: 128"))],
        15,
        ["`max_length` (128) must be above `max_new_tokens` (128)"],
    ),
    "score that is not computed": (
        [("keep: {perplexity:", "keep: {perplexiti:")],
        13,
        ["`clean.keep` uses the score `perplexiti`, which `scored` does not compute", "did you mean `perplexity`?"],
    ),
    "two rules on one score": (
        [("{keep_fraction: 0.8}", "{keep_fraction: 0.8, threshold: 3}")],
        13,
        ["set one of `keep_fraction`, `top_k`, `match_count_of`, `keep_fraction_of_rest`, `threshold`, `range`"],
    ),
    "filter without a rule": (
        [("keep: {perplexity: {keep_fraction: 0.8}}", "combine: all")],
        13,
        ["`stages.clean` can't be", "it keeps all rows: set `keep`, `quota` or `diverse`"],
    ),
    "keep_fraction_of_rest with any": (
        [("{keep_fraction: 0.8}}", "{keep_fraction_of_rest: 0.8}}, combine: any")],
        13,
        ["with `combine: any` use `keep_fraction`"],
    ),
    "diversity by a score": (
        [
            (
                "{keep_fraction: 0.8}}",
                "{keep_fraction: 0.8}}, diverse: {embedding: perplexity, method: k_center, rows: 9}",
            )
        ],
        13,
        ["`clean.diverse` uses the vectors of `perplexity`", "does not store", "`by: [{embedding: <model>}]`"],
    ),
    "diversity of rows without scores": (
        [
            (
                "scored, keep: {perplexity: {keep_fraction: 0.8}}",
                "docs, diverse: {embedding: e, method: k_center, rows: 9}",
            )
        ],
        13,
        ["`clean.diverse` uses the vectors of `e`, which `docs` does not store", "it is a dataset stage"],
    ),
    "diversity by misspelled vectors": (
        [
            ("by: [{perplexity: base}]", "by: [{embedding: base}]"),
            ("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {embedding: embeddings, method: k_center, rows: 9}"),
        ],
        13,
        ["of `embeddings`", "did you mean `embedding`?"],
    ),
    "diversity by a score that is not computed": (
        [
            ("by: [{perplexity: base}]", "by: [{perplexity: base}, {embedding: base}]"),
            (
                "keep: {perplexity: {keep_fraction: 0.8}}",
                "diverse: {embedding: embedding, method: score_first, score: perplexiti}",
            ),
        ],
        13,
        ["`clean.diverse` uses the score `perplexiti`", "did you mean `perplexity`?"],
    ),
    "rule on vectors": (
        [
            ("by: [{perplexity: base}]", "by: [{perplexity: base}, {embedding: base}]"),
            ("keep: {perplexity:", "keep: {embedding:"),
        ],
        13,
        ["`clean.keep` uses `embedding`, which is not a score", "set its `reference` in `scored`"],
    ),
    "unknown diversity method": (
        [("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {embedding: embedding, method: kcenter, rows: 9}")],
        13,
        ['`stages.clean.diverse.method` can\'t be "kcenter"', "'k_center' or 'score_first'"],
    ),
    "review of a selection without a threshold": (
        [
            ("by: [{perplexity: base}]", "by: [{embedding: base}]"),
            ("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {embedding: embedding, method: k_center, rows: 9}"),
            ("  eval:", "  checked: {kind: review, data: clean, decisions: a.jsonl}\n  eval:"),
        ],
        15,
        ["`checked` reviews rows near a threshold, but `clean` has none"],
    ),
    "threshold that keeps everything": ([("{keep_fraction: 0.8}", "{threshold: .inf}")], 13, ["finite number"]),
    "search path of an unknown field": (
        [("sft.learning_rate: {log", "sft.learnin_rate: {log")],
        21,
        ["invalid search path `sft.learnin_rate`", "did you mean `learning_rate`?"],
    ),
    "searched score that is not computed": (
        [
            ("by: [{perplexity: base}]", "by: [{perplexity: base}, {embedding: base}]"),
            (
                "keep: {perplexity: {keep_fraction: 0.8}}",
                "diverse: {embedding: embedding, method: score_first, score: perplexity}",
            ),
            ("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "clean.diverse.score: {choice: [random, ifd]}"),
        ],
        21,
        ["`clean.diverse.score` can't be 'ifd'", "uses the score `ifd`, which `scored` does not compute"],
    ),
    "search path of an unknown stage": (
        [("sft.learning_rate: {log", "stf.learning_rate: {log")],
        21,
        ["there is no `stf`", "did you mean `sft`?"],
    ),
    "search path without a field": (
        [("sft.learning_rate: {log", "sft: {log")],
        21,
        ["invalid search path `sft`", "use <stage>.<field>"],
    ),
    "search path below a number": (
        [("sft.learning_rate: {log", "sft.learning_rate.x: {log")],
        21,
        ["there is no `x` in `sft.learning_rate`"],
    ),
    "descending range": (
        [("[1e-5, 1e-3]", "[1e-3, 1e-5]")],
        21,
        ["the range [0.001, 1e-05] is empty", "the lower bound comes first"],
    ),
    "empty range": ([("loguniform: [1e-5, 1e-3]", "int: [3, 3]")], 21, ["[3, 3] is empty"]),
    "loguniform from 0": ([("[1e-5, 1e-3]", "[0, 1e-3]")], 21, ["loguniform starts at 0", "must start above 0"]),
    "infinite range": ([("[1e-5, 1e-3]", "[1e-5, .inf]")], 21, ["finite number"]),
    "range with three values": ([("[1e-5, 1e-3]", "[1, 2, 3]")], 21, ["can't be [1, 2, 3]", "at most 2"]),
    "two dimensions in one": (
        [("[1e-5, 1e-3]", "[1e-5, 1e-3], choice: [1]")],
        21,
        ["set exactly one of `choice`, `grid`, `uniform`, `loguniform`, `int`"],
    ),
    "range outside the bounds of the field": (
        [("loguniform: [1e-5, 1e-3]", "uniform: [0, 1e-3]")],
        21,
        ["`sft.learning_rate` can't be 0.0", "greater than 0", "change the dimension"],
    ),
    "choice with an invalid value": (
        [("loguniform: [1e-5, 1e-3]", "choice: [1e-5, fast]")],
        21,
        ["`sft.learning_rate` can't be 'fast'", "valid number"],
    ),
    "choice with an unknown stage": (
        [("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "sft.data: {choice: [clean, claen]}")],
        21,
        ["`sft.data` can't be 'claen'", "refers to the stage `claen`", "did you mean `clean`?"],
    ),
    "choice that creates a cycle": (
        [("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "scored.data: {choice: [docs, clean]}")],
        21,
        ["`scored.data` can't be 'clean'", "cycle"],
    ),
    "field that the metric does not depend on": (
        [("metric: sft.eval_loss", "metric: eval.base.held.loss"), ("models: [base, sft]", "models: [base]")],
        21,
        ["`sft.learning_rate` can't change `eval.base.held.loss`", "`eval` does not depend on `sft`", "base"],
    ),
    "metric that is not logged": (
        [("metric: sft.eval_loss", "metric: sft.accuracy")],
        17,
        ["no stage logs `sft.accuracy`", "known: sft.eval_loss, eval.base.held.loss, eval.base.held.perplexity"],
    ),
    "metric that is misspelled": (
        [("metric: sft.eval_loss", "metric: eval.sft.held.los")],
        17,
        ["no stage logs `eval.sft.held.los`", "did you mean `eval.sft.held.loss`?"],
    ),
    "asha by a metric measured after training": (
        [("metric: sft.eval_loss", "metric: eval.sft.held.loss"), ("  trials: 3", "  scheduler: asha\n  trials: 3")],
        19,
        ["asha can't stop trials early by `eval.sft.held.loss`", "once, after the training", "sft.eval_loss"],
    ),
    "grid with too many combinations": (
        [
            ("  trials: 3", "  algorithm: grid\n  trials: 3"),
            ("{loguniform: [1e-5, 1e-3]}", "{choice: [1e-5, 1e-4]}\n    sft.epochs: {choice: [1, 2]}"),
        ],
        20,
        ["the grid has 4 combinations, but `trials` is 3", "set `trials: 4`"],
    ),
    "grid over a range": (
        [("  trials: 3", "  algorithm: grid\n  trials: 3")],
        22,
        ["a grid needs a list of values, but `sft.learning_rate` is loguniform", "list the values as `choice`"],
    ),
    "search without a dimension": (
        [("  space:\n    sft.learning_rate: {loguniform: [1e-5, 1e-3]}\n", "  space: {}\n")],
        20,
        ["`search.space` can't be {}"],
    ),
    "unknown ZeRO stage": ([("seed: 1", "seed: 1\ncompute: {zero_stage: 4}")], 3, ["can't be 4", "0, 1, 2 or 3"]),
    "unknown key of compute": (
        [("seed: 1", "seed: 1\ncompute:\n  wokers: 2")],
        4,
        ["`compute` has no key `wokers`", "did you mean `workers`?"],
    ),
    "seed with too many digits": ([("seed: 1", f"seed: {'1' * 5000}")], 2, ["`seed` can't be"]),
    "broken YAML": ([("seed: 1", "seed: [1")], 3, ["not valid YAML", "starts in line 2", "indentation"]),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_file_has_one_error_with_line_value_and_remedy(case: str, load_text: LoadText, tmp_path: Path) -> None:
    replacements, line, words = INVALID[case]
    (error,) = errors_of(load_text, edited(*replacements))
    assert str(error).startswith(f"{tmp_path / 'exp.yaml'}:{line}: ")
    for word in words:
        assert word in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize("subject", ["model: base, epochs", "  metric: sft.eval_loss"])
def test_valid_variants_of_the_invalid_files_load(load_text: LoadText, subject: str) -> None:
    valid = {
        "model: base, epochs": "model: {pretrained: org/name, revision: abc}, epochs",
        "  metric: sft.eval_loss": "  scheduler: asha\n  metric: sft.eval_loss",
    }
    load_text(edited((subject, valid[subject])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing yet\n", "the file is empty"),
        ("- name: x\n", "the file contains a list"),
        ("just words", 'the file contains one value ("just words")'),
    ],
)
def test_file_without_an_experiment_is_an_error(load_text: LoadText, text: str, message: str) -> None:
    (error,) = errors_of(load_text, text)
    assert error.message == message
    assert error.line == 1
    assert "mapping with name, seed and stages" in error.remedy


def test_all_errors_of_a_level_are_reported_together(load_text: LoadText) -> None:
    text = edited(("seed: 1", "seed: one"), ("epochs: 2", "epochs: -1"), ("trials: 3", "trials: 0"))
    assert [error.line for error in errors_of(load_text, text)] == [2, 10, 19]
    text = edited(("    data: docs", "    data: nope"), ("eval_data: more", "eval_data: base"))
    assert [error.line for error in errors_of(load_text, text)] == [8, 14]


def test_search_without_a_logged_metric_has_a_remedy(load_text: LoadText) -> None:
    without_eval = edited(
        (", eval_data: more", ""), ("  eval: {kind: evaluate, models: [base, sft], data: {held: more}}\n", "")
    )
    (error,) = errors_of(load_text, without_eval)
    assert "no stage logs `sft.eval_loss`" in error.message
    assert "set `eval_data` of a training, or add an evaluate stage" in error.cause


def test_unreadable_file_is_a_request_error(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9\n")
    for path, words in [
        (tmp_path / "absent.yaml", "there is no file"),
        (tmp_path, "is a folder"),
        (latin, "can't be read"),
        (latin / "below.yaml", "can't be read"),
    ]:
        with pytest.raises(RequestError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value)
        assert caught.value.remedy
        assert caught.value.exit_code == 2


def test_epochs_and_learning_rate_have_no_default(load_text: LoadText) -> None:
    for missing in ("    epochs: 2\n", "    learning_rate: 2e-3\n"):
        assert "which is required" in errors_of(load_text, edited((missing, "")))[0].message
    docs = load_text(VALID)[0].stages["docs"]
    assert isinstance(docs, Dataset)
    assert docs.split == "all"


ERRORS: list[TuneryError] = [
    TuneryError("m", cause="c", remedy="r"),
    RequestError("m", cause="c", remedy="r"),
    SpecError("m", file="exp.yaml", line=7, cause="c", remedy="r"),
    SpecErrors([SpecError("m", file="exp.yaml", line=7), SpecError("n", file="exp.yaml", line=9, remedy="r")]),
    StoreError("m", cause="c", remedy="r"),
    StageError("sft", "m", cause="c", remedy="r", log="/log"),
    RowCountError("sft", "m", cause="c", log="/log"),
    Stopped("m"),
    Interrupted("m"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_pickled_with_all_attributes(error: TuneryError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.exit_code == error.exit_code
    attributes = {key: value for key, value in vars(error).items() if key != "errors"}
    assert {key: vars(copy)[key] for key in attributes} == attributes
    assert [vars(item) for item in getattr(copy, "errors", [])] == [vars(item) for item in getattr(error, "errors", [])]


@pytest.mark.parametrize(
    "error",
    [
        BadSource("columns", "m", cause="c", remedy="r"),
        BadModel("m", "c", "r"),
        AmbiguousDataset("config", "m", ["a", "b"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_packages_can_be_pickled(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), "m", vars(error))


def test_all_error_classes_are_tested_for_pickling() -> None:
    def subclasses(cls: type[TuneryError]) -> set[type[TuneryError]]:
        return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__() if sub.__module__ == "tunery.errors"))

    assert subclasses(TuneryError) == {type(error) for error in ERRORS}


def test_errors_of_load_are_pickled_with_file_and_line(load_text: LoadText, tmp_path: Path) -> None:
    with pytest.raises(SpecErrors) as caught:
        load_text(edited(("epochs: 2", "epochs: soon")))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert (copy.errors[0].file, copy.errors[0].line) == (str(tmp_path / "exp.yaml"), 10)


def test_scorers_are_parsed_by_their_first_key(load_text: LoadText) -> None:
    scorers = (
        "{perplexity: base}, {length: words}, {length: chars, of: prompt, name: long_prompt},"
        " {gopher: {}}, {gopher: {words_min: null, of: all}, name: gopher_all}, {c4: {braces: false}},"
        " {language: en}, {duplicates: exact, of: prompt}, {near_duplicates: {threshold: 0.7}},"
        " {contamination: {sets: [more], ngram: 8}}, {reward: {pretrained: a/b}},"
        " {classifier: {pretrained: a/b, revision: abc}, label: 1, temperature: 0.5},"
        " {embedding: base, reference: docs}"
    )
    scored = load_text(edited(("by: [{perplexity: base}]", f"by: [{scorers}]")))[0].stages["scored"]
    assert isinstance(scored, Score)
    assert [scorer.score for scorer in scored.by] == [
        "perplexity",
        "length",
        "long_prompt",
        "gopher",
        "gopher_all",
        "c4",
        "language",
        "duplicates",
        "near_duplicates",
        "contamination",
        "reward",
        "classifier",
        "embedding",
    ]
    assert [item.stage for item in scored.inputs()] == ["docs", "base", "more", "base", "docs"]
    assert [item.path for item in scored.inputs()][2:] == [
        ("by", 9, "contamination", "sets", 0),
        ("by", 12, "embedding"),
        ("by", 12, "reference"),
    ]
    gopher = scored.by[4]
    assert isinstance(gopher, Gopher)
    assert (gopher.gopher.words_min, gopher.gopher.words_max, gopher.gopher.of) == (None, 100_000, "all")
