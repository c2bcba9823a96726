"""Invalid experiment files: every error has file, line, value, cause and remedy."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from experiment_text import LoadText

from tunery.errors import (
    Interrupted,
    RequestError,
    RowsLost,
    SpecError,
    SpecErrors,
    StageError,
    Stopped,
    StoreError,
    TuneryError,
)
from tunery.ingest.formats.hub import Ambiguous
from tunery.ingest.sources import BadSource
from tunery.models.model_folder import BadModel
from tunery.spec import Dataset, Gopher, Pretrain, Score, Sft, load

GOOD = """\
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
    text = GOOD
    for old, new in replacements:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the good file"
        text = text.replace(old, new)
    return text


def errors_of(load_text: LoadText, text: str) -> list[SpecError]:
    with pytest.raises(RequestError) as caught:
        load_text(text)
    assert isinstance(caught.value, SpecErrors | SpecError)
    return caught.value.errors if isinstance(caught.value, SpecErrors) else [caught.value]


def test_good_file_loads_with_the_meanings_that_it_looks_like(load_text: LoadText) -> None:
    experiment, source = load_text(edited(("name: x", "name: no")))
    assert experiment.name == "no"
    sft, base = experiment.stages["sft"], experiment.stages["base"]
    assert isinstance(sft, Sft)
    assert isinstance(base, Pretrain)
    assert (sft.learning_rate, base.learning_rate, base.epochs) == (1e-5, 2e-3, 2)
    assert source.file.endswith("exp.yaml")


def test_number_where_a_word_belongs_wants_quotes_and_takes_them(load_text: LoadText) -> None:
    (error,) = errors_of(load_text, edited(("name: x", "name: 2024")))
    assert "`name` can't be 2024" in error.message
    assert load_text(edited(("name: x", "name: '2024'")))[0].name == "2024"


