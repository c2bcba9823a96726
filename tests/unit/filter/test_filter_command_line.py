"""Errors of `tunery filter` refer to its command line, and relative paths refer to the current folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filter_runs import run_filter_in_process
from small_classifiers import write_encoder

from tunery.errors import RequestError
from tunery.filter.filter_command import run_filter
from tunery.filter.filter_experiment import FilterRequest, generate_experiment
from tunery.spec import Experiment, parse
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("question,answer\nwhy,because it is red\nhow,so\nwhat,a blue model\n")
    Path("odd.csv").write_text("x,y\n1,2\n")
    Path("array.jsonl").write_text('[{"text": "a"}]\n')


@pytest.mark.parametrize(
    ("filter_request", "message", "remedy"),
    [
        (
            FilterRequest(("rows.csv",), Path("g.csv"), ("length=wrods",)),
            "`--by length=wrods`: `length` can't be",
            "words",
        ),
        (FilterRequest(("rows.csv",), Path("g.csv"), ("{length: words, naem: x}",)), "has no key `naem`", "`name`"),
        (
            FilterRequest(("rows.csv",), Path("g.csv"), ("length", "length=chars")),
            "`--by length` and `--by length=chars`",
            "name:",
        ),
        (
            FilterRequest(("rows.csv",), Path("g.csv"), ("language=english",)),
            "`--by language=english`: `language`",
            "ISO 639",
        ),
        (
            FilterRequest(("rows.csv",), Path("g.csv"), ("{embedding: ./m}",)),
            "computes no score",
            "reference: good.jsonl",
        ),
        (
            FilterRequest(("rows.csv",), Path("g.csv"), ("contamination=no.csv",)),
            "`--by contamination=no.csv`: there is no",
            "",
        ),
        (
            FilterRequest(("rows.csv",), Path("g.csv"), (), ("lenght >= 3",)),
            "`--keep lenght >= 3`: there is no score `lenght`",
            "`length`",
        ),
        (FilterRequest(("rows.csv", "no.csv"), Path("sub/g.csv")), "there is no file `no.csv`", "the current folder"),
        (
            FilterRequest(("odd.csv",), Path("sub/g.csv")),
            "the columns of `odd.csv` match no row format",
            "--column prompt=NAME",
        ),
        (
            FilterRequest(("odd.csv",), Path("g.csv"), columns=("text=z",)),
            "the columns of `odd.csv`",
            "columns: `x`, `y`",
        ),
        (FilterRequest(("odd.csv",), Path("g.csv"), columns=("txet=x",)), "`--column txet=x` is invalid", "'text'"),
        (
            FilterRequest(("array.jsonl",), Path("g.csv")),
            "`array.jsonl` has no valid row",
            "a row must be an object, not list",
        ),
        (FilterRequest(("rows.csv",), Path("g.csv"), limit=0), "`--limit 0` is invalid", "greater than 0"),
        (FilterRequest(("builtin:python-docs",), Path("g.csv")), "can't be filtered", "tunery run"),
    ],
)
def test_error_names_option_value_and_remedy(filter_request: FilterRequest, message: str, remedy: str) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(RequestError) as caught:
        run_filter(filter_request, None, Store(Path("store")), quiet=True, notify=print)
    assert message in str(caught.value)
    assert remedy in str(caught.value)
    for word in ("stages", ".yaml", "experiment's folder", "scored", "../"):
        assert word not in str(caught.value)
    assert sorted(Path().rglob("*")) == before, "nothing is written"


def test_all_missing_models_are_reported_with_their_options() -> None:
    Path("empty").mkdir()
    by = ("reward=./rm", "{classifier: {pretrained: ./c}, label: good}", "perplexity=empty")
    with pytest.raises(RequestError) as caught:
        run_filter(
            FilterRequest(("rows.csv",), Path("g.csv"), by), None, Store(Path("store")), quiet=True, notify=print
        )
    for text in by:
        assert f"`--by {text}`: " in str(caught.value)
    assert "the current folder" in str(caught.value)


def test_unknown_label_of_a_classifier_is_an_error_of_its_option() -> None:
    write_encoder(Path("c"), ["NEGATIVE", "POSITIVE"])
    request = FilterRequest(("rows.csv",), Path("sub/g.csv"), ("classifier=c",))
    with pytest.raises(RequestError, match=r"`--by classifier=c`: `c` has no label `good`") as caught:
        run_filter(request, None, Store(Path("store")), quiet=True, notify=print)
    assert "POSITIVE" in str(caught.value)


ALL_MODEL_SCORERS = (
    "perplexity=./m",
    "ifd=m",
    "reward=./m",
    "classifier=m",
    "{perplexity: ./m, of: all, name: a}",
    "{reward: {pretrained: m}, name: b}",
    "{classifier: {pretrained: ./m}, label: 0, name: c}",
    "{embedding: ./m, reference: rows.csv}",
    "contamination=rows.csv",
    "{contamination: {sets: [rows.csv, odd.csv]}, name: d}",
)


def parsed(request: FilterRequest) -> Experiment:
    return parse(read_yaml(generate_experiment(request).text, str(request.file)))


@pytest.mark.parametrize("out", ["good.csv", "sub/good.csv", "sub/deep/good.csv", "link/good.csv"])
def test_paths_of_models_and_rows_are_relative_to_the_current_folder(out: str, tmp_path: Path) -> None:
    for folder in ("m", "sub/deep", "elsewhere/far"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("elsewhere/far")
    experiment = parsed(FilterRequest(("rows.csv",), Path(out), ALL_MODEL_SCORERS))
    folder = os.path.realpath(Path(out).parent)
    models = [scorer.model for scorer in experiment.stages["scored"].by if scorer.model is not None]
    assert len(models) == 8
    assert all(model.is_folder for model in models)
    assert {os.path.realpath(os.path.join(folder, model.pretrained)) for model in models} == {str(tmp_path / "m")}
    sets = [stage.source for name, stage in experiment.stages.items() if name.startswith("set")]
    assert [os.path.realpath(os.path.join(folder, source)) for source in sets] == [
        str(tmp_path / name) for name in ("rows.csv", "rows.csv", "rows.csv", "odd.csv")
    ]
    assert os.path.realpath(os.path.join(folder, experiment.stages["rows"].source)) == str(tmp_path / "rows.csv")


def test_hub_names_and_absolute_paths_are_not_changed(tmp_path: Path) -> None:
    by = ("perplexity=org/model", f"ifd={tmp_path}/m", "reward=~/m")
    experiment = parsed(FilterRequest(("rows.csv",), Path("sub/good.csv"), by))
    assert [scorer.model.pretrained for scorer in experiment.stages["scored"].by] == [
        "org/model",
        f"{tmp_path}/m",
        "~/m",
    ]


def test_model_scores_are_written_to_a_file_in_another_folder() -> None:
    write_encoder(Path("c"), ["bad", "good"])
    write_encoder(Path("rm"), ["reward"], num_labels=1)
    result = run_filter_in_process(
        "rows.csv", out="sub/good.csv", by=("reward=./rm", "classifier=c"), keep=("reward best 2",), scores=True
    )
    assert result.added.scores == {"reward": "reward", "classifier": "classifier"}
    header, *rows = Path("sub/good.csv").read_text().splitlines()
    assert header == "question,answer,reward,classifier"
    assert len(rows) == 2
