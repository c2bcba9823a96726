"""`tunery preview`: sources of rows and tokenizers, and the output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tunery.cli import app
from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.events.event_log import EventLog
from tunery.models.scratch import write_scratch_model
from tunery.pipeline.execute import RunContext, execute
from tunery.preview.preview_command import Preview, preview
from tunery.preview.preview_terminal import render
from tunery.reporting.preview_section import visible
from tunery.spec import Compute, load
from tunery.spec.graph import with_upstream
from tunery.store import Store

EXPERIMENT = """
name: look
seed: 1
stages:
  chats: {kind: dataset, source: chats.jsonl}
  good: {kind: dataset, source: chats.jsonl, limit: 1}
  pairs: {kind: dataset, source: pairs.jsonl}
  texts: {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 5}
  clean: {kind: select, data: chats, keep: {random: {top_k: 1}}}
  scored: {kind: score, data: chats, by: [{length: words}, {perplexity: sft}, {ifd: sft}, {reward: rm}]}
  lengths: {kind: score, data: chats, by: [{length: words}]}
  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  more: {kind: pretrain, data: texts, model: {pretrained: ./model}, epochs: 1, learning_rate: 1e-3, max_length: 32}
  sft: {kind: sft, data: clean, model: {pretrained: ./model}, epochs: 1, learning_rate: 1e-3, max_length: 99}
  new: {kind: sft, data: chats, model: base, epochs: 1, learning_rate: 1e-3}
  sorts: {kind: classifier, data: {good: good, bad: chats}, model: sft, epochs: 1, learning_rate: 1e-3}
  dpo: {kind: dpo, data: pairs, model: sft, epochs: 1, learning_rate: 1e-3}
  kto: {kind: kto, data: pairs, model: sft, epochs: 1, learning_rate: 1e-3}
  rm: {kind: reward, data: pairs, model: sft, epochs: 1, learning_rate: 1e-3}
  grpo: {kind: grpo, data: chats, model: sft, reward: rm, epochs: 1, learning_rate: 1e-3}
  rloo: {kind: rloo, data: chats, model: sft, reward: rm, epochs: 1, learning_rate: 1e-3}
  ppo: {kind: ppo, data: chats, model: sft, reward: rm, epochs: 1, learning_rate: 1e-3, ptx: {data: texts}}
  wins: {kind: win_rate, models: [dpo], baseline: sft, judge: rm, data: chats}
  eval: {kind: evaluate, models: [sft, dpo], data: {held: chats, pages: texts}}