# (what is edited, line of the error, what its text says)
MISTAKES: dict[str, tuple[list[tuple[str, str]], int, list[str]]] = {
    "unknown key": (
        [("    epochs: 2\n", "    epochs: 2\n    epoch: 3\n")],
        11,
        ["`stages.base` has no key `epoch`", "did you mean `epochs`?"],
    ),
    "misspelled key that is needed is told once": (
        [("    epochs: 2", "    epoch: 2")],
        10,
        ["`stages.base` has no key `epoch`", "did you mean `epochs`?"],
    ),
    "unknown key near nothing": (
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
    "scorer near none": (
        [("by: [{perplexity: base}]", "by: [{zzz: base}]")],
        12,
        ['`stages.scored.by.0` can\'t be {"zzz": "base"}', "first key is its kind", "known: perplexity, ifd, reward"],
    ),
    **{
        f"scorer {wrong}": ([("by: [{perplexity: base}]", f"by: [{{perplexity: base}}, {wrong}]")], 12, words)
        for wrong, words in {
            "{reward: base}": [
                "`scored.by.1.reward` needs a reward model or classifier, but `base` is a pretrain stage",
                "none; write {pretrained: <folder or hub name>}",
            ],
            "{reward: bsae}": ["`scored.by.1.reward` refers to stage `bsae`", "did you mean `base`?"],
            "{reward: {scratch: tiny}}": ['`stages.scored.by.1.reward` can\'t be {"scratch": "tiny"}'],
            "{rewrad: {pretrained: a/b}}": ["`stages.scored.by.1` has no key `rewrad`", "did you mean `reward`?"],
            "{classifier: base, label: good}": ["`scored.by.1.classifier` needs a reward model or classifier"],
            "{classifier: {pretrained: a/b}}": ["`stages.scored.by.1` lacks `label`"],
            "{classifier: {pretrained: a/b}, label: -1}": ["`stages.scored.by.1.label` can't be -1", "or equal to 0"],
            "{classifier: {pretrained: a/b}, label: x, temperature: 0}": ["temperature` can't be 0", "greater than 0"],
            "{embedding: base, reference: mroe}": [
                "`scored.by.1.reference` refers to stage `mroe`",
                "did you mean `more`?",
            ],
            "{embedding: more, reference: more}": [
                "`scored.by.1.embedding` needs a model, but `more` is a dataset stage"
            ],
            "{embedding: base, reference: base}": ["`scored.by.1.reference` needs rows or scored rows, but `base`"],
            "{lenght: words}": ["`stages.scored.by.1` has no key `lenght`", "did you mean `length`?"],
            "{length: word}": ['`stages.scored.by.1.length` can\'t be "word"', "'words', 'chars' or 'lines'"],
            "{length: words, off: answer}": ["`stages.scored.by.1` has no key `off`", "did you mean `of`?"],
            "{gopher: {words_mn: 3}}": ["`stages.scored.by.1.gopher` has no key `words_mn`", "mean `words_min`?"],
            "{gopher: {words_min: few}}": ["`stages.scored.by.1.gopher.words_min` can't be", "valid integer"],
            "{gopher: {top_2gram_max: 2}}": ["gopher.top_2gram_max` can't be 2", "less than or equal to 1"],
            "{gopher: null}": ["`stages.scored.by.1.gopher` can't be null"],
            "{c4: {braces: 1}}": ["`stages.scored.by.1.c4.braces` can't be 1", "valid boolean"],
            "{language: EN}": ['`stages.scored.by.1.language` can\'t be "EN"', "did you mean `en`?"],
            "{language: klingon}": ['can\'t be "klingon"', "no language with this ISO 639 code"],
            "{duplicates: near}": ['`stages.scored.by.1.duplicates` can\'t be "near"', "'exact' or 'normalised'"],
            "{duplicates: exact, of: whole}": ['`stages.scored.by.1.of` can\'t be "whole"', "'row', 'question'"],
            "{near_duplicates: {treshold: 0.5}}": ["has no key `treshold`", "did you mean `threshold`?"],
            "{near_duplicates: {threshold: 0}}": ["near_duplicates.threshold` can't be 0", "greater than 0"],
            "{contamination: {}}": ["`stages.scored.by.1.contamination` lacks `sets`"],
            "{contamination: {sets: []}}": ["contamination.sets` can't be []", "at least 1"],
            "{contamination: {sets: more}}": ['contamination.sets` can\'t be "more"', "valid array"],
            "{contamination: {sets: [more, more]}}": ["more is named twice"],
            "{contamination: {sets: [mroe]}}": [
                "`scored.by.1.contamination.sets.0` refers to stage `mroe`",
                "did you mean `more`?",
            ],
            "{contamination: {sets: [base]}}": ["needs rows or scored rows, but `base` is a pretrain stage"],
            "{contamination: {sets: [clean]}}": ["cycle: scored -> clean -> scored"],
        }.items()
    },
    "two scores of one name": (
        [("by: [{perplexity: base}]", "by: [{length: words}, {length: chars}]")],
        12,
        ["two scores are called length: give one of them a `name`"],
    ),
    "score with the name of a column": (
        [("by: [{perplexity: base}]", "by: [{perplexity: base}, {length: words, name: random}]")],
        12,
        ["a score can't be called random"],
    ),
    "no scorer": ([("by: [{perplexity: base}]", "by: []")], 12, ["`stages.scored.by` can't be []", "at least 1"]),
    "missing key": ([("    data: docs\n", "")], 6, ["`stages.base` lacks `data`", "add `data: ...`"]),
    "missing kind": ([("{kind: select, ", "{")], 13, ["`stages.clean` lacks `kind`", "dataset, score, select"]),
    "unknown kind": ([("kind: sft,", "kind: stf,")], 14, ["no stage kind `stf`", "did you mean `sft`?"]),
    "wrong type": ([("epochs: 2", "epochs: soon")], 10, ['`stages.base.epochs` can\'t be "soon"', "number, or 'auto'"]),
    "truth value where a number belongs": ([("epochs: 2", "epochs: true")], 10, ["can't be true", "valid number"]),
    "no is a word": ([("epochs: 2", "epochs: no")], 10, ['can\'t be "no"', "valid number"]),
    "quoted number is text": ([("epochs: 2", "epochs: '2'")], 10, ['can\'t be "2"', "valid number"]),
    "endless training": ([("epochs: 2", "epochs: .inf")], 10, ["can't be Infinity", "finite number"]),
    "not a number": ([("epochs: 2", "epochs: .nan")], 10, ["can't be NaN"]),
    "out of bounds": ([("epochs: 2", "epochs: 0")], 10, ["can't be 0", "greater than 0"]),
    "stage that is a number": ([("{kind: dataset, source: b.jsonl}", "5")], 5, ["`stages.more` can't be 5"]),
    "stage that is empty": ([("{kind: dataset, source: b.jsonl}", "")], 5, ["`stages.more` can't be null"]),
    "no stage's name": ([("  eval:", "  my-eval:")], 15, ["`my-eval` is no stage's name", "letters, digits and _"]),
    "name of the experiment": ([("name: x", "name: a/b")], 1, ['`name` can\'t be "a/b"', "pattern"]),
    "cycle": (
        [("data: docs, by: [{perplexity: base}]", "data: clean, by: [{perplexity: base}]")],
        12,
        ["cycle: scored -> clean -> scored", "each of them waits", "read an earlier stage"],
    ),
    "stage that reads itself": (
        [("model: base, epochs", "model: sft, epochs")],
        14,
        ["cycle: sft -> sft"],
    ),
    "reference to a stage that isn't there": (
        [("    data: docs\n", "    data: dosc\n")],
        8,
        ["`base.data` refers to stage `dosc`, which isn't there", "did you mean `docs`?"],
    ),
    "reference in a list": (
        [("models: [base, sft]", "models: [base, nobody]")],
        15,
        ["`eval.models.1` refers to stage `nobody`", "known: docs, more, base, scored, clean, sft"],
    ),
    "stage of a kind that can't feed it": (
        [("data: clean, model", "data: base, model")],
        14,
        ["`sft.data` needs rows or scored rows, but `base` is a pretrain stage", "gives a model", "docs, more"],
    ),
    "rows where scored rows are needed": (
        [("data: scored, keep", "data: docs, keep")],
        13,
        ["`clean.keep` uses the score `perplexity`, which `docs` does not make", "`docs` is a dataset stage"],
    ),
    "new model where a trained one is needed": (
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
        ["base is named twice"],
    ),
    "model that is compared with itself": (
        [(EVALUATE, WIN_RATE.replace("[base]", "[base, sft]"))],
        15,
        ["`sft` would be compared with itself: remove it from `models`"],
    ),
    "models of one name that are compared": (
        [(EVALUATE, WIN_RATE.replace("[base]", "[{pretrained: ./a/sft}]"))],
        15,
        ["sft is named twice"],
    ),
    "answers as long as the prompt and they may be": (
        [(EVALUATE, WIN_RATE.replace("data: more", "data: more, max_length: 128"))],
        15,
        ["`max_length` (128) leaves no room for a prompt before 128 new tokens"],
    ),
    "score that nobody makes": (
        [("keep: {perplexity:", "keep: {perplexiti:")],
        13,
        ["`clean.keep` uses the score `perplexiti`, which `scored` does not make", "did you mean `perplexity`?"],
    ),
    "two rules on one score": (
        [("{keep_fraction: 0.8}", "{keep_fraction: 0.8, threshold: 3}")],
        13,
        ["give one of `keep_fraction`, `top_k`, `match_count_of`, `keep_fraction_of_rest`, `threshold`, `range`"],
    ),
    "filter without a rule": (
        [("keep: {perplexity: {keep_fraction: 0.8}}", "combine: all")],
        13,
        ["`stages.clean` can't be", "it keeps all rows: give `keep`, `quota` or `diverse`"],
    ),
    "fraction of what no rule leaves": (
        [("{keep_fraction: 0.8}}", "{keep_fraction_of_rest: 0.8}}, combine: any")],
        13,
        ["with `combine: any` use `keep_fraction`"],
    ),
    "diversity by a score": (
        [("{keep_fraction: 0.8}}", "{keep_fraction: 0.8}}, diverse: {by: perplexity, method: k_center, rows: 9}")],
        13,
        ["`clean.diverse` compares rows by `perplexity`", "keeps no vectors", "`by: [{embedding: <model>}]`"],
    ),
    "diversity of rows without scores": (
        [("scored, keep: {perplexity: {keep_fraction: 0.8}}", "docs, diverse: {by: e, method: k_center, rows: 9}")],
        13,
        ["`clean.diverse` compares rows by `e`, of which `docs` keeps no vectors", "it is a dataset stage"],
    ),
    "diversity by vectors that are called otherwise": (
        [
            ("by: [{perplexity: base}]", "by: [{embedding: base}]"),
            ("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {by: embeddings, method: k_center, rows: 9}"),
        ],
        13,
        ["by `embeddings`", "did you mean `embedding`?"],
    ),
    "diversity by a score that nobody makes": (
        [
            ("by: [{perplexity: base}]", "by: [{perplexity: base}, {embedding: base}]"),
            (
                "keep: {perplexity: {keep_fraction: 0.8}}",
                "diverse: {by: embedding, method: score_first, score: perplexiti}",
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
        ["`clean.keep` uses the score `embedding`, which is none", "give it `reference` in `scored`"],
    ),
    "diversity of no method": (
        [("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {by: embedding, method: kcenter, rows: 9}")],
        13,
        ['`stages.clean.diverse.method` can\'t be "kcenter"', "'k_center' or 'score_first'"],
    ),
    "review of a choice without a cut": (
        [
            ("by: [{perplexity: base}]", "by: [{embedding: base}]"),
            ("keep: {perplexity: {keep_fraction: 0.8}}", "diverse: {by: embedding, method: k_center, rows: 9}"),
            ("  eval:", "  checked: {kind: review, data: clean, decisions: a.jsonl}\n  eval:"),
        ],
        15,
        ["`checked` asks about rows near a cut, and `clean` has none"],
    ),
    "threshold that keeps everything": ([("{keep_fraction: 0.8}", "{threshold: .inf}")], 13, ["finite number"]),
    "search path that no field has": (
        [("sft.learning_rate: {log", "sft.learnin_rate: {log")],
        21,
        ["no field has the search path `sft.learnin_rate`", "did you mean `learning_rate`?"],
    ),
    "searched score that nobody makes": (
        [
            ("by: [{perplexity: base}]", "by: [{perplexity: base}, {embedding: base}]"),
            (
                "keep: {perplexity: {keep_fraction: 0.8}}",
                "diverse: {by: embedding, method: score_first, score: perplexity}",
            ),
            ("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "clean.diverse.score: {choice: [random, ifd]}"),
        ],
        21,
        ["`clean.diverse.score` can't be 'ifd'", "uses the score `ifd`, which `scored` does not make"],
    ),
    "search path of no stage": (
        [("sft.learning_rate: {log", "stf.learning_rate: {log")],
        21,
        ["there is no `stf`", "did you mean `sft`?"],
    ),
    "search path of a stage alone": (
        [("sft.learning_rate: {log", "sft: {log")],
        21,
        ["`sft` names no field", "write <stage>.<field>"],
    ),
    "search path below a number": (
        [("sft.learning_rate: {log", "sft.learning_rate.x: {log")],
        21,
        ["there is no `x` in `sft.learning_rate`"],
    ),
    "upside-down range": (
        [("[1e-5, 1e-3]", "[1e-3, 1e-5]")],
        21,
        ["the range [0.001, 1e-05] is upside down or empty", "the lower end comes first"],
    ),
    "empty range": ([("loguniform: [1e-5, 1e-3]", "int: [3, 3]")], 21, ["[3, 3] is upside down or empty"]),
    "loguniform from 0": ([("[1e-5, 1e-3]", "[0, 1e-3]")], 21, ["loguniform starts at 0", "more than 0"]),
    "endless range": ([("[1e-5, 1e-3]", "[1e-5, .inf]")], 21, ["finite number"]),
    "range of three": ([("[1e-5, 1e-3]", "[1, 2, 3]")], 21, ["can't be [1, 2, 3]", "at most 2"]),
    "two dimensions in one": (
        [("[1e-5, 1e-3]", "[1e-5, 1e-3], choice: [1]")],
        21,
        ["give exactly one of `choice`, `grid`, `uniform`, `loguniform`, `int`"],
    ),
    "range that leaves the field's bounds": (
        [("loguniform: [1e-5, 1e-3]", "uniform: [0, 1e-3]")],
        21,
        ["`sft.learning_rate` can't be 0.0", "greater than 0", "change the dimension"],
    ),
    "choice that does not fit the field": (
        [("loguniform: [1e-5, 1e-3]", "choice: [1e-5, fast]")],
        21,
        ["`sft.learning_rate` can't be 'fast'", "valid number"],
    ),
    "choice of a stage that isn't there": (
        [("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "sft.data: {choice: [clean, claen]}")],
        21,
        ["`sft.data` can't be 'claen'", "refers to stage `claen`", "did you mean `clean`?"],
    ),
    "choice that makes a cycle": (
        [("sft.learning_rate: {loguniform: [1e-5, 1e-3]}", "scored.data: {choice: [docs, clean]}")],
        21,
        ["`scored.data` can't be 'clean'", "cycle"],
    ),
    "field that the metric does not depend on": (
        [("metric: sft.eval_loss", "metric: eval.base.held.loss"), ("models: [base, sft]", "models: [base]")],
        21,
        ["`sft.learning_rate` can't change `eval.base.held.loss`", "`eval` does not depend on `sft`", "base"],
    ),
    "metric nobody logs": (
        [("metric: sft.eval_loss", "metric: sft.accuracy")],
        17,
        ["nobody logs `sft.accuracy`", "known: sft.eval_loss, eval.base.held.loss, eval.base.held.perplexity"],
    ),
    "metric that is misspelled": (
        [("metric: sft.eval_loss", "metric: eval.sft.held.los")],
        17,
        ["nobody logs `eval.sft.held.los`", "did you mean `eval.sft.held.loss`?"],
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
        ["a grid needs listed values, `sft.learning_rate` is loguniform", "list the values as `choice`"],
    ),
    "search without a dimension": (
        [("  space:\n    sft.learning_rate: {loguniform: [1e-5, 1e-3]}\n", "  space: {}\n")],
        20,
        ["`search.space` can't be {}"],
    ),
    "ZeRO stage that isn't": ([("seed: 1", "seed: 1\ncompute: {zero_stage: 4}")], 3, ["can't be 4", "0, 1, 2 or 3"]),
    "unknown key of compute": (
        [("seed: 1", "seed: 1\ncompute:\n  wokers: 2")],
        4,
        ["`compute` has no key `wokers`", "did you mean `workers`?"],
    ),
    "seed beyond reading": ([("seed: 1", f"seed: {'1' * 5000}")], 2, ["`seed` can't be"]),
    "broken YAML": ([("seed: 1", "seed: [1")], 3, ["not valid YAML", "starts in line 2", "indentation"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_told_once_with_line_value_and_remedy(mistake: str, load_text: LoadText, tmp_path: Path) -> None:
    replacements, line, words = MISTAKES[mistake]
    (error,) = errors_of(load_text, edited(*replacements))
    assert str(error).startswith(f"{tmp_path / 'exp.yaml'}:{line}: ")
    for word in words:
        assert word in str(error)
    assert error.exit_code == 2


@pytest.mark.parametrize("subject", ["model: base, epochs", "  metric: sft.eval_loss"])
def test_good_neighbours_of_the_mistakes_load(load_text: LoadText, subject: str) -> None:
    good = {
        "model: base, epochs": "model: {pretrained: org/name, revision: abc}, epochs",
        "  metric: sft.eval_loss": "  scheduler: asha\n  metric: sft.eval_loss",
    }
    load_text(edited((subject, good[subject])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing yet\n", "the file is empty"),
        ("- name: x\n", "the file holds a list"),
        ("just words", 'the file holds one value ("just words")'),
    ],
)
def test_file_that_holds_no_experiment_says_what_it_holds(load_text: LoadText, text: str, message: str) -> None:
    (error,) = errors_of(load_text, text)
    assert error.message == message
    assert error.line == 1
    assert "mapping with name, seed and stages" in error.remedy


def test_all_mistakes_of_a_level_are_told_at_once(load_text: LoadText) -> None:
    text = edited(("seed: 1", "seed: one"), ("epochs: 2", "epochs: -1"), ("trials: 3", "trials: 0"))
    assert [error.line for error in errors_of(load_text, text)] == [2, 10, 19]
    text = edited(("    data: docs", "    data: nope"), ("eval_data: more", "eval_data: base"))
    assert [error.line for error in errors_of(load_text, text)] == [8, 14]


def test_search_without_any_metric_says_how_to_get_one(load_text: LoadText) -> None:
    without_eval = edited(
        (", eval_data: more", ""), ("  eval: {kind: evaluate, models: [base, sft], data: {held: more}}\n", "")
    )
    (error,) = errors_of(load_text, without_eval)
    assert "nobody logs `sft.eval_loss`" in error.message
    assert "give a training `eval_data`, or add an evaluate stage" in error.cause


def test_file_that_cannot_be_read_is_a_wrong_request(tmp_path: Path) -> None:
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


def test_defaults_leave_nothing_that_changes_a_training_unsaid(load_text: LoadText) -> None:
    for missing in ("    epochs: 2\n", "    learning_rate: 2e-3\n"):
        assert "lacks" in errors_of(load_text, edited((missing, "")))[0].message
    docs = load_text(GOOD)[0].stages["docs"]
    assert isinstance(docs, Dataset)
    assert docs.split == "all"


ERRORS: list[TuneryError] = [
    TuneryError("m", cause="c", remedy="r"),
    RequestError("m", cause="c", remedy="r"),
    SpecError("m", file="exp.yaml", line=7, cause="c", remedy="r"),
    SpecErrors([SpecError("m", file="exp.yaml", line=7), SpecError("n", file="exp.yaml", line=9, remedy="r")]),
    StoreError("m", cause="c", remedy="r"),
    StageError("sft", "m", cause="c", remedy="r", log="/log"),
    RowsLost("sft", "m", cause="c", log="/log"),
    Stopped("m"),
    Interrupted("m"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling_with_all_they_know(error: TuneryError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.exit_code == error.exit_code
    plain = {key: value for key, value in vars(error).items() if key != "errors"}
    assert {key: vars(copy)[key] for key in plain} == plain
    assert [vars(one) for one in getattr(copy, "errors", [])] == [vars(one) for one in getattr(error, "errors", [])]


@pytest.mark.parametrize(
    "error",
    [BadSource("columns", "m", cause="c", remedy="r"), BadModel("m", "c", "r"), Ambiguous("config", "m", ["a", "b"])],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_rooms_survive_it_too(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), "m", vars(error))


def test_every_kind_of_error_is_among_those_that_are_pickled() -> None:
    def below(cls: type[TuneryError]) -> set[type[TuneryError]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__() if sub.__module__ == "tunery.errors"))

    assert below(TuneryError) == {type(error) for error in ERRORS}


def test_what_load_raises_survives_pickling_with_file_and_line(load_text: LoadText, tmp_path: Path) -> None:
    with pytest.raises(SpecErrors) as caught:
        load_text(edited(("epochs: 2", "epochs: soon")))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert (copy.errors[0].file, copy.errors[0].line) == (str(tmp_path / "exp.yaml"), 10)


def test_scorers_are_named_by_their_first_key_and_take_their_settings(load_text: LoadText) -> None:
    scorers = (
        "{perplexity: base}, {length: words}, {length: chars, of: question, name: long_question},"
        " {gopher: {}}, {gopher: {words_min: null, of: whole}, name: gopher_whole}, {c4: {braces: false}},"
        " {language: en}, {duplicates: exact, of: question}, {near_duplicates: {threshold: 0.7}},"
        " {contamination: {sets: [more], ngram: 8}}, {reward: {pretrained: a/b}},"
        " {classifier: {pretrained: a/b, revision: abc}, label: 1, temperature: 0.5},"
        " {embedding: base, reference: docs}"
    )
    scored = load_text(edited(("by: [{perplexity: base}]", f"by: [{scorers}]")))[0].stages["scored"]
    assert isinstance(scored, Score)
    assert [scorer.score for scorer in scored.by] == [
        "perplexity",
        "length",
        "long_question",
        "gopher",
        "gopher_whole",
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
    assert (gopher.gopher.words_min, gopher.gopher.words_max, gopher.gopher.of) == (None, 100_000, "whole")
