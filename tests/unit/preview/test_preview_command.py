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
from tunery.pipeline.execute import execute
from tunery.pipeline.run_context import RunContext
from tunery.preview.preview_command import Preview, preview
from tunery.preview.preview_terminal import render
from tunery.reporting.preview_section import visible
from tunery.spec import Compute, load
from tunery.spec.graph import with_upstream
from tunery.store import Store

EXPERIMENT = """
name: preview
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
    path = tmp_path / "preview.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture
def preview_of(file: Path, tmp_path: Path) -> Callable[..., Preview]:
    return lambda stage, **options: preview(file, stage, Store(tmp_path / "store"), **options)


def build(file: Path, store: Store, *names: str) -> None:
    experiment, _ = load(file)
    stages = with_upstream(experiment.stages, names)
    subset = experiment.model_copy(update={"stages": stages, "compute": Compute(workers=1)})
    run_context = RunContext(store, store.run(experiment.name), file)
    execute(subset, run_context, EventLog(run_context.events / "driver.jsonl"))


def rendered(preview: Preview, width: int, *, colours: bool, ids: bool = False) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=colours, highlight=False)
    console.print(render(preview, colours=colours, ids=ids), soft_wrap=not colours)
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
def test_every_stage_kind_with_model_inputs_can_be_previewed(
    preview_of: Callable[..., Preview], stage: str, titles: list[str], formats: list[str]
) -> None:
    result = preview_of(stage, count=1)
    assert [section.input.title for section in result.sections] == titles
    assert [section.input.input_format for section in result.sections] == formats
    assert all(item.ids for section in result.sections for row in section.rows for item in row.sequences)


@pytest.mark.parametrize("stage", ["chats", "clean", "lengths", "nothing"])
def test_stage_without_a_model_is_rejected_with_alternatives(preview_of: Callable[..., Preview], stage: str) -> None:
    with pytest.raises(RequestError) as caught:
        preview_of(stage)
    assert f"`{stage}`" in caught.value.message
    assert caught.value.remedy


def test_model_from_scratch_has_no_tokenizer_before_it_is_built(preview_of: Callable[..., Preview]) -> None:
    for stage in ("base", "new"):
        with pytest.raises(RequestError) as caught:
            preview_of(stage)
        assert caught.value.exit_code == 2
        assert caught.value.message == "the tokenizer of `base` isn't built yet"
        assert "tunery run" in caught.value.remedy
        assert "`base` is built" in caught.value.remedy


def test_unbuilt_model_uses_the_tokenizer_of_its_base(preview_of: Callable[..., Preview]) -> None:
    assert preview_of("dpo").sections[0].tokenizer_from == "./model, the base of `sft`"


def test_rows_are_read_from_the_source_and_unapplied_filters_are_noted(preview_of: Callable[..., Preview]) -> None:
    (section,) = preview_of("sft").sections
    assert section.rows_from == (
        "rows of chats.jsonl, read from the source; `clean` (select) is not applied: it is not built yet"
    )
    assert [(row.source, row.line) for row in section.rows] == [("chats.jsonl", 1), ("chats.jsonl", 2)]


def test_rows_are_read_from_the_nearest_built_stage(
    file: Path, tmp_path: Path, preview_of: Callable[..., Preview]
) -> None:
    store = Store(tmp_path / "store")
    build(file, store, "chats")
    assert preview_of("sft").sections[0].rows_from == (
        "rows of `chats`, from the store; `clean` (select) is not applied: it is not built yet"
    )
    build(file, store, "clean")
    (section,) = preview_of("sft").sections
    assert section.rows_from == "rows of `clean`, from the store"
    assert len(section.rows) == 1


def test_preview_writes_nothing(tmp_path: Path, preview_of: Callable[..., Preview]) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    preview_of("sft")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_previewed_rows_have_the_ids_of_built_rows(
    file: Path, tmp_path: Path, preview_of: Callable[..., Preview]
) -> None:
    before = [row.as_json() for row in preview_of("grpo").sections[0].rows]
    build(file, Store(tmp_path / "store"), "chats")
    assert [row.as_json() for row in preview_of("grpo").sections[0].rows] == before


def test_row_is_found_by_id_prefix(preview_of: Callable[..., Preview]) -> None:
    second = preview_of("sft").sections[0].rows[1]
    assert preview_of("sft", row_id=second.id[:8]).sections[0].rows == (second,)
    assert preview_of("sft", offset=1).sections[0].rows == (second,)
    with pytest.raises(RequestError, match="no row `zz`"):
        preview_of("sft", row_id="zz")
    with pytest.raises(RequestError, match="2 rows, so there is none after the first 2"):
        preview_of("sft", offset=2)


def test_row_selected_by_id_hides_the_other_sets(preview_of: Callable[..., Preview]) -> None:
    row = preview_of("eval").sections[1].rows[0]
    (section,) = preview_of("eval", row_id=row.id).sections
    assert (section.input.title, section.rows) == ("pages", (row,))


def test_missing_reward_file_is_reported_with_file_and_line(file: Path, preview_of: Callable[..., Preview]) -> None:
    ppo = "kind: ppo, data: chats, model: sft, reward: rm"
    text = EXPERIMENT.replace(ppo, ppo.replace("rm", "{python: none.py}")).replace("models: [dpo]", "models: [ppo]")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecErrors, match=r"preview\.yaml:\d+: `ppo\.reward`: `none\.py` can't be read"):
        preview_of("wins")


def test_invalid_record_is_reported_with_its_line(file: Path, preview_of: Callable[..., Preview]) -> None:
    path = file.with_name("chats.jsonl")
    path.write_text("{broken\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    text = preview_of("sft").sections[0].rows_from
    assert "; a record can't be used: chats.jsonl:1: " in text


def test_missing_source_is_reported_with_file_and_line(file: Path, preview_of: Callable[..., Preview]) -> None:
    file.with_name("chats.jsonl").unlink()
    preview_of("more", count=1)
    with pytest.raises((SpecError, SpecErrors)) as caught:
        preview_of("sft")
    assert re.match(r".*preview\.yaml:5: chats: ", str(caught.value))


def test_rows_of_an_unsupported_format_are_rejected(file: Path, preview_of: Callable[..., Preview]) -> None:
    file.write_text(EXPERIMENT.replace("kind: dpo, data: pairs", "kind: dpo, data: chats"), encoding="utf-8")
    with pytest.raises(SpecErrors, match="needs preference pairs"):
        preview_of("dpo")


def test_template_that_cannot_be_used_is_an_error_with_a_remedy(
    file: Path, model: Path, preview_of: Callable[..., Preview]
) -> None:
    import shutil

    file.with_name("model").unlink()
    shutil.copytree(model, file.with_name("model"))
    (file.with_name("model") / "chat_template.jinja").write_text("{{ raise_exception('nothing works') }}")
    with pytest.raises(RequestError) as caught:
        preview_of("sft")
    assert "nothing works" in caught.value.cause
    assert caught.value.remedy


def test_json_has_ids_tokens_mask_and_special_flags_of_equal_length(file: Path, tmp_path: Path) -> None:
    arguments = ["preview", str(file), "sft", "--store", str(tmp_path / "store"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert (output["stage"], output["kind"]) == ("sft", "sft")
    (sequence,) = output["sections"][0]["rows"][0]["sequences"]
    lists = [sequence[name] for name in ("ids", "tokens", "trained", "special")]
    assert {len(item) for item in lists} == {sequence["num_tokens"]}
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


def test_plain_text_is_the_same_at_every_width(preview_of: Callable[..., Preview]) -> None:
    result = preview_of("more")
    assert rendered(result, 80, colours=False) == rendered(result, 200, colours=False)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("stage", ["sft", "more", "dpo", "eval"])
def test_terminal_output_fits_and_has_the_complete_text(
    preview_of: Callable[..., Preview], stage: str, width: int
) -> None:
    from rich.cells import cell_len

    result = preview_of(stage)
    output = re.sub(r"\x1b\[[0-9;]*m", "", rendered(result, width, colours=True))
    assert max(map(cell_len, output.splitlines())) <= width
    compact = re.sub(r"\s|«[^»]*»", "", output)
    for section in result.sections:
        for row in section.rows:
            for sequence in row.sequences:
                text = visible("".join(group.text for group in sequence.groups))
                assert re.sub(r"\s", "", text) in compact


def test_trained_tokens_are_highlighted_and_masked_ones_dimmed(preview_of: Callable[..., Preview]) -> None:
    text = rendered(preview_of("sft", count=1), 120, colours=True)
    assert "\x1b[1;32m北京" in text
    assert "\x1b[2mCapital" in text
    assert "⟦" not in text


def test_ids_are_printed_with_their_text(preview_of: Callable[..., Preview]) -> None:
    result = preview_of("sft", count=1)
    text = rendered(result, 120, colours=False, ids=True)
    (sequence,) = result.sections[0].rows[0].sequences
    for group in sequence.groups:
        assert f"{'+'.join(map(str, group.ids))}:{group.text}".strip("\n") in text
