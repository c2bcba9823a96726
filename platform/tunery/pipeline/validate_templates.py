"""Check a model's chat template on the first rows of a stage before a run: whether exact loss masks are possible, which
rows the template rejects, how many rows `max_length` truncates, and how generation starts and stops.

Loads tokenizers, but no models, and does not import torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import SpecError
from tunery.ingest.read import first_rows
from tunery.ingest.sources import BadSource
from tunery.models.chat_template import chat_template_of
from tunery.models.encode_rows import EncodeRows, TokenizedRow
from tunery.models.load import Source, load_original_tokenizer, load_tokenizer
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.models.row_encodings import LABELLED_BY_STAGE, NOT_COUNTED, encoding_of, row_encoding_of
from tunery.models.template_rendering import UnsupportedTemplate
from tunery.pipeline.cache_keys import model_folder
from tunery.spec import TRAINERS, Dataset, Experiment, PositiveNegative, Pretrained, ReviewLabels, Training
from tunery.spec.error_messages import error_at
from tunery.spec.graph import model_chain, root_dataset, root_model
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import YamlSource
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 200
"""Number of rows that are encoded: the first rows of each dataset that a stage's rows come from, not filtered."""


class TokenizerError(Exception):
    """The files of a tokenizer cannot be loaded."""


@dataclass
class TemplateCheck:
    """Statistics of the sampled rows of a stage."""

    rows: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    """Number of unusable rows by reason."""
    truncated: int = 0
    escaped: int = 0
    """Number of special tokens in the text of the rows, which are encoded as ordinary text."""
    dropped_reasoning: int = 0
    """Number of assistant messages whose reasoning the chat template does not render."""
    opens_thinking: str = ""
    """The generation prompt if it opens a thinking block that rows without reasoning lack in training; else ""."""
    max_unusable: float = 1.0

    @property
    def note(self) -> str:
        """Note on the sampled rows for the plan; "" if there is nothing to report."""
        parts = []
        if count := sum(self.unusable.values()):
            reasons = "; ".join(f"{number} x {reason}" for reason, number in self.unusable.most_common(2))
            fails = count / self.rows > self.max_unusable
            above = f", more than max_unusable ({self.max_unusable:g}): the stage would fail" if fails else ""
            parts.append(f"{count / self.rows:.0%} unusable ({reasons}){above}")
        if self.truncated:
            parts.append(f"{self.truncated / self.rows:.0%} truncated")
        if self.dropped_reasoning:
            parts.append(
                f"the chat template does not render the reasoning of assistant messages ({self.dropped_reasoning})"
            )
        if self.escaped:
            parts.append(f"special tokens in the text of rows are encoded as ordinary text ({self.escaped})")
        if self.opens_thinking:
            parts.append(
                f"generation begins with {self.opens_thinking!r}, which rows without reasoning do not have in training"
            )
        return f"of the first {_rows(self.rows)}: {'; '.join(parts)}" if parts else ""


