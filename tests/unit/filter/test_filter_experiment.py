"""The experiment file that `tunery filter` generates."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tunery.errors import RequestError, SpecErrors
from tunery.filter.filter_command import run_filter, write_experiment
from tunery.filter.filter_experiment import MARKER, FilterRequest, GeneratedExperiment, generate_experiment
from tunery.filter.grammar import parse_keep
from tunery.spec import Experiment, Keep, load
from tunery.spec.scorers import SCORERS
from tunery.spec.stages import Dataset, Score, Select
from tunery.store import Store


def write_and_load(generated: GeneratedExperiment, request: FilterRequest) -> Experiment:
    write_experiment(request.file, generated.text)
    return load(request.file)[0]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_default_scores_and_rules_are_used_and_noted_without_options() -> None:
    request = FilterRequest(("rows.csv",), Path("good.csv"))
    generated = generate_experiment(request)
    experiment = write_and_load(generated, request)
    assert [type(stage) for stage in experiment.stages.values()] == [Dataset, Score, Select]
    assert list(experiment.stages["kept"].keep) == ["duplicates", "near_duplicates", "gopher"]
    assert "no --by and no --keep" in generated.notes[0]
    assert generated.notes[1] == "rules: duplicates <= 0; near_duplicates <= 0; gopher <= 0"


def test_default_gopher_score_covers_complete_rows_of_prompts() -> None:
    request = FilterRequest(("rows.csv",), Path("good.csv"))
    (*_, gopher) = write_and_load(generate_experiment(request, has_responses=False), request).stages["scored"].by
    assert gopher.gopher.of == "all"


def test_every_score_gets_its_default_rule_without_keep() -> None:
    by = ("length", "gopher", "c4", "language=en", "duplicates", "near_duplicates", "perplexity=org/model", "ifd=./m")
    request = FilterRequest(("rows.csv",), Path("good.csv"), by)
    experiment = write_and_load(generate_experiment(request), request)
    assert list(experiment.stages["kept"].keep) == [scorer.score for scorer in experiment.stages["scored"].by]


def test_rule_adds_its_scorer_if_that_needs_no_value() -> None:
    request = FilterRequest(
        ("rows.csv",), Path("good.csv"), keep=("length 3..500", "random best 10"), any_rule=True, limit=20
    )
    experiment = write_and_load(generate_experiment(request), request)
    assert [scorer.score for scorer in experiment.stages["scored"].by] == ["length"]
    assert experiment.stages["kept"].combine == "any"
    assert experiment.stages["rows"].limit == 20
    with pytest.raises(RequestError, match="needs a value") as caught:
        generate_experiment(FilterRequest(("rows.csv",), Path("good.csv"), keep=("language >= 0.1",)))
    assert "language=en" in caught.value.remedy


def test_random_rows_need_no_score() -> None:
    request = FilterRequest(("rows.csv",), Path("good.csv"), keep=("random best 10",))
    assert list(write_and_load(generate_experiment(request), request).stages) == ["rows", "kept"]


def test_paths_are_converted_to_the_folder_of_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sources = ("in/a b.csv", "hub:org/name", "s3://bucket/x.jsonl", "/data/*.csv")
    by = ("perplexity=model", "contamination=in/test.jsonl")
    request = FilterRequest(sources, Path("out/deep/good.csv"), by, columns=("prompt=Frage: was?", "completion=no"))
    experiment = write_and_load(generate_experiment(request), request)
    first, *others = experiment.stages["rows"].source
    assert os.path.normpath(request.file.parent / first) == "in/a b.csv"
    assert others == list(sources[1:])
    assert experiment.stages["rows"].columns == {"prompt": "Frage: was?", "completion": "no"}
    perplexity, contamination = experiment.stages["scored"].by
    assert os.path.normpath(request.file.parent / perplexity.perplexity.pretrained) == "model"
    (name,) = contamination.contamination.sets
    assert os.path.normpath(request.file.parent / experiment.stages[name].source) == "in/test.jsonl"


@pytest.mark.parametrize("name", ['a"b.csv', "ä\u2028😀.csv", "{x}: #.csv", "no", "line\nend.csv", "tab\there.csv"])
def test_any_file_name_is_escaped_in_the_experiment(name: str) -> None:
    request = FilterRequest((name,), Path("good.csv"))
    assert write_and_load(generate_experiment(request), request).stages["rows"].source == name


def test_every_option_has_its_own_line_in_the_experiment(tmp_path: Path) -> None:
    options = ("--by length=wrods", "--by language=xx")
    request = FilterRequest(
        ("a.csv", "b.csv"), Path("good.csv"), ("length=wrods", "language=xx"), limit=3, columns=("text=t",)
    )
    generated = generate_experiment(request)
    with pytest.raises(SpecErrors) as caught:
        write_and_load(generated, request)
    assert [generated.options[error.line] for error in caught.value.errors] == list(options)
    assert {"a.csv", "b.csv", "--column text=t", "--limit 3", "--seed 17", *options} == set(generated.options.values())


@pytest.mark.parametrize("by", ["{}", "{lenght: words}", "{length: words, name: A b}", "{length: [}", "{3: x}"])
def test_scorer_in_braces_is_validated_by_the_loader(by: str) -> None:
    request = FilterRequest(("rows.csv",), Path("good.csv"), (by,))
    with pytest.raises(RequestError):
        write_and_load(generate_experiment(request), request)


@pytest.mark.parametrize("kind", SCORERS)
def test_default_rule_of_every_score_is_valid(kind: str) -> None:
    score, rule = parse_keep(f"{kind} {SCORERS[kind].default_rule}")
    assert score == kind
    Keep.model_validate_json(json.dumps(rule), strict=True)


def test_unwritable_path_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="can't be written") as caught:
        write_experiment(tmp_path / "file" / "good.yaml", MARKER)
    assert "--out" in caught.value.remedy
    (tmp_path / "good.yaml").mkdir()
    with pytest.raises(RequestError, match="can't be written"):
        write_experiment(tmp_path / "good.yaml", MARKER)


def test_two_rules_on_a_score_are_rejected() -> None:
    with pytest.raises(RequestError, match=r"length >= 3.*length <= 5"):
        generate_experiment(FilterRequest(("rows.csv",), Path("good.csv"), keep=("length >= 3", "length <= 5")))


def test_only_generated_experiments_are_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    write_experiment(file, f"{MARKER}\na")
    write_experiment(file, f"{MARKER}\nb")
    assert file.read_text() == f"{MARKER}\nb"
    file.write_text("name: mine\n")
    with pytest.raises(RequestError, match="was not written by `tunery filter`"):
        write_experiment(file, f"{MARKER}\nc")
    assert file.read_text() == "name: mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


@pytest.mark.parametrize(
    ("source", "out", "dropped", "cause"),
    [
        ("rows.csv", "rows.csv", None, "is in the source"),
        ("rows.csv", "good.txt", None, "unsupported ending"),
        ("rows.csv", "good", None, "unsupported ending"),
        ("data", "data/deep/good.csv", None, "is in the source"),
        ("data/*.csv", "data/good.csv", None, "is in the source"),
        ("rows.csv", "good.csv", "good.csv", "both"),
        ("rows.csv", "good.csv", "rows.csv", "is in the source"),
        ("rows.csv", "good.csv", "bad.pdf", "unsupported ending"),
        ("rows.csv", "data", None, "unsupported ending"),
    ],
)
def test_invalid_output_paths_are_rejected_before_anything_is_written(
    tmp_path: Path, source: str, out: str, dropped: str | None, cause: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    request = FilterRequest((source,), Path(out))
    with pytest.raises(RequestError, match=cause):
        run_filter(request, Path(dropped) if dropped else None, Store(tmp_path / "store"), quiet=True, notify=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "rows.csv"]
