"""The experiment file that `tunery filter` generates."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tunery.errors import RequestError, SpecErrors
from tunery.filter.filter_command import run_filter, write_experiment
from tunery.filter.filter_experiment import MARKER, Built, FilterRequest, build
from tunery.filter.grammar import parse_keep
from tunery.spec import Experiment, Keep, load
from tunery.spec.scorers import SCORERS
from tunery.spec.stages import Dataset, Score, Select
from tunery.store import Store


def loaded(built: Built, asked: FilterRequest) -> Experiment:
    write_experiment(asked.file, built.text)
    return load(asked.file)[0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_word_what_is_bad_in_any_data_is_dropped_and_that_is_said() -> None:
    asked = FilterRequest(("rows.csv",), Path("good.csv"))
    built = build(asked)
    experiment = loaded(built, asked)
    assert [type(stage) for stage in experiment.stages.values()] == [Dataset, Score, Select]
    assert list(experiment.stages["kept"].keep) == ["duplicates", "near_duplicates", "gopher"]
    assert "no --by and no --keep" in built.notes[0]
    assert built.notes[1] == "rules: duplicates <= 0; near_duplicates <= 0; gopher <= 0"


def test_prompts_are_judged_whole_since_they_have_no_answer() -> None:
    asked = FilterRequest(("rows.csv",), Path("good.csv"))
    (*_, gopher) = loaded(build(asked, answers=False), asked).stages["scored"].by
    assert gopher.gopher.of == "whole"


def test_every_score_has_its_usual_rule_where_none_is_given() -> None:
    by = ("length", "gopher", "c4", "language=en", "duplicates", "near_duplicates", "perplexity=org/model", "ifd=./m")
    asked = FilterRequest(("rows.csv",), Path("good.csv"), by)
    experiment = loaded(build(asked), asked)
    assert list(experiment.stages["kept"].keep) == [scorer.score for scorer in experiment.stages["scored"].by]


def test_a_rule_brings_its_score_along_where_that_needs_no_word() -> None:
    asked = FilterRequest(
        ("rows.csv",), Path("good.csv"), keep=("length 3..500", "random best 10"), any_rule=True, limit=20
    )
    experiment = loaded(build(asked), asked)
    assert [scorer.score for scorer in experiment.stages["scored"].by] == ["length"]
    assert experiment.stages["kept"].combine == "any"
    assert experiment.stages["rows"].limit == 20
    with pytest.raises(RequestError, match="needs to know more") as caught:
        build(FilterRequest(("rows.csv",), Path("good.csv"), keep=("language >= 0.1",)))
    assert "language=en" in caught.value.remedy


def test_random_rows_need_no_score() -> None:
    asked = FilterRequest(("rows.csv",), Path("good.csv"), keep=("random best 10",))
    assert list(loaded(build(asked), asked).stages) == ["rows", "kept"]


def test_paths_lead_from_the_experiment_to_where_they_led_from_here(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sources = ("in/a b.csv", "hub:org/name", "s3://bucket/x.jsonl", "/data/*.csv")
    by = ("perplexity=model", "contamination=in/test.jsonl")
    asked = FilterRequest(sources, Path("out/deep/good.csv"), by, columns=("prompt=Frage: was?", "completion=no"))
    experiment = loaded(build(asked), asked)
    first, *others = experiment.stages["rows"].source
    assert os.path.normpath(asked.file.parent / first) == "in/a b.csv"
    assert others == list(sources[1:])
    assert experiment.stages["rows"].columns == {"prompt": "Frage: was?", "completion": "no"}
    perplexity, contamination = experiment.stages["scored"].by
    assert os.path.normpath(asked.file.parent / perplexity.perplexity.pretrained) == "model"
    (name,) = contamination.contamination.sets
    assert os.path.normpath(asked.file.parent / experiment.stages[name].source) == "in/test.jsonl"


@pytest.mark.parametrize("name", ['a"b.csv', "ä\u2028😀.csv", "{x}: #.csv", "no", "line\nend.csv", "tab\there.csv"])
def test_any_name_of_a_file_survives_the_text(name: str) -> None:
    asked = FilterRequest((name,), Path("good.csv"))
    assert loaded(build(asked), asked).stages["rows"].source == name


def test_every_option_has_a_line_of_its_own_in_the_experiment(tmp_path: Path) -> None:
    options = ("--by length=wrods", "--by language=xx")
    asked = FilterRequest(
        ("a.csv", "b.csv"), Path("good.csv"), ("length=wrods", "language=xx"), limit=3, columns=("text=t",)
    )
    built = build(asked)
    with pytest.raises(SpecErrors) as caught:
        loaded(built, asked)
    assert [built.options[error.line] for error in caught.value.errors] == list(options)
    assert {"a.csv", "b.csv", "--column text=t", "--limit 3", "--seed 17", *options} == set(built.options.values())


@pytest.mark.parametrize("by", ["{}", "{lenght: words}", "{length: words, name: A b}", "{length: [}", "{3: x}"])
def test_a_scorer_in_braces_is_checked_as_an_experiments(by: str) -> None:
    asked = FilterRequest(("rows.csv",), Path("good.csv"), (by,))
    with pytest.raises(RequestError):
        loaded(build(asked), asked)


@pytest.mark.parametrize("kind", SCORERS)
def test_usual_rule_of_every_score_is_a_valid_rule(kind: str) -> None:
    score, rule = parse_keep(f"{kind} {SCORERS[kind].usual_rule}")
    assert score == kind
    Keep.model_validate_json(json.dumps(rule), strict=True)


def test_a_place_that_can_not_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="can't be written") as caught:
        write_experiment(tmp_path / "file" / "good.yaml", MARKER)
    assert "--out" in caught.value.remedy
    (tmp_path / "good.yaml").mkdir()
    with pytest.raises(RequestError, match="can't be written"):
        write_experiment(tmp_path / "good.yaml", MARKER)


def test_two_rules_on_a_score_are_refused() -> None:
    with pytest.raises(RequestError, match=r"length >= 3.*length <= 5"):
        build(FilterRequest(("rows.csv",), Path("good.csv"), keep=("length >= 3", "length <= 5")))


def test_an_experiment_of_somebody_else_is_not_overwritten_and_ours_is(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    write_experiment(file, f"{MARKER}\na")
    write_experiment(file, f"{MARKER}\nb")
    assert file.read_text() == f"{MARKER}\nb"
    file.write_text("name: mine\n")
    with pytest.raises(RequestError, match="not ours to overwrite"):
        write_experiment(file, f"{MARKER}\nc")
    assert file.read_text() == "name: mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


@pytest.mark.parametrize(
    ("source", "out", "dropped", "why"),
    [
        ("rows.csv", "rows.csv", None, "lies in the source"),
        ("rows.csv", "good.txt", None, "no ending of a format"),
        ("rows.csv", "good", None, "no ending of a format"),
        ("data", "data/deep/good.csv", None, "lies in the source"),
        ("data/*.csv", "data/good.csv", None, "lies in the source"),
        ("rows.csv", "good.csv", "good.csv", "both"),
        ("rows.csv", "good.csv", "rows.csv", "lies in the source"),
        ("rows.csv", "good.csv", "bad.pdf", "no ending of a format"),
        ("rows.csv", "data", None, "no ending of a format"),
    ],
)
def test_files_that_would_be_read_or_can_not_be_written_are_refused_before_anything_is(
    tmp_path: Path, source: str, out: str, dropped: str | None, why: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    asked = FilterRequest((source,), Path(out))
    with pytest.raises(RequestError, match=why):
        run_filter(asked, Path(dropped) if dropped else None, Store(tmp_path / "store"), quiet=True, say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "rows.csv"]