def validate_templates(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Yield the errors of a stage whose language models are pretrained or derived from pretrained models. A model
    without a local tokenizer is skipped."""
    for at, model in _models(stage):
        try:
            tokenizer = _tokenizer(model, experiment, folder)
        except TokenizerError as error:
            yield error_at(
                source,
                ("stages", name, *at),
                f"{name}: the tokenizer of `{_model_label(model, experiment)}` can't be used",
                cause=str(error),
                remedy="save the tokenizer again with `save_pretrained`, into the model's folder",
            )
            continue
        if tokenizer is None:
            continue
        try:
            check = check_rows(stage, experiment, folder, tokenizer)
        except UnsupportedTemplate as error:
            message = str(error)
            yield error_at(
                source,
                ("stages", name, *at),
                f"{name}: the chat template of `{_model_label(model, experiment)}` can't be used: {message}",
                cause="no method gives an exact loss mask, or the model would not learn to stop",
                remedy="give the tokenizer another `chat_template`; docs/templates.md lists what is supported",
            )
            continue
        # Conclusive only if the sample is the complete dataset and no stage filters its rows.
        unfiltered = isinstance(stage.data, str) and isinstance(experiment.stages[stage.data], Dataset)
        if unfiltered and 0 < check.rows < SAMPLE and sum(check.unusable.values()) == check.rows:
            yield error_at(
                source,
                ("stages", name, "data"),
                f"{name}: none of the {check.rows} rows of `{_data_label(stage.data)}` can be used with "
                f"`{_model_label(model, experiment)}`",
                cause="; ".join(f"{_rows(count)}: {reason}" for reason, count in check.unusable.most_common(3)),
                remedy=f"raise max_length (now {stage.max_length}) for rows that are too long; use a model whose chat "
                "template renders such rows; or use other rows. `tunery preview` shows them",
            )


def template_notes(experiment: Experiment, folder: Path, artifacts: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Return notes on the first rows of each training, by stage. `artifacts`: folders of the models in the store, by
    stage."""
    notes = {}
    for name, stage in experiment.stages.items():
        if not isinstance(stage, Training):
            continue
        try:
            has_head = TRAINERS[stage.kind].model_form == "classifier"
            load = load_original_tokenizer if has_head else load_tokenizer
            tokenizer = _tokenizer(stage.model, experiment, folder, artifacts or {}, load)
            if tokenizer is not None and (note := check_rows(stage, experiment, folder, tokenizer).note):
                notes[name] = note
        except (UnsupportedTemplate, TokenizerError):  # reported by `validate`
            continue
    return notes


def check_rows(stage: Any, experiment: Experiment, folder: Path, tokenizer: PreTrainedTokenizerBase) -> TemplateCheck:
    """Encode the first rows of a stage with the tokenizer and return the counts. Raises UnsupportedTemplate if the rows
    contain messages and the chat template is not supported."""
    check = TemplateCheck(max_unusable=getattr(stage, "max_unusable", 1.0))
    data = [item.stage for item in stage.inputs() if item.path[0] == "data"]
    try:
        roots = [root_dataset(experiment.stages, name) for name in data]
        rows = [row for root in roots for row in first_rows(root, folder, min(SAMPLE, root.limit or SAMPLE))]
    except BadSource:  # reported for the dataset
        return check
    if any(row.get("messages") for row in rows):
        profile = chat_template_of(tokenizer).profile
        all_reasoning = all(_has_reasoning(row) for row in rows if row.get("messages"))
        if isinstance(stage, Training) and not profile.prefix and not all_reasoning:
            check.opens_thinking = profile.generation_prompt
    if (encode_rows := _encode_rows(stage)) is not None:
        check.rows = len(rows)
        for item in encode_rows(rows, tokenizer, encoding_of(stage)):
            _count(item, check)
    return check


def _encode_rows(stage: Any) -> EncodeRows | None:
    """Return the function that encodes the rows of the stage as sequences; None if the sampled rows do not determine
    it."""
    if isinstance(stage.data, PositiveNegative | ReviewLabels):
        return LABELLED_BY_STAGE.encode_rows
    row_encoding = row_encoding_of(stage)
    return None if row_encoding is None else row_encoding.encode_rows


def _count(item: TokenizedRow, check: TemplateCheck) -> None:
    if item.unusable:
        check.unusable[item.unusable] += item.unusable not in NOT_COUNTED
        return
    check.truncated += any(part.truncated for part in item.sequences)
    check.escaped += sum(part.escaped_tokens for part in item.sequences)
    check.dropped_reasoning += sum(part.dropped_reasoning for part in item.sequences)


def _models(stage: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the language models of a stage with their field paths, each once."""
    seen: list[Any] = []
    for item in stage.model_refs():
        if item.role == "language_model" and item.model not in seen:
            seen.append(item.model)
            yield item.path, item.model


def _tokenizer(
    model: Any,
    experiment: Experiment,
    folder: Path,
    artifacts: Mapping[str, Path] | None = None,
    load: Callable[[Source], PreTrainedTokenizerBase] = load_tokenizer,
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model, from the first model of its chain that has one. None if there is none: for a
    scratch model without an artifact, a hub model that is not in the local cache, and an invalid folder."""
    for base in model_chain(experiment.stages, model):
        if isinstance(base, str) and artifacts is not None and base in artifacts:
            return _loaded({"artifact": str(artifacts[base])}, load)
        if isinstance(base, Pretrained) and (name := _tokenizer_folder(base, folder)) is not None:
            return _loaded({"pretrained": name, "revision": None}, load)
    return None


def _tokenizer_folder(model: Pretrained, folder: Path) -> str | None:
    if not model.is_folder:
        return _cached(model)
    try:
        check_model_folder(model_folder(model, folder))
    except BadModel:  # reported for the stage that refers to it
        return None
    return str(model_folder(model, folder))


def _loaded(source: Source, load: Callable[[Source], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    try:
        return load(source)
    except Exception as error:  # the library raises many types of errors for invalid tokenizer files
        lines = str(error).strip().splitlines()
        raise TokenizerError(f"{type(error).__name__}: {lines[0] if lines else ''}") from error


def _cached(model: Pretrained) -> str | None:
    """Return the folder of a hub model's tokenizer in the Hugging Face cache; None if it is not cached. Does not
    download."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model.pretrained, "tokenizer_config.json", revision=model.revision)
    return str(Path(path).parent) if isinstance(path, str) else None


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _has_reasoning(row: Row) -> bool:
    """Whether the last message has reasoning."""
    last = row["messages"][-1]
    return bool(last.get("reasoning_content")) or "</think>" in (last["content"] or "")


def _data_label(data: str | dict[str, float]) -> str:
    return ", ".join(data_refs(data).values())


def _model_label(model: Any, experiment: Experiment) -> str:
    return str(getattr(root_model(experiment.stages, model), "pretrained", model))