"""
CHATS = [
    {"prompt": "Capital of China? 中国", "completion": "北京 🏯.\nIt is [bold]large[/bold]."},
    {"prompt": "Write\x1b[31m red\u202e", "completion": "No."},
]
PAIRS = [{"prompt": "Capital?", "chosen": "Paris.", "rejected": "Fox."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview") / "model"
    write_scratch_model(folder, "tiny", ["Capital of China? Paris. Fox."], seed=1)
    return folder


@pytest.fixture
def file(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "model").symlink_to(model)
    for name, rows in (("chats", CHATS), ("pairs", PAIRS)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    path = tmp_path / "look.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture
def shown(file: Path, tmp_path: Path) -> Callable[..., Preview]:
    return lambda stage, **options: preview(file, stage, Store(tmp_path / "store"), **options)


def build(file: Path, store: Store, *names: str) -> None:
    experiment, _ = load(file)
    stages = with_upstream(experiment.stages, names)
    wanted = experiment.model_copy(update={"stages": stages, "compute": Compute(workers=1)})
    where = RunContext(store, store.run(experiment.name), file)
    execute(wanted, where, EventLog(where.events / "driver.jsonl"))


def printed(told: Preview, width: int, *, colours: bool, ids: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=colours, highlight=False)
    console.print(render(told, colours=colours, ids=ids), soft_wrap=not colours)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("stage", "titles", "formats"),
    [
        ("more", [""], ["documents"]),
        ("sft", [""], ["conversation"]),
        ("sorts", ["good", "bad"], ["classifier", "classifier"]),
        ("dpo", [""], ["pair"]),
        ("kto", [""], ["rated"]),
        ("rm", [""], ["reward_pair"]),
        ("grpo", [""], ["prompt"]),
        ("rloo", [""], ["prompt"]),
        ("ppo", ["", "ptx"], ["prompt", "scored"]),
        ("wins", [""], ["prompt"]),
        ("eval", ["held", "pages"], ["conversation", "conversation"]),
        ("scored", ["perplexity", "ifd", "reward"], ["scored", "ifd", "classifier"]),
    ],
)
def test_every_kind_that_feeds_rows_to_a_model_can_be_previewed(
    shown: Callable[..., Preview], stage: str, titles: list[str], formats: list[str]
) -> None:
    told = shown(stage, count=1)
    assert [section.input.title for section in told.sections] == titles
    assert [section.input.input_format for section in told.sections] == formats
    assert all(one.ids for section in told.sections for row in section.rows for one in row.sequences)


@pytest.mark.parametrize("stage", ["chats", "clean", "lengths", "nothing"])
def test_stage_without_a_model_is_refused_with_those_that_have_one(shown: Callable[..., Preview], stage: str) -> None:
    with pytest.raises(RequestError) as found:
        shown(stage)
    assert f"`{stage}`" in found.value.message
    assert found.value.remedy


def test_model_from_scratch_has_no_tokenizer_before_it_is_built(shown: Callable[..., Preview]) -> None:
    for stage in ("base", "new"):
        with pytest.raises(RequestError) as found:
            shown(stage)
        assert found.value.exit_code == 2
        assert found.value.message == "the tokenizer of `base` isn't built yet"
        assert "tunery run" in found.value.remedy
        assert "`base` is built" in found.value.remedy


def test_tokenizer_of_a_model_that_is_not_built_is_that_of_its_base(shown: Callable[..., Preview]) -> None:
    assert shown("dpo").sections[0].tokenizer_from == "./model, the base of `sft`"


def test_rows_come_from_the_source_and_filters_are_said_not_to_be_applied(shown: Callable[..., Preview]) -> None:
    (section,) = shown("sft").sections
    assert section.rows_from == (
        "rows of chats.jsonl, read from the source; `clean` (select) is not applied: it is not built yet"
    )
    assert [(row.source, row.line) for row in section.rows] == [("chats.jsonl", 1), ("chats.jsonl", 2)]


def test_rows_come_from_the_nearest_stage_that_is_built(
    file: Path, tmp_path: Path, shown: Callable[..., Preview]
) -> None:
    store = Store(tmp_path / "store")
    build(file, store, "chats")
    assert shown("sft").sections[0].rows_from == (
        "rows of `chats`, from the store; `clean` (select) is not applied: it is not built yet"
    )
    build(file, store, "clean")
    (section,) = shown("sft").sections
    assert section.rows_from == "rows of `clean`, from the store"
    assert len(section.rows) == 1


def test_preview_writes_nothing(tmp_path: Path, shown: Callable[..., Preview]) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    shown("sft")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_rows_have_the_ids_that_they_have_when_they_are_built(
    file: Path, tmp_path: Path, shown: Callable[..., Preview]
) -> None:
    before = [row.as_json() for row in shown("grpo").sections[0].rows]
    build(file, Store(tmp_path / "store"), "chats")
    assert [row.as_json() for row in shown("grpo").sections[0].rows] == before


def test_row_is_found_by_the_beginning_of_its_id(shown: Callable[..., Preview]) -> None:
    second = shown("sft").sections[0].rows[1]
    assert shown("sft", row_id=second.id[:8]).sections[0].rows == (second,)
    assert shown("sft", offset=1).sections[0].rows == (second,)
    with pytest.raises(RequestError, match="no row `zz`"):
        shown("sft", row_id="zz")
    with pytest.raises(RequestError, match="2 rows, so there is none after the first 2"):
        shown("sft", offset=2)


def test_row_of_one_of_several_sets_is_shown_alone(shown: Callable[..., Preview]) -> None:
    wanted = shown("eval").sections[1].rows[0]
    (section,) = shown("eval", row_id=wanted.id).sections
    assert (section.input.title, section.rows) == ("pages", (wanted,))


def test_missing_file_of_a_reward_is_told_with_file_and_line(file: Path, shown: Callable[..., Preview]) -> None:
    ppo = "kind: ppo, data: chats, model: sft, reward: rm"
    text = EXPERIMENT.replace(ppo, ppo.replace("rm", "{python: none.py}")).replace("models: [dpo]", "models: [ppo]")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecErrors, match=r"look\.yaml:\d+: `ppo\.reward`: `none\.py` can't be read"):
        shown("wins")


def test_record_that_cannot_be_used_is_named_with_its_line(file: Path, shown: Callable[..., Preview]) -> None:
    path = file.with_name("chats.jsonl")
    path.write_text("{broken\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    said = shown("sft").sections[0].rows_from
    assert "; a record can't be used: chats.jsonl:1: " in said


def test_missing_source_is_told_with_file_and_line_of_the_experiment(file: Path, shown: Callable[..., Preview]) -> None:
    file.with_name("chats.jsonl").unlink()
    shown("more", count=1)
    with pytest.raises((SpecError, SpecErrors)) as found:
        shown("sft")
    assert re.match(r".*look\.yaml:5: chats: ", str(found.value))


def test_rows_of_a_wrong_shape_are_refused(file: Path, shown: Callable[..., Preview]) -> None:
    file.write_text(EXPERIMENT.replace("kind: dpo, data: pairs", "kind: dpo, data: chats"), encoding="utf-8")
    with pytest.raises(SpecErrors, match="needs preference pairs"):
        shown("dpo")


def test_template_that_cannot_be_used_is_an_error_with_a_remedy(
    file: Path, model: Path, shown: Callable[..., Preview]
) -> None:
    import shutil

    file.with_name("model").unlink()
    shutil.copytree(model, file.with_name("model"))
    (file.with_name("model") / "chat_template.jinja").write_text("{{ raise_exception('nothing works') }}")
    with pytest.raises(RequestError) as found:
        shown("sft")
    assert "nothing works" in found.value.cause
    assert found.value.remedy


def test_json_holds_ids_tokens_mask_and_special_tokens_of_one_length(file: Path, tmp_path: Path) -> None:
    arguments = ["preview", str(file), "sft", "--store", str(tmp_path / "store"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["stage"], told["kind"]) == ("sft", "sft")
    (sequence,) = told["sections"][0]["rows"][0]["sequences"]
    lists = [sequence[name] for name in ("ids", "tokens", "trained", "special")]
    assert {len(one) for one in lists} == {sequence["num_tokens"]}
    assert "".join(sequence["tokens"]) == (
        "<|user|>Capital of China? 中国<|end|><|assistant|>北京 🏯.\nIt is [bold]large[/bold].<|end|>"
    )
    trained = "".join(token for token, yes in zip(sequence["tokens"], sequence["trained"], strict=True) if yes)
    assert trained == "北京 🏯.\nIt is [bold]large[/bold].<|end|>"
    special = [token for token, yes in zip(sequence["tokens"], sequence["special"], strict=True) if yes]
    assert special == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]


def test_piped_output_has_brackets_and_no_escape_codes(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["preview", str(file), "sft", "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "⟦北京 🏯.⏎\nIt is [bold]large[/bold].<|end|>⟧" in result.stdout
    assert "legend: ⟦trained⟧" in result.stdout
    assert "Write␛[31m red<U+202E>" in result.stdout


def test_plain_text_is_the_same_at_every_width(shown: Callable[..., Preview]) -> None:
    told = shown("more")
    assert printed(told, 80, colours=False) == printed(told, 200, colours=False)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("stage", ["sft", "more", "dpo", "eval"])
def test_terminal_output_fits_and_holds_all_of_the_text(shown: Callable[..., Preview], stage: str, width: int) -> None:
    from rich.cells import cell_len

    told = shown(stage)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed(told, width, colours=True))
    assert max(map(cell_len, plain.splitlines())) <= width
    squeezed = re.sub(r"\s|«[^»]*»", "", plain)
    for section in told.sections:
        for row in section.rows:
            for sequence in row.sequences:
                text = visible("".join(group.text for group in sequence.groups))
                assert re.sub(r"\s", "", text) in squeezed


def test_trained_tokens_are_highlighted_and_masked_ones_dimmed(shown: Callable[..., Preview]) -> None:
    text = printed(shown("sft", count=1), 120, colours=True)
    assert "\x1b[1;32m北京" in text
    assert "\x1b[2mCapital" in text
    assert "⟦" not in text


def test_ids_are_printed_beside_their_text(shown: Callable[..., Preview]) -> None:
    told = shown("sft", count=1)
    text = printed(told, 120, colours=False, ids=True)
    (sequence,) = told.sections[0].rows[0].sequences
    for group in sequence.groups:
        assert f"{'+'.join(map(str, group.ids))}:{group.text}".strip("\n") in text
